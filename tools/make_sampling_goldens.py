"""Write `tests/golden/sampling.json`: what the logits processors of HF transformers make of random logits.

    python tools/make_sampling_goldens.py

Needs torch and transformers; the tests only read what it wrote, so they need neither.
"""

import json
import sys
from pathlib import Path

try:
    import torch
    import transformers
    from transformers import generation
except ImportError as error:
    sys.exit(f"make_sampling_goldens.py needs torch and transformers ({error})")

VOCABULARY, ENDS = 24, [3, 17]
CASES = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"min_new_tokens": 4},
    {"min_new_tokens": 3},
    {"logit_bias": {"5": 8.5, "3": -20.0, "11": 1.0}},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 5},
    {"top_p": 0.7},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.8, "min_p": 0.15, "temperature": 1.7},
    {
        "logit_bias": {"2": 3.0, "17": 9.0},
        "repetition_penalty": 1.8,
        "min_new_tokens": 4,
        "temperature": 0.8,
        "top_k": 9,
        "top_p": 0.95,
        "min_p": 0.02,
    },
]
"""Settings as of `Request`; those at 0 or 1 are left out."""


def processors(case, prompt):
    """The processors of a case, in the order in which `generate` has them."""
    found = generation.LogitsProcessorList()
    if "logit_bias" in case:
        bias = {(int(token),): value for token, value in case["logit_bias"].items()}
        found.append(generation.SequenceBiasLogitsProcessor(bias))
    if "repetition_penalty" in case:
        found.append(generation.RepetitionPenaltyLogitsProcessor(case["repetition_penalty"]))
    if "min_new_tokens" in case:
        found.append(
            generation.MinNewTokensLengthLogitsProcessor(len(prompt), case["min_new_tokens"], ENDS, "cpu")
        )
    for name, make in (
        ("temperature", generation.TemperatureLogitsWarper),
        ("top_k", generation.TopKLogitsWarper),
        ("top_p", generation.TopPLogitsWarper),
        ("min_p", generation.MinPLogitsWarper),
    ):
        if name in case:
            found.append(make(case[name]))
    return found


def main():
    torch.manual_seed(0)
    cases = []
    for case in CASES:
        logits = torch.randn(VOCABULARY) * 2 + 0.3
        prompt = torch.randint(0, VOCABULARY, (7,)).tolist()
        new = torch.randint(0, VOCABULARY, (3,)).tolist()
        ids = torch.tensor([[*prompt, *new]])
        scores = processors(case, prompt)(ids, logits[None].clone())[0]
        kept = scores > -torch.inf
        cases.append(
            {
                "settings": case,
                "logits": logits.tolist(),
                "prompt": prompt,
                "new": new,
                "kept": kept.nonzero()[:, 0].tolist(),
                "logprobs": torch.log_softmax(scores, -1)[kept].tolist(),
            }
        )
    file = Path(__file__).resolve().parents[1] / "tests" / "golden" / "sampling.json"
    lines = ",\n".join(json.dumps(case) for case in cases)
    file.write_text(
        f'{{"transformers": "{transformers.__version__}", "ends": {ENDS}, "cases": [\n{lines}\n]}}\n'
    )


if __name__ == "__main__":
    main()
