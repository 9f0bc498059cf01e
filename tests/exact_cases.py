"""What tests of exactness share: models and prompts, a policy of random plans, what the oracle says."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import bits, random_model

import layerscope_jax
from layerscope_jax import Engine, ExpertId, LayerPlan, Model, load
from layerscope_jax.models.rotary import PAD_POSITION

SHIPPED = Path(layerscope_jax.__file__).parent / "shipped"
SENTENCES = ["Once upon a time there was", "def main():"]


EVEN = {
    "hidden_size": 64,
    "head_dim": 32,
    "vocab_size": 96,
    "moe_intermediate_size": 32,
    "qk_norm": "none",
    "attention_bias": True,
    "sliding_window": 5,
}
"""A shape of whole vectors, with no rest."""


class RandomPolicy:
    """Valid plans, good and absurd ones alike: drops what it needs next, fetches what it has just dropped.

    Args:
        seed: a plan is a function of it, the step, the layer and what is seen.
        device: how likely an active expert is computed on the device, where there is room.
        restless: how likely a resident expert leaves.
        ahead: how much of the room left is used to prefetch, for any layer.
    """

    name = "random"
    uses_costs = False

    def __init__(self, seed=0, device=0.5, restless=0.3, ahead=0.7):
        self.seed, self.device, self.restless, self.ahead = seed, device, restless, ahead

    def init(self, geometry, profile):
        return geometry

    def plan(self, geometry, seen):
        rng = np.random.default_rng((self.seed, seen.step, seen.layer))

        def some(experts, share):
            return [expert for expert in sorted(experts) if rng.random() < share]

        active = {ExpertId(seen.layer, expert) for expert in seen.demand}
        coming, resident = set(seen.in_flight), set(seen.resident)
        chosen = set(some(active, self.device))
        evict = some(resident - chosen, self.restless)
        room = geometry.slots - len(resident) - len(coming) + len(evict)
        load = rng.permutation(len(missing := sorted(chosen - resident - coming)))[:room].tolist()
        load = [missing[index] for index in load]
        room -= len(load)
        device = (chosen & (resident | coming)) | set(load)
        every = {ExpertId(x, e) for x in range(geometry.num_layers) for e in range(geometry.num_experts)}
        absent = sorted(every - (resident - set(evict)) - coming - set(load))
        ahead = rng.permutation(len(absent))[: int(room * self.ahead)].tolist()
        return geometry, LayerPlan(
            step=seen.step,
            layer=seen.layer,
            device=tuple(rng.permutation(sorted(e.expert for e in device)).tolist()),
            host=tuple(rng.permutation(sorted(e.expert for e in active - device)).tolist()),
            evict=tuple(evict),
            load=tuple(load),
            prefetch=tuple(absent[index] for index in ahead),
        )


class Case(NamedTuple):
    """A model and what it is asked."""

    model: Model
    batches: list[list[list[int]]]
    steps: int


def prompts(rng, vocabulary, *sizes):
    return [rng.integers(0, vocabulary, size).tolist() for size in sizes]


@lru_cache
def case(name):
    rng = np.random.default_rng(5)
    if name == "float32":  # many experts: all sizes of dispatches
        model = random_model(
            num_experts=20,
            experts_per_token=4,
            num_layers=2,
            tie_embeddings=True,
            qk_norm="all",
            qkv_clip=0.5,
        )
        batches = [prompts(rng, 61, 1, 6, 3, 4, 2), prompts(rng, 61, 2, 4, 1, 3, 8, 5, 2, 1)]
        return Case(model, batches, 5)
    if name == "bfloat16":
        model = random_model(dtype=jnp.bfloat16, seed=1, **EVEN)
        return Case(model, [prompts(rng, 61, 3, 11), prompts(rng, 61, 16, 1)], 6)
    if name == "shipped":
        model = load(SHIPPED)
        return Case(model, [[model.tokenizer.encode(text).ids for text in SENTENCES]], 2)
    # Experts with more rows than the largest bucket, one choice a token, up to the end of the context.
    model = random_model(
        num_experts=3, experts_per_token=1, num_layers=2, seed=2, max_position_embeddings=193
    )
    return Case(model, [prompts(rng, 61, 190, 170)], 3)


def tap(engine):
    """Every step's logits, rows that are still generating alone; kept in the list that is returned."""
    logits, step = [], engine.runner.step

    def tapped(tokens, positions, last, caches, sampling):
        found = step(tokens, positions, last, caches, sampling)
        active = positions[np.arange(len(last)), last] != PAD_POSITION
        logits.append(np.asarray(found[1])[active])
        return found

    engine.runner.step = tapped
    return logits


def run(engine, batches, steps):
    """Tokens and logits of every batch, one call each."""
    logits = tap(engine)
    tokens = [engine.generate(batch, max_new_tokens=steps).token_ids for batch in batches]
    return tokens, logits


def oracle(name):
    return computed(name, jax.config.values["jax_disable_most_optimizations"])


@lru_cache
def computed(name, quickly):
    """Tokens and logits of programs that were compiled in one of the ways of `quick_compiling`."""
    model, batches, steps = case(name)
    with Engine(model) as engine:
        tokens, logits = run(engine, batches, steps)
    assert len(logits) == len(batches) * steps
    return tokens, logits


def place(engine, experts):
    """Puts experts on the device before the first step."""
    residency, transfers = engine.runner.residency, engine.runner.transfers
    for expert in experts[: residency.slots]:
        residency.reserve(expert, prefetched=False)
        copied = jax.device_put(engine.model.bank[expert], transfers.sharding)
        residency.arrive(expert, engine.runner.device_experts.keep(copied, expert))


def agree(found, expected):
    (tokens, logits), (expected_tokens, expected_logits) = found, expected
    assert len(logits) == len(expected_logits)
    for step, (here, there) in enumerate(zip(logits, expected_logits, strict=True)):
        assert np.isfinite(there).all()
        np.testing.assert_array_equal(bits(here), bits(there), err_msg=f"logits of step {step}")
    assert tokens == expected_tokens
