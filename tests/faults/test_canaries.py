"""Loops that go by addresses write what they are to write, and not one byte beside it."""

import functools
import itertools
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from guarded import WORDS, Guarded, job, numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.formats import format_named
from layerscope_jax.kernels import amx, combining, crew, loops, vectors
from layerscope_jax.kernels.activations import facts_of
from layerscope_jax.kernels.cpu import CpuExperts, InMemory, WorkStats
from layerscope_jax.kernels.grouping import Assignments, by_expert
from layerscope_jax.kernels.host_kernels import AMX, LOOPS, PAIRS
from layerscope_jax.kernels.inside import pieces
from layerscope_jax.models.experts import ExpertBody


@functools.cache
def computer(kernel):
    return CpuExperts(2, kernel)


def arrays_of(rng, width, hidden, dtype, body):
    """Of an expert, its biases last."""
    shapes = ((hidden, width), (hidden, width), (width, hidden), (2 * hidden + width,))
    return [numbers(rng, shape, dtype) for shape in shapes[: 4 if body.bias else 3]]


BODIES = [ExpertBody(), ExpertBody("gelu")]
BODIES += [ExpertBody("gelu_tanh", bias=True), ExpertBody("clamped", bias=True)]

pairs = vectors.suit(np.dtype(ml_dtypes.bfloat16), 32, 32)
TYPES = (np.float32, ml_dtypes.bfloat16)
KERNELS = [(LOOPS, dtype, dtype, 1) for dtype in TYPES]
KERNELS += [(PAIRS, ml_dtypes.bfloat16, ml_dtypes.bfloat16, 32)] if pairs else []
tiles = amx.available()
KERNELS += [(AMX, ml_dtypes.bfloat16, ml_dtypes.bfloat16, 32)] if tiles else []


