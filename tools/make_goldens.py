"""Write the golden values: tiny, randomly initialised HF transformers models and what they compute.

    python tools/make_goldens.py [case ...]

Needs torch and transformers; the tests only read what it wrote, so they need neither.
README.md lists what each folder holds.
"""

import argparse
import copy
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")
try:
    import torch
    import transformers
    from golden_cases import CASES, SHARED
    from golden_mixed_cases import MIXED_CASES
    from rotary_cases import ROTARY
    from safetensors import safe_open
except ImportError as error:
    sys.exit(
        f"make_goldens.py needs torch, transformers and safetensors ({error}).\n"
        "The goldens are committed: only making them anew needs these packages, e.g. in an environment\n"
        "of their own: pip install torch==2.13.0 transformers"
    )

CASES |= MIXED_CASES
ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (5, 17, 9, 24)
NEW_TOKENS = 64
LEFT_RIGHT_TOLERANCE = 1e-4
MIN_GREEDY_MARGIN = 1e-3  # between the two best logits of each greedy step
MIN_DISTINCT = 16  # tokens among those of a greedy continuation
MIN_ROUTER_MARGIN = 1e-4  # between the logits of the last chosen expert and of the first one left out
MAX_BFLOAT16_DIFFERENCE = 0.06  # more of it are other experts than rounding
NEXT_SEED = 1000


def folder_of(name):
    return ROOT / CASES[name].get("folder", f"tests/golden/{name}")


class UnsuitableSeed(Exception):
    """These weights make a choice too close to call, so that others could rightly differ, leave an expert
    idle, or give a dull text."""


