"""Every family computes what Hugging Face transformers computes from the same checkpoint."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layerscope_jax.checkpoints.model import load
from layerscope_jax.models import FAMILIES
from layerscope_jax.models.cache import new_caches
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.rotary import PAD_POSITION

pytestmark = pytest.mark.usefixtures("quick_compiles")

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(file.parent.name for file in GOLDEN.glob("*/golden.npz"))
TOLERANCE = 1e-4  # rounding in float32 alone moves these logits by up to 5e-5


DECODING = ("qwen3_5_moe",)
"""The case whose caches are used in one program: of keys and values, and with states. The engine's tests use
those of latent attention."""

take = partial(np.take_along_axis, axis=-1)


class Case(NamedTuple):
    """What transformers says (`golden.npz`), and what we compute, each compiled once."""

    config: ModelConfig
    golden: dict[str, np.ndarray]
    forward: Callable  # tokens, positions -> logits, routings
    greedy: Callable  # tokens, positions -> tokens [B, steps]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    model = load(GOLDEN / request.param)
    golden = dict(np.load(GOLDEN / request.param / "golden.npz"))
    graphdef, state = nnx.split(model.whole())
    params = nnx.to_pure_dict(state)
    forward = jax.jit(lambda params, *inputs: nnx.merge(graphdef, params)(*inputs))
    steps = golden["greedy"].shape[1]
    generate = jax.jit(lambda params, *inputs: greedy(nnx.merge(graphdef, params), *inputs, steps))
    return Case(model.config, golden, partial(forward, params), partial(generate, params))


def batch(golden, side):
    """Tokens [B, S], their positions, and the logits to expect; padded on the given side."""
    if side == "left":
        real = golden["left_mask"]
        return golden["left_tokens"], positions_of(real), golden["left_logits"]
    real = np.arange(golden["tokens"].shape[1])[None] < golden["lengths"][:, None]
    return golden["tokens"], positions_of(real), golden["logits"]


def positions_of(real):
    return np.where(real, np.cumsum(real, axis=1) - 1, PAD_POSITION).astype(np.int32)


def test_every_family_has_a_case():
    assert {json.loads((GOLDEN / case / "config.json").read_text())["model_type"] for case in CASES} == {
        *FAMILIES
    }


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_agree_for_a_padded_ragged_batch(case, side):
    tokens, positions, expected = batch(case.golden, side)
    logits, _ = case.forward(tokens, positions)
    real = positions < PAD_POSITION
    np.testing.assert_allclose(np.asarray(logits)[real], expected[real], rtol=0, atol=TOLERANCE)


def test_every_token_chooses_the_same_experts_with_the_same_weights(case):
    golden = case.golden
    tokens, positions, _ = batch(golden, "right")
    _, routings = case.forward(tokens, positions)
    real, scale = positions < PAD_POSITION, case.config.residual_scale
    assert len(routings) == len(golden["router_experts"])
    for layer, routing in enumerate(routings):
        experts, weights, logits = (np.asarray(part).reshape(*tokens.shape, -1)[real] for part in routing)
        order, expected = experts.argsort(-1), golden["router_experts"][layer][real]
        of_expected = expected.argsort(-1)  # some of transformers' routers do not sort
        np.testing.assert_array_equal(*(take(experts, order), take(expected, of_expected)))
        known = take(golden["router_weights"][layer][real], of_expected)
        np.testing.assert_allclose(take(weights, order) / scale, known, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(logits, golden["router_logits"][layer][real], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", DECODING, indirect=True)
def test_greedy_tokens_agree_decoding_from_a_cache(case):
    """Those of one program, padded left; `tests/runtime/test_families.py` compares the engine's."""
    tokens, positions, _ = batch(case.golden, "left")
    np.testing.assert_array_equal(case.greedy(tokens, positions), case.golden["greedy"])


def greedy(decoder, tokens, positions, steps):
    """Continues each row by `steps` tokens [B, steps]: a prefill, then one token a step from the cache."""
    config = decoder.config
    rows, length = tokens.shape
    caches = new_caches(config, rows, length + steps, np.dtype(np.float32), jax.devices()[0])
    hidden, _, caches = decoder.run(decoder.embed(tokens), positions, caches)
    real = positions < PAD_POSITION
    last = jnp.argmax(jnp.where(real, positions, -1), axis=1)
    first = jnp.argmax(decoder.logits(hidden[jnp.arange(rows), last]), axis=-1)

    def step(carry, _):
        token, position, caches = carry
        hidden, _, caches = decoder.run(decoder.embed(token[:, None]), position[:, None], caches)
        following = jnp.argmax(decoder.logits(hidden[:, 0]), axis=-1)
        return (following, position + 1, caches), token

    return jax.lax.scan(step, (first, real.sum(1), caches), length=steps)[1].T
