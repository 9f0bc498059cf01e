"""Latent attention with keys and values that are made, and without: the same in other sums."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import TINY

from layerscope_jax.models import latent_attention
from layerscope_jax.models.config import LatentSizes
from layerscope_jax.models.latent_attention import LatentAttention, LatentCache
from layerscope_jax.models.rotary import PAD_POSITION

pytestmark = pytest.mark.usefixtures("quick_compiles")

SIZES = LatentSizes(query_rank=None, rank=16, nope=6, rope=4, value=5)


@pytest.mark.parametrize("cached", [False, True])
def test_both_forms_compute_the_same(monkeypatch, cached):
    config = dataclasses.replace(TINY, attention="latent", latent=SIZES)
    layer = LatentAttention(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    for part in (layer.q, layer.kv_down, layer.key_up, layer.value_up):  # so that tokens attend unevenly
        value = part.weight if hasattr(part, "weight") else part
        value[...] = 20 * value[...]
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 7, config.hidden_size)).astype(np.float32)
    starts = np.array([[2], [0]]) * cached
    positions = starts + np.arange(7)[None]
    positions[1, 5:] = PAD_POSITION
    cache = LatentCache(rng.standard_normal((2, 12, 20)).astype(np.float32)) if cached else None
    results = []
    for pays in (False, True):
        monkeypatch.setattr(latent_attention, "expanding_pays", lambda *_, pays=pays: pays)
        computed = jax.jit(lambda *inputs: layer(*inputs))  # one program instead of one an operation
        results.append(jax.tree.map(np.asarray, computed(hidden, positions.astype(np.int32), cache)))
    (absorbed, kept), (expanded, kept_too) = results
    there = positions != PAD_POSITION
    assert np.abs(absorbed[there]).max() > 0.1
    np.testing.assert_allclose(expanded[there], absorbed[there], rtol=0, atol=2e-5)
    if cached:
        np.testing.assert_array_equal(kept.rows, kept_too.rows)
