"""Formats: the plain ones are what checkpoints hold, and what does not fit a format is refused in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_model

from layerscope_jax import ExpertBank
from layerscope_jax.formats import Buffer, ExpertFormat, format_named, plain_of, register_format
from layerscope_jax.models.experts import ExpertWeights, ffn

pytestmark = pytest.mark.usefixtures("quick_compiles")

NAMES = ("float32", "bfloat16", "float16")

exactly = jax.jit(ffn)


def matrices(dtype, width=6, hidden=4):
    rng = np.random.default_rng(0)
    return ExpertWeights(
        *(rng.standard_normal(shape).astype(dtype) for shape in [(hidden, width)] * 2 + [(width, hidden)])
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_format_is_the_matrices(name):
    plain, dtype = format_named(name), np.dtype(jnp.dtype(name))
    expert = matrices(dtype)
    assert plain_of(expert) == plain
    plain.check(expert)
    assert plain.sizes(expert) == (6, 4)
    assert plain.buffers(6, 4) == {
        field: Buffer(matrix.shape, dtype) for field, matrix in expert._asdict().items()
    }
    assert plain.expert_bytes(6, 4) == sum(matrix.nbytes for matrix in expert)
    for there, packed, unpacked in zip(expert, plain.pack(*expert), plain.unpack(expert), strict=True):
        np.testing.assert_array_equal(there, packed)
        assert unpacked.dtype == np.float32
        np.testing.assert_array_equal(there.astype(np.float32), unpacked)


@pytest.mark.parametrize("of_rows", NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_any_type_go_through_weights_of_any_other(name, of_rows):
    expert = ExpertWeights(*map(jnp.asarray, matrices(jnp.dtype(name))))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 6)), of_rows)
    found = jax.jit(format_named(name).ffn)(x, expert)
    assert (found.shape, found.dtype) == ((3, 6), x.dtype)
    wide = ExpertWeights(*(matrix.astype(jnp.float32) for matrix in expert))
    exact = np.asarray(exactly(x.astype(jnp.float32), wide))
    tolerance = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}
    error = np.abs(np.asarray(found, np.float32) - exact).max() / np.abs(exact).max()
    assert error < max(tolerance[of_rows], 1e-5)


def test_a_bank_is_converted_from_one_to_another():
    bank = random_model(num_layers=1, dtype=jnp.bfloat16).bank
    wide = bank.converted(format_named("float32"))
    assert (wide.format.name, wide.dtype, bank.dtype) == ("float32", bank.dtype, jnp.bfloat16)
    assert wide.expert_bytes == 2 * bank.expert_bytes
    for expert in bank:
        for matrix, other in zip(bank[expert], wide[expert], strict=True):
            assert other.sharding.memory_kind == "pinned_host"
            np.testing.assert_array_equal(np.asarray(matrix, np.float32), other)
    again = wide.converted(format_named("bfloat16"))
    np.testing.assert_array_equal(bank.layers[0][3].up, again.layers[0][3].up)


class Lying(ExpertFormat):
    """Packs other arrays than it says."""

    name, Expert = "lying", ExpertWeights
    buffers = lambda self, width, hidden: format_named("float16").buffers(width, hidden)  # noqa: E731
    sizes = lambda self, expert: expert.gate.shape[::-1]  # noqa: E731
    pack = lambda self, *matrices: ExpertWeights(*matrices)  # noqa: E731
    unpack = lambda self, expert: expert  # noqa: E731
    ffn = lambda self, x, expert: x  # noqa: E731


def test_what_does_not_fit_is_refused():
    bank = random_model(num_layers=1).bank
    with pytest.raises(ValueError, match=r"in the format 'lying' is gate float16\[20, 32\], .* got float32"):
        bank.converted(Lying())
    with pytest.raises(ValueError, match="expected an expert in the format 'lying', got float32"):
        Lying().check((np.zeros((2, 2), np.float32),))
    with pytest.raises(ValueError, match="of one dtype, bfloat16, got float32"):
        format_named("bfloat16").check(bank.layers[0][0])
    with pytest.raises(ValueError, match="in the format 'lying' needs dtype="):
        ExpertBank(bank.layers, Lying())


def test_what_is_no_format_is_not_registered():
    with pytest.raises(ValueError, match="takes an ExpertFormat"):
        register_format("float8")
    nameless = Lying()
    nameless.name = ""
    with pytest.raises(ValueError, match=r"Lying\.name must be a string"):
        register_format(nameless)
    taken = Lying()
    taken.name = "bfloat16"
    with pytest.raises(ValueError, match="there is a format 'bfloat16' already"):
        register_format(taken)
    with pytest.raises(ValueError, match="expected one of the formats float32, bfloat16, float16"):
        format_named("int3")
