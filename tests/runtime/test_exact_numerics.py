"""numerics="exact": no bit of a request's logits depends on what shares its batch, its slot or its chunks."""

from dataclasses import replace
from functools import lru_cache
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, bits, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.generation.requests import Request
from layerscope_jax.generation.row_settings import RowSettings
from layerscope_jax.models.config import DeltaSizes, LatentSizes
from layerscope_jax.models.experts import ExpertBody

BASE = replace(TINY, num_layers=1, max_position_embeddings=128)

KINDS = {
    "float32, grouped attention with a rest": {"qk_norm": "all", "tie_embeddings": True},
    "bfloat16, sinks, a window, clamped experts": {
        "attention_sinks": True,
        "attention_bias": True,
        "sliding_window": 24,
        "qk_norm": "none",
        "expert_body": ExpertBody("clamped", bias=True, limit=0.7),
    },
    "float32, latent attention, a shared expert": {
        "attention": "latent",
        "latent": LatentSizes(query_rank=None, rank=24, rope=8, nope=16, value=12),
        "rotary_dim": 8,
        "num_kv_heads": 4,
        "qk_norm": "none",
        "shared_intermediate_size": 24,
    },
    # Values that fill no register: XLA computes what the other test of its kind leaves to the package's loop.
    "bfloat16, gated DeltaNet before gated attention": {
        "num_layers": 2,
        "delta": DeltaSizes(key_heads=2, value_heads=4, key=8, value=12, taps=4),
        "full_attention_layers": (1,),
        "attention_gate": True,
        "norm": "rms_offset",
        "shared_intermediate_size": 24,
        "shared_gate": True,
    },
}

KINDS["float32, experts in int4"] = {"hidden_size": 64, "moe_intermediate_size": 32}
FORMATS = {"float32, experts in int4": "int4"}

RESTS = "float32, grouped attention with a rest"
FEW = settings.get_current_profile_name() == "default"
"""Whether companions are always as many and as long, so that few programs are compiled. Otherwise
(`--hypothesis-profile thorough`) they are drawn, and each example takes seconds."""

NEW = 4
"""New tokens of the request that is looked at."""


def prompt_of(length, seed=0):
    return np.random.default_rng((length, seed)).integers(1, 61, length).tolist()


def request_of(length):
    """Short ones are sampled, long ones greedy."""
    return Request(
        prompt=prompt_of(length),
        max_new_tokens=NEW,
        stop_token_ids=[],
        temperature=float(length < 64),
        seed=3,
        top_k=20,
    )


REQUESTS = {kind: request_of(length) for kind, length in zip(KINDS, (13, 13, 70, 70, 13), strict=True)}
"""What is looked at: some are prefilled in two steps."""


def run(model, request, before=(), late=(), seed=0, **config):
    """Tokens and logits of a request; some companions are there before it, others come after two tokens."""
    logits, pick = {}, RowSettings.pick

    def seen(settings, found, step_logits, positions):
        for row, state in settings._running.items():
            if state.prompt == list(request.prompt):
                source = row if settings._sources is None else settings._sources[row]
                logits[len(state.tokens)] = bits(step_logits[source])
        return pick(settings, found, step_logits, positions)

    def companions(lengths):
        return [
            engine.submit(
                prompt_of(length, seed + number),
                max_new_tokens=1 + length % 7,
                stop_token_ids=[],
                temperature=float(number % 2),
                logprobs=1 if length == 3 else None,  # then another program picks all tokens of the batch
            )
            for number, length in enumerate(lengths, 1)
        ]

    config = OffloadConfig(numerics="exact", **config)
    with patch.object(RowSettings, "pick", seen), Engine(model, config) as engine:
        others = companions(before)
        handle = engine.submit(request)
        tokens = iter(handle)
        next(tokens), next(tokens)
        others += companions(late)
        result = handle.result()
        for other in others:
            assert other.result().finish_reason == "length"
    return result.token_ids, np.stack([logits[number] for number in range(NEW)])


def alone(kind):
    """A model, a request, and its tokens and logits alone: what the model computes in one jit."""
    dtype = jnp.dtype(kind.partition(",")[0])
    model, request = random_model(replace(BASE, **KINDS[kind]), seed=5, dtype=dtype), REQUESTS[kind]
    model = model.prepared(FORMATS.get(kind), None)
    tokens, logits = run(model, request)
    if kind in FORMATS:
        return model, request, tokens, logits
    padded = np.zeros((1, 80), np.int32)
    padded[0, : len(request.prompt)] = request.prompt
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    whole = jax.jit(lambda tokens: model.whole()(tokens)[0], compiler_options=options)(padded)
    tolerance = 1e-4 if kind.startswith("float32") else 0.1
    expected = whole[0, len(request.prompt) - 1]
    np.testing.assert_allclose(logits[0].view(np.float32), expected, rtol=0, atol=tolerance)
    return model, request, tokens, logits


@lru_cache
def alone_quickly(kind):
    return alone(kind)


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != RESTS])
@given(
    seed=st.integers(0, 2**16),
    before=st.permutations([3, 30]) if FEW else st.lists(st.sampled_from([3, 13, 30]), max_size=3),
    late=st.just([3]) if FEW else st.lists(st.sampled_from([3, 30]), max_size=2),
    offloaded=st.booleans(),
    prefix_cache=st.booleans(),
)
@settings(deadline=None, max_examples=4 if FEW else settings().max_examples)
def test_companions_change_no_bit(kind, seed, before, late, offloaded, prefix_cache):
    """Neither where everything is resident nor where experts come and go."""
    model, request, expected, expected_logits = alone_quickly(kind)
    tokens, logits = run(
        model,
        request,
        before,
        late,
        seed,
        max_num_seqs=4,
        prefill_chunk_size=64,
        device_budget=9 * model.bank.expert_bytes if offloaded else None,
        policy="lru" if offloaded else "auto",
        prefix_cache=prefix_cache,
    )
    np.testing.assert_array_equal(logits, expected_logits)
    assert tokens == expected


def test_nor_do_they_in_programs_that_xla_optimises():
    """Where XLA would give sums over few or many rows to different loops, were it not told otherwise."""
    model, request, expected, expected_logits = alone(RESTS)
    tokens, logits = run(model, request, before=[30])
    np.testing.assert_array_equal(logits, expected_logits)
    assert tokens == expected


def test_where_it_cannot_be_promised_it_is_refused():
    half = random_model(num_layers=1, dtype=jnp.float16)
    with pytest.raises(ValueError, match="numerics='exact': experts in float16 with activations in float16"):
        Engine(half, OffloadConfig(numerics="exact"))
    with pytest.raises(ValueError, match="prefill_chunk_size must be a multiple of 32 with numerics='exact'"):
        OffloadConfig(numerics="exact", prefill_chunk_size=100)