def load(folder, **overrides):
    """The model of a folder, with every eager code path, in f32."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if (text := config.get_text_config()) is not config:  # to which no override would come
        for key, value in overrides.items():
            setattr(text, key, value)
        overrides = {"config": config}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        **overrides,
    )
    assert not any(info.values()), info
    assert model.config._attn_implementation == "eager"
    assert model.config._experts_implementation == "eager"
    return model.eval()


def save_random_model(case, folder, seed):
    torch.manual_seed(seed)
    config, kind = SHARED | case["config"], transformers.AutoModelForCausalLM
    if "beside" in case:
        config, kind = {"text_config": config} | case["beside"], transformers.AutoModelForImageTextToText
    model = kind.from_config(case["class"](**config), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and not name.endswith(".bias"):
                middle = parameter.mean().item()  # 1, or 0 where scales are stored less one
                parameter.uniform_(middle - 0.6, middle + 0.6)
                if "q_norm" in name:
                    parameter *= case.get("query_scale", 1.0)
            elif name.endswith("correction_bias"):
                parameter.normal_(0.0, 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            elif name.endswith("sinks"):
                parameter.normal_(0.0, 1.0)
            elif name.endswith(("router.scale", "per_expert_scale")):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("A_log"):  # the class's own forget most of the state at every token
                parameter.uniform_(-5.0, 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(0.0, 0.1)
            elif name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=case.get("max_shard_size", "1GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)


def make_batch(vocab_size, seed):
    """The same ragged batch padded on the right and on the left: tokens, masks, positions."""
    rows = np.random.default_rng(seed).integers(0, vocab_size, (len(LENGTHS), max(LENGTHS)))
    width = max(LENGTHS)
    right = np.zeros((len(LENGTHS), width), np.int64)
    left = np.zeros_like(right)
    for b, length in enumerate(LENGTHS):
        right[b, :length] = rows[b, :length]
        left[b, width - length :] = rows[b, :length]
    right_mask = np.arange(width)[None] < np.array(LENGTHS)[:, None]
    left_mask = right_mask[:, ::-1].copy()
    return right, right_mask, left, left_mask


def positions_of(mask):
    return torch.from_numpy(np.maximum(np.cumsum(mask, axis=1) - 1, 0))


def routers(model):
    """The router of each layer that has one, with the number of the layer."""
    for number, layer in enumerate(getattr(model.model, "language_model", model.model).layers):
        moe = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
        router = getattr(moe, "gate", None) or getattr(moe, "router", None) or getattr(layer, "router", None)
        if router is not None:
            yield number, router


@torch.no_grad()
def forward(model, tokens, mask):
    """Logits, zero at pads, and of each router: logits [L, B, S, E], weights and experts [L, B, S, K]."""
    seen, logits, hooks = [], [], []
    for _, router in routers(model):
        hooks.append(router.register_forward_hook(lambda _module, _in, out: seen.append(out)))
        if hasattr(router, "proj"):  # it returns probabilities
            hooks.append(router.proj.register_forward_hook(lambda _module, _in, out: logits.append(out)))
    output = model(
        input_ids=torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        position_ids=positions_of(mask),
        use_cache=False,
    )
    for hook in hooks:
        hook.remove()
    router = [
        torch.stack([one[part] for one in seen]).reshape(len(seen), *mask.shape, -1).numpy()
        for part in range(3)
    ]
    if logits:
        router[0] = torch.stack(logits).reshape(router[0].shape).numpy()
    return np.where(mask[..., None], output.logits.numpy(), 0.0).astype(np.float32), *router


@torch.no_grad()
def bfloat16_difference(model, tokens, mask, logits):
    """How far bfloat16 alone moves logits, on average, in their standard deviations."""
    output = copy.deepcopy(model).to(torch.bfloat16)(
        input_ids=torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        position_ids=positions_of(mask),
        use_cache=False,
    )
    return np.abs(output.logits.float().numpy() - logits)[mask].mean() / logits[mask].std()


@torch.no_grad()
def greedy(model, prompt, cached):
    """NEW_TOKENS tokens after a prompt, and the gap between the two best logits at each of them."""
    sequence = torch.from_numpy(prompt)[None]
    tokens, margins, cache, fed = [], [], None, sequence
    for _ in range(NEW_TOKENS):
        output = model(input_ids=fed, past_key_values=cache, use_cache=cached)
        best = torch.topk(output.logits[0, -1], 2)
        tokens.append(best.indices[0].item())
        margins.append((best.values[0] - best.values[1]).item())
        sequence = torch.cat([sequence, best.indices[:1][None]], dim=1)
        cache = output.past_key_values
        fed = sequence[:, -1:] if cached else sequence
    return np.array(tokens, np.int32), np.array(margins, np.float32)


def router_margin(model, router_logits):
    """How far the last chosen expert, and group, is from the first one left out, at the least."""
    config = model.config.get_text_config()
    top_k = getattr(config, "num_experts_per_tok", None) or config.top_k_experts
    scores = router_logits
    biases = [b for name, b in model.state_dict().items() if name.endswith("correction_bias")]
    if biases:
        scores = 1 / (1 + np.exp(-scores))
        if config.model_type == "ernie4_5_moe":
            scores = np.exp(router_logits) / np.exp(router_logits).sum(-1, keepdims=True)
        scores = scores + np.stack([b.numpy().reshape(-1) for b in biases])[:, None, None]
    margins = []
    if (getattr(config, "n_group", None) or 1) > 1:
        grouped = np.sort(scores.reshape(*scores.shape[:-1], config.n_group, -1), axis=-1)
        of_groups = grouped[..., -2:].sum(-1) if biases else grouped[..., -1]
        ordered = np.sort(of_groups, axis=-1)[..., ::-1]
        margins.append((ordered[..., config.topk_group - 1] - ordered[..., config.topk_group]).min())
        kept = of_groups >= ordered[..., config.topk_group - 1, None]
        inside = np.repeat(kept, scores.shape[-1] // config.n_group, axis=-1)
        scores = np.where(inside, scores, -1e3)
    ordered = np.sort(scores, axis=-1)[..., ::-1]
    return min(*margins, (ordered[..., top_k - 1] - ordered[..., top_k]).min(), 1)


def check_clipping(model, tokens, mask):
    """Each of q, k and v must be clipped at some places and not at others."""
    clip = model.config.clip_qkv
    fractions = []

    def record(_module, _inputs, output):
        fractions.append((output.abs() > clip).float().mean().item())

    hooks = []
    for layer in model.model.layers:
        for module in (layer.self_attn.q_norm, layer.self_attn.k_norm, layer.self_attn.v_proj):
            hooks.append(module.register_forward_hook(record))
    forward(model, tokens, mask)
    for hook in hooks:
        hook.remove()
    assert min(fractions) > 0.02, fractions
    assert max(fractions) < 0.6, fractions


def check_sharding(folder):
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards_of = {}
    for name, shard in weight_map.items():
        if ".experts." in name:
            shards_of.setdefault(name.rsplit(".", 2)[0], set()).add(shard)
    split = sum(len(shards) > 1 for shards in shards_of.values())
    assert split, "no expert has its matrices in different shards"
    return split


def check_window(folder, logits, tokens, mask, window):
    """Without the window the first `window` positions stay the same, and the next one changes."""
    free, *_ = forward(load(folder, sliding_window=None), tokens, mask)
    change = np.abs(free - logits).max(axis=-1)
    assert change[:, :window].max() < 1e-5, change
    assert (change[:, window] > 1e-3)[np.array(LENGTHS) > window].all(), change


def compute(name, case, seed):
    folder = folder_of(name)
    save_random_model(case, folder, seed)
    model = load(folder)  # from the files, so that the goldens are of what was saved
    config = model.config.get_text_config()
    tokens, mask, left_tokens, left_mask = make_batch(config.vocab_size, seed)

    logits, router_logits, weights, experts = forward(model, tokens, mask)
    left_logits, *_ = forward(model, left_tokens, left_mask)
    apart = np.abs(logits[mask] - left_logits[left_mask]).max()
    assert apart < LEFT_RIGHT_TOLERANCE, f"left and right padding differ by {apart}"

    apart_in_bfloat16 = bfloat16_difference(model, tokens, mask, logits)
    if apart_in_bfloat16 > MAX_BFLOAT16_DIFFERENCE:
        raise UnsuitableSeed(f"bfloat16 moves logits by {apart_in_bfloat16:.3f}")

    continuations, margins = [], []
    for b, length in enumerate(LENGTHS):
        with_cache, margin = greedy(model, tokens[b, :length], cached=True)
        without_cache, _ = greedy(model, tokens[b, :length], cached=False)
        if margin.min() <= MIN_GREEDY_MARGIN:
            raise UnsuitableSeed(f"greedy margin {margin.min():.1e}")
        if len(set(with_cache.tolist())) < MIN_DISTINCT:
            raise UnsuitableSeed(f"only {len(set(with_cache.tolist()))} tokens in a continuation")
        assert (with_cache == without_cache).all(), f"row {b}: cached and uncached decoding differ"
        whole = np.concatenate([tokens[b, :length], with_cache])[None]
        _, whole_router_logits, _, _ = forward(model, whole, np.ones_like(whole, bool))
        gap = router_margin(model, whole_router_logits)
        if gap <= MIN_ROUTER_MARGIN:
            raise UnsuitableSeed(f"router margin {gap:.1e}")
        continuations.append(with_cache)
        margins.append(margin)
    continuations, margins = np.stack(continuations), np.stack(margins)

    routed = case.get("moe_layers", range(config.num_hidden_layers))
    gates = [number for number, _ in routers(model)]
    assert gates == list(routed), gates
    # No expert is idle, none is always chosen, the weights are not nearly one-hot, the logits are spread.
    load_of_experts = np.array([np.bincount(layer[mask].ravel(), minlength=8) for layer in experts])
    if not load_of_experts.all():
        raise UnsuitableSeed(f"idle experts {load_of_experts.tolist()}")
    spread = weights[:, mask].min(axis=-1).mean(), logits[mask].std()
    if load_of_experts.max() >= 0.9 * mask.sum() or spread[0] <= 0.02 or spread[1] <= 1.0:
        raise UnsuitableSeed(f"loads {load_of_experts.tolist()}, weights and logits spread by {spread}")

    for change in case["must_matter"]:
        changed, *_ = forward(load(folder, **change), tokens, mask)
        assert np.abs(changed - logits).max() > 1e-2, f"{change} changes nothing"
    if getattr(config, "clip_qkv", None) is not None:
        check_clipping(model, tokens, mask)
    if getattr(config, "sliding_window", None) and config.model_type in ("mixtral", "qwen3_moe"):
        check_window(folder, logits, tokens, mask, config.sliding_window)
    if "max_shard_size" in case:
        print(f"{name}: {check_sharding(folder)} experts have their matrices in several shards")

    at_pad = ~mask[None, ..., None]
    np.savez_compressed(
        folder / "golden.npz",
        tokens=tokens.astype(np.int32),
        lengths=np.array(LENGTHS, np.int32),
        logits=logits,
        left_tokens=left_tokens.astype(np.int32),
        left_mask=left_mask,
        left_logits=left_logits,
        greedy=continuations,
        greedy_margin=margins,
        router_logits=np.where(at_pad, 0.0, router_logits).astype(np.float32),
        router_experts=np.where(at_pad, -1, experts).astype(np.int32),
        router_weights=np.where(at_pad, 0.0, weights).astype(np.float32),
    )
    return {
        "seed": seed,
        "min_greedy_margin": round(float(margins.min()), 5),
        "left_right_difference": float(f"{apart:.1e}"),
        "logits_std": round(float(logits[mask].std()), 3),
    }


def rotary():
    """Frequencies and factors of each kind of scaled rotary embedding, into `rotary.json`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    records = []
    for settings in ROTARY:
        parameters = {"rope_theta": 10000.0, **settings["rope_parameters"]}
        config = transformers.MixtralConfig(
            hidden_size=64,
            num_attention_heads=4,
            head_dim=16,
            max_position_embeddings=settings["max_position_embeddings"],
            rope_parameters=parameters,
        )
        init = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        for length in settings["lengths"]:
            frequencies, factor = init(config, "cpu", seq_len=length)
            records.append(
                {
                    "max_position_embeddings": settings["max_position_embeddings"],
                    "rope_parameters": parameters,
                    "length": length,
                    "frequencies": [float(f) for f in frequencies],
                    "factor": float(factor),
                }
            )
    (ROOT / "tests/golden/rotary.json").write_text(json.dumps(records, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; all by default")
    names = parser.parse_args().cases or ["rotary", *CASES]
    if "rotary" in names:
        rotary()
        names.remove("rotary")
    if unknown := set(names) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()

    for name in names:
        seed = CASES[name].get("seed", 1 + list(CASES).index(name))
        while True:
            try:
                record = compute(name, CASES[name], seed)
                break
            except UnsuitableSeed as reason:
                print(f"{name}: seed {seed} does not suit ({reason}), trying another")
                seed += NEXT_SEED
        folder = folder_of(name)
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        }
        (folder / "versions.json").write_text(json.dumps(versions | record, indent=2) + "\n")
        tensors = 0
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "np") as opened:
                tensors += len(opened.keys())
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: {size / 1000:.0f} KB, {tensors} tensors, {record}")
        assert size < 700_000, "too large to commit"


if __name__ == "__main__":
    main()
