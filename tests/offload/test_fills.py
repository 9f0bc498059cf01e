"""Fills copy the experts they are told to, into the slots they are told to, and touch nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerscope_jax.formats import format_named
from layerscope_jax.offload.bank import host_sharding
from layerscope_jax.offload.fills import addresses_of, by_loops, by_warp, fill_for
from layerscope_jax.offload.slots import Moves

EXPERTS, SLOTS = 5, 3


FILLS = {"loops": by_loops, "warp": lambda: pytest.importorskip("warp") and by_warp()}


def bank_of(name):
    """Experts in a format, in host memory, and a pool whose every byte is known."""
    format, random = format_named(name), np.random.default_rng(3)
    buffers = format.buffers(32, 32).values()
    sharding = host_sharding()

    def array(buffer):
        raw = random.integers(0, 100, buffer.nbytes, np.uint8)
        return raw.view(buffer.dtype).reshape(buffer.shape)

    arrays = [[array(buffer) for buffer in buffers] for _ in range(EXPERTS)]
    bank = [format.Expert(*(jax.device_put(a, sharding) for a in expert)) for expert in arrays]
    pool = format.Expert(*(jnp.ones((SLOTS, *b.shape), b.dtype) for b in buffers))
    return arrays, jax.block_until_ready(bank), pool


@pytest.mark.parametrize("make", list(FILLS.values()), ids=list(FILLS))
@pytest.mark.parametrize("name", ["bfloat16", "float32", "int8", "int4", "mxfp4"])
def test_slots_hold_what_was_copied(make, name):
    fill = make()
    arrays, bank, pool = bank_of(name)
    before = [np.asarray(array).copy() for array in pool]
    run = jax.jit(fill, donate_argnums=0)
    tables = addresses_of(bank)
    moves = Moves(jnp.array([4, -1, 1], jnp.int32), jnp.array([2, 1, 0], jnp.int32))
    places = [array.unsafe_buffer_pointer() for array in pool]
    pool = run(pool, moves, tables)
    for number, array in enumerate(pool):
        held = np.asarray(array)
        assert held[2].tobytes() == arrays[4][number].tobytes()
        assert held[0].tobytes() == arrays[1][number].tobytes()
        assert held[1].tobytes() == before[number][1].tobytes()
    assert [array.unsafe_buffer_pointer() for array in pool] == places  # a pool is never copied


def test_a_move_out_of_the_slots_is_refused():
    """An address is not read before every number was compared with what it may be."""
    _, bank, pool = bank_of("float32")
    tables = addresses_of(bank)
    for sources, targets in ([5], [0]), ([0], [3]), ([0], [-1]):
        moves = Moves(jnp.array(sources, jnp.int32), jnp.array(targets, jnp.int32))
        with pytest.raises(jax.errors.JaxRuntimeError, match="arguments of other types, ranks or sizes"):
            jax.block_until_ready(jax.jit(by_loops())(pool, moves, tables))


def test_each_device_has_its_fill():
    assert fill_for(jax.devices("cpu")[0]).name == "loops"