@given(data=st.data(), tokens=st.integers(1, 70), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_experts(data, tokens, seed):
    every = [*KERNELS, (LOOPS, np.float32, ml_dtypes.bfloat16, 1)]
    kernel, dtype, of_weights, step = data.draw(st.sampled_from(every), "kernel")
    width, hidden = (step * data.draw(st.integers(1, 160 // step if step > 1 else 100)) for _ in range(2))
    rng, guarded = np.random.default_rng(seed), Guarded()
    format = format_named(np.dtype(of_weights).name).for_body(data.draw(st.sampled_from(BODIES), "body"))
    held = []
    for _ in range(3):
        arrays = map(jax.device_put, arrays_of(rng, width, hidden, of_weights, format.body))
        held.append(InMemory.of(format.Expert(*arrays), format))
    choices = data.draw(st.integers(1, 3))
    chosen = np.argsort(rng.random((tokens, 3)), 1)[:, :choices].astype(np.int32)
    rows = Assignments(chosen, rng.random(tokens) < 0.9)
    some = [one for one in rows.demand if rng.random() < 0.8]
    outputs = guarded.array((tokens * choices + 1, width), dtype)
    inputs = numbers(rng, (tokens, width), dtype)
    computer(kernel).compute(
        outputs, inputs, rows, some, lambda experts: [held[one] for one in experts], WorkStats()
    )
    guarded.check()
    written = np.zeros(tokens * choices + 1, bool)
    for one in some:
        written[rows.slots(one)] = True
    assert np.isfinite(outputs[written].astype(np.float32)).all()
    assert np.isnan(outputs[~written].astype(np.float32)).all()


@given(
    words=st.sampled_from(["float32", "uint16", *(["int16"] if pairs else []), *(["amx"] if tiles else [])]),
    rows=st.integers(1, 300),
    steps=st.integers(1, 20),
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    columns=st.integers(1, 4),
    height=st.integers(1, 300),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_products(words, rows, steps, widths, columns, height, seed):
    rng, guarded = np.random.default_rng(seed), Guarded()
    dtype = np.float32 if words == "float32" else ml_dtypes.bfloat16
    depth = steps * {"int16": vectors.COLUMNS, "amx": amx.DEPTH}.get(words, vectors.ROWS)
    columns *= vectors.COLUMNS
    x = numbers(rng, (rows, depth), dtype)
    matrices, held, found, beside = np.empty((len(widths), 3), np.int64), [], [], 0
    for index, width in enumerate(vectors.COLUMNS * width for width in widths):
        held.append(numbers(rng, (width, depth), dtype))
        found.append(guarded.array((rows, width), dtype))
        matrices[index] = held[-1].ctypes.data, width, found[-1].ctypes.data
        beside += -(-width // columns)
    work = job(
        PARTS=beside * -(-rows // height),
        INPUTS=x,
        WEIGHTS=matrices,
        ROWS=rows,
        DEPTH=depth,
        COUNT=len(widths),
        COLUMNS=columns,
        HEIGHT=height,
        BESIDE=beside,
    )
    multiply = amx.multiply if words == "amx" else loops.multiply
    rows_of = np.float32 if words == "float32" else np.uint16
    crew.products(multiply, rows_of, WORDS.get(words, np.uint16)).ctypes(work.ctypes.data)
    guarded.check()
    for weights, outputs in zip(held, found, strict=True):
        exact = x.astype(np.float64) @ weights.astype(np.float64).T
        np.testing.assert_allclose(outputs.astype(np.float64), exact, rtol=2e-2, atol=2e-2)


@given(
    words=st.sampled_from(["float32", "uint16"]),
    tokens=st.integers(1, 150),
    choices=st.integers(1, 8),
    width=st.integers(1, 70),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_sums(words, tokens, choices, width, seed):
    rng, guarded = np.random.default_rng(seed), Guarded()
    dtype = np.float32 if words == "float32" else ml_dtypes.bfloat16
    hidden, rows = numbers(rng, (tokens, width), dtype), numbers(rng, (tokens, choices, width), dtype)
    weights, outputs = rng.random((tokens, choices), np.float32), guarded.array((tokens, width), dtype)
    work = job(
        SimpleNamespace(EXPERTS=combining.EXPERTS, CHOICES=combining.CHOICES),
        PARTS=-(-tokens // combining.PIECE),
        INPUTS=hidden,
        WEIGHTS=weights,
        OUTPUTS=outputs,
        ROWS=tokens,
        DEPTH=width,
        EXPERTS=rows,
        CHOICES=choices,
    )
    combining.tokens(WORDS[words]).ctypes(work.ctypes.data)
    guarded.check()
    assert np.isfinite(outputs.astype(np.float32)).all()


@given(
    kernel=st.sampled_from(KERNELS),
    body=st.sampled_from(BODIES),
    tokens=st.integers(1, 40),
    choices=st.integers(1, 3),
    steps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    nodes=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_experts_as_a_job_of_a_program(kernel, body, tokens, choices, steps, nodes, seed):
    """As XLA's call hands them on: pieces of experts, by addresses."""
    kernel, dtype, of_weights, step = kernel
    width, hidden = (max(step, 8) * size for size in steps)
    rng, guarded = np.random.default_rng(seed), Guarded()
    held = [[], [], []]
    for expert in held:
        for numbered in arrays_of(rng, width, hidden, of_weights, body):
            expert.append(guarded.array(numbered.shape, of_weights))
            expert[-1][...] = numbered
    chosen = np.argsort(rng.random((tokens, 3)), 1)[:, :choices].astype(np.int32)
    order, bounds, demand = by_expert(chosen.reshape(-1), np.ones(tokens, bool), choices)
    whose, firsts, lasts, starts = pieces(bounds, 7, nodes)
    counters = guarded.array((nodes,), np.float64).view(np.int64)
    counters[...] = 0
    cores = np.array([3, nodes - 1, 0, nodes - 1])  # this thread may run on a core of which nothing is said
    addresses = np.zeros((len(whose), 4), np.int64)
    for row, one in zip(addresses, whose, strict=True):
        row[: len(held[one])] = [array.ctypes.data for array in held[one]]
    activation, limit = facts_of(body)
    inputs = numbers(rng, (tokens, width), dtype)
    outputs = guarded.array((tokens * choices, width), dtype)
    work = job(
        PARTS=len(firsts),
        INPUTS=inputs,
        WEIGHTS=addresses,
        OUTPUTS=outputs,
        ROWS=tokens * choices,
        DEPTH=hidden,
        WIDTH=width,
        FIRSTS=firsts,
        LASTS=lasts,
        ORDER=order,
        LENGTH=len(order),
        CHOICES=choices,
        ACTIVATION=activation,
        LIMIT=limit.view(np.uint32),
        NODES=nodes,
        STARTS=starts,
        COUNTERS=counters,
        NEAR=cores,
    )
    words = [WORDS["float32" if one is np.float32 else "uint16"] for one in (dtype, of_weights)]
    words[1] = np.int16 if kernel is PAIRS else words[1]
    crew.experts(kernel.run, kernel.scratch_bytes, loops.ARRAYS, *words).ctypes(work.ctypes.data)
    guarded.check()
    assert (counters == np.diff(starts) + 1).all()  # one look in vain each
    assert len(demand[0]) == len(np.unique(chosen))
    assert np.isfinite(outputs.astype(np.float32)).all()


@given(
    bounds=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    most=st.integers(1, 9),
    nodes=st.integers(1, 4),
)
def test_pieces_are_all_slots_once_node_by_node(bounds, most, nodes):
    ends = np.cumsum(bounds)
    whose, firsts, lasts, starts = pieces(np.array([ends - bounds, ends]), most, nodes)
    assert (lasts - firsts).max(initial=0) <= most
    slots = [
        (expert, slot) for expert, a, b in zip(whose, firsts, lasts, strict=True) for slot in range(a, b)
    ]
    order = sorted(range(len(bounds)), key=lambda expert: (expert % nodes, expert))
    assert slots == [(e, slot) for e in order for slot in range(ends[e] - bounds[e], ends[e])]
    assert (starts[0], starts[-1]) == (0, len(whose))
    for node, (first, last) in enumerate(itertools.pairwise(starts)):
        assert (whose[first:last] % nodes == node).all()


def test_a_byte_beside_is_seen():
    guarded = Guarded()
    found = guarded.array((3, 5), np.float32)
    guarded.check()
    memory = guarded._memories[0][0]
    begin = found.ctypes.data - memory.ctypes.data
    memory[begin + found.nbytes] = 0
    with pytest.raises(AssertionError):
        guarded.check()
