"""SiLU of sums of tiles: what the definition says, of any size, and the same bits in any company."""

import numpy as np
import pytest
from numba import njit

from layerscope_jax.kernels import tiles
from layerscope_jax.kernels.tile_activations import gate_all, gate_tile

pytestmark = pytest.mark.skipif(not tiles.available(), reason="needs AMX")


@njit
def all_of(gates, ups):
    gate_all(gates.ctypes.data, ups.ctypes.data, gates.size // 16)


@njit
def tile_of(gates, ups, to):
    gate_tile(gates.ctypes.data, ups.ctypes.data, gates.strides[0], len(gates) // 2, to.ctypes.data)


def sums():
    """Rows of 16 tokens: around zero, where exponents end, and what comes to less than a normal number."""
    rng = np.random.default_rng(0)
    gates = rng.standard_normal((64, 16)).astype(np.float32) * 10.0 ** rng.integers(-3, 3, (64, 16))
    gates[0] = np.linspace(-120, 120, 16)
    gates[1], gates[2, :4] = 1.278, [0.0, -0.0, 87.4, -87.4]
    ups = rng.standard_normal((64, 16)).astype(np.float32)
    ups[1] = 2.0 ** np.arange(-132, -116)
    return np.float32(gates), np.float32(ups)


def test_they_are_what_the_definition_says():
    gates, ups = sums()
    found = gates.copy()
    all_of(found, ups)
    expected = np.float64(gates) / (1 + np.exp(-np.float64(gates))) * ups
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-34)


def test_tiles_have_the_same_bits():
    gates, ups = sums()
    found, tile = gates.copy(), np.zeros((32, 16, 2), np.uint16)
    all_of(found, ups)
    tile_of(gates, ups, tile)
    bits = found.view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(tile.transpose(0, 2, 1).reshape(64, 16), nearest)


def test_what_is_no_number_stays_none():
    gates, ups = np.full((2, 16), np.nan, np.float32), np.ones((2, 16), np.float32)
    all_of(gates, ups)
    assert np.isnan(gates).all()
