"""Experts computed from slots: each row by its own expert, in the same bits wherever that is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerscope_jax.formats import FLOAT32
from layerscope_jax.offload.slot_experts import FEW, most_blocks, rows_of_slots

pytestmark = pytest.mark.usefixtures("quick_compiles")

EXPERTS, WIDTH, HIDDEN = 6, 16, 8


@functools.partial(jax.jit, static_argnames="product")
def computed(inputs, slots, pool, product=FLOAT32.ffn):
    return rows_of_slots(inputs, slots, pool, product, EXPERTS)


@pytest.mark.parametrize("tokens", [3, 40])  # a product for each row, and blocks of rows
def test_rows_are_those_of_their_experts_whatever_slots_these_are_in(tokens):
    assert (tokens * 2 <= FEW) == (tokens == 3)
    random = np.random.default_rng(tokens)
    buffers = FLOAT32.buffers(WIDTH, HIDDEN).values()

    def expert():
        return FLOAT32.Expert(*(random.standard_normal(b.shape).astype(b.dtype) for b in buffers))

    experts = [expert() for _ in range(EXPERTS)]
    inputs = random.standard_normal((tokens, WIDTH)).astype(np.float32)
    chosen = random.integers(0, EXPERTS, (tokens, 2))
    chosen[:, 0] %= 4  # experts 4 and 5 have fewer rows
    found = []
    for resident in (range(EXPERTS), [5, 3, 0], [0, 5, 1, 3]):
        slot_of = {expert: slot for slot, expert in enumerate(resident)}
        pool = FLOAT32.Expert(*(np.stack([experts[e][array] for e in resident]) for array in range(3)))
        slots = np.vectorize(lambda e, slot_of=slot_of: slot_of.get(e, len(slot_of)))(chosen).astype(np.int32)
        found.append(
            (slots < len(slot_of), np.asarray(computed(inputs, slots, pool)).reshape(tokens, 2, WIDTH))
        )
    there, every = found[0]
    assert there.all()
    for token in range(tokens):
        for choice in range(2):
            alone = FLOAT32.ffn(jnp.asarray(inputs[[token]]), experts[chosen[token, choice]])
            np.testing.assert_allclose(every[token, choice], alone[0], rtol=1e-5, atol=1e-5)
    for there, rows in found[1:]:
        assert 0 < there.sum() < there.size
        assert (rows[there] == every[there]).all()
        assert not rows[~there].any()


@pytest.mark.parametrize("tokens", [3, 40])
def test_no_loop_has_an_end_that_the_data_decides(tokens):
    """On a GPU the host would wait in it for the device."""
    buffers = FLOAT32.buffers(WIDTH, HIDDEN).values()
    pool = FLOAT32.Expert(*(jnp.zeros((3, *b.shape), b.dtype) for b in buffers))
    program = computed.lower(jnp.zeros((tokens, WIDTH)), jnp.zeros((tokens, 2), jnp.int32), pool).compile()
    loops = [line for line in program.as_text().splitlines() if " while(" in line]
    assert bool(loops) == (tokens == 40)
    assert all("known_trip_count" in loop for loop in loops)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.sampled_from([1, 2, 4, 16]))
def test_there_are_as_many_blocks_as_any_rows_need(counts, size):
    needed = sum(-(-count // size) for count in counts)
    assert needed <= most_blocks(sum(counts), len(counts), size)
    one_more = [1 + size * (count // size) for count in counts]  # each has a block that is not full
    assert sum(-(-count // size) for count in one_more) == most_blocks(sum(one_more), len(counts), size)
