"""Hugging Face transformers as a peer, in a process of its own: it may have an interpreter of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXPERTS = ("eager", "grouped_mm", "batched_mm")
"""transformers' ways of computing experts. `batched_mm` copies the weights of every (token, choice) pair:
hopeless but in decoding a single prompt, and raced only there."""


def find_python(given: Path | None) -> Path | None:
    """The interpreter to run transformers in; None if there is none with torch and transformers."""
    if given is not None:
        return given
    here = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    return Path(sys.executable) if here else None


class HFPeer:
    """A model folder, loaded by transformers in another process that waits for work.

    Args:
        python: its interpreter.
        folder: the checkpoint.
        threads: for torch.

    Attributes:
        versions: of torch and transformers there.

    Raises:
        ValueError: if the process ends; what it said is on stderr.
    """

    def __init__(self, python: Path, folder: Path, threads: int):
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [str(python), __file__, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.versions: dict[str, str] = self._answer()

    def run(
        self, prompts: Sequence[Sequence[int]], forced: Sequence[Sequence[int]], experts: str
    ) -> dict[str, Any]:
        """Reads the prompts, then `forced` token by token, and picks the likeliest token each time.

        Returns:
            "prefill" seconds, "decode" seconds a step, and the picked "tokens" [B][N].
        """
        assert self._process.stdin is not None
        print(
            json.dumps({"prompts": prompts, "forced": forced, "experts": experts}),
            file=self._process.stdin,
            flush=True,
        )
        return self._answer()

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()

    def __enter__(self) -> HFPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"the process that runs transformers ended with code {self._process.wait()}")
        return json.loads(line)


def serve(folder: str, threads: int) -> None:
    """The other process: JSON lines in, JSON lines out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()

    def run(prompts: list, forced: list, experts: str) -> dict[str, Any]:
        # The prefill before a race of decoding is not timed: any implementation will do.
        model.set_experts_implementation("grouped_mm" if experts == "batched_mm" else experts)
        inputs, given = torch.tensor(prompts), torch.tensor(forced)
        picked = []
        with torch.inference_mode():
            began = time.perf_counter()
            out = model(inputs, use_cache=True, logits_to_keep=1)
            picked.append(out.logits[:, -1].argmax(-1).tolist())
            prefill = time.perf_counter() - began
            model.set_experts_implementation(experts)
            began = time.perf_counter()
            for step in range(given.shape[1] - 1):
                out = model(given[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
                picked.append(out.logits[:, -1].argmax(-1).tolist())
            decode = time.perf_counter() - began
        tokens = [list(row) for row in zip(*picked, strict=True)]
        return {"prefill": prefill, "decode": decode / (given.shape[1] - 1), "tokens": tokens}

    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), file=answers)
    answers.flush()
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers)
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
