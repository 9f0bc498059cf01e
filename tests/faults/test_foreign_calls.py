"""What reads memory by addresses is given only what it takes: all else is refused in words."""

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from layerscope_jax.formats import PlainFormat
from layerscope_jax.kernels import crew, inside, registry, xla_calls, xla_ffi
from layerscope_jax.kernels.attention import attention_target
from layerscope_jax.kernels.combining import sums_target
from layerscope_jax.kernels.cpu import CpuExperts, InMemory, WorkStats
from layerscope_jax.kernels.delta_memory import memory_target
from layerscope_jax.kernels.grouping import Assignments
from layerscope_jax.kernels.head_products import head_products_target
from layerscope_jax.kernels.host_kernels import LOOPS
from layerscope_jax.kernels.inside import Inside
from layerscope_jax.kernels.latent_attention import latent_target
from layerscope_jax.kernels.loops import ARRAYS
from layerscope_jax.kernels.products import LOOPS as LOOPS_OF_PRODUCTS
from layerscope_jax.kernels.products import products, products_target
from layerscope_jax.models.experts import BiasedWeights, ExpertBody, ExpertWeights

pytestmark = pytest.mark.usefixtures("quick_compiles")

WIDTH, HIDDEN, EXPERTS = 44, 36, 3
FLOAT32 = np.dtype(np.float32)
REFUSED = (jax.errors.JaxRuntimeError, ValueError)  # as it is raised where it is called, or waited for


def expert(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)
    return ExpertWeights(*(jnp.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes))


@pytest.fixture(scope="module")
def within():
    computer = CpuExperts(1, LOOPS)
    held = [InMemory.of(expert()) for _ in range(EXPERTS)]
    made = Inside(computer, "float32", np.dtype(np.float32))
    made.held = held
    yield made
    made.close()
    computer.close()


def arguments(within, **changes):
    table = within.table_of(within.held)
    known = {
        "inputs": np.ones((4, WIDTH), np.float32),
        "experts": np.array([[0, 1], [2, 0], [1, 2], [0, 2]], np.int32),
        "active": np.array([True, True, False, True]),
        "table": np.asarray(table),
    }
    return [jnp.asarray(value) for value in (known | changes).values()]


WRONG = {
    "inputs of another type": {"inputs": np.ones((4, WIDTH), ml_dtypes.bfloat16)},
    "inputs of another rank": {"inputs": np.ones((4, WIDTH, 1), np.float32)},
    "fewer inputs": {"inputs": np.ones((3, WIDTH), np.float32)},
    "experts of another type": {"experts": np.zeros((4, 2), np.float32)},
    "experts of another rank": {"experts": np.zeros(8, np.int32)},
    "flags of another type": {"active": np.ones(4, np.int32)},
    "fewer flags": {"active": np.ones(3, bool)},
    "a table of another type": {"table": np.zeros(24, np.int32)},
    "a table of another rank": {"table": np.zeros((2, 12), np.uint32)},
    "a table without experts": {"table": np.zeros(2 * inside.FACTS, np.uint32)},
    "a table of experts without addresses": {"table": np.zeros(2 * (inside.FACTS + 3), np.uint32)},
    "an odd table": {"table": np.zeros(2 * (inside.FACTS + ARRAYS * EXPERTS) + 1, np.uint32)},
    "no table": {"table": np.zeros(1, np.uint32)},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_a_call_with_other_arguments_is_refused_as_it_is_traced_and_as_it_is_made(within, changes):
    values = arguments(within, **changes)
    with pytest.raises(ValueError, match="takes inputs"):
        jax.jit(inside.rows, static_argnums=0)(within.target, *values)
    call = jax.ffi.ffi_call(within.target, jax.ShapeDtypeStruct((8, WIDTH), np.float32))
    with pytest.raises(REFUSED, match=r"INVALID_ARGUMENT.*layerscope_experts_loops_float32"):
        jax.block_until_ready(call(*values))


@pytest.mark.parametrize("number", [-1, EXPERTS, 2**31 - 1, -(2**31)])
def test_an_expert_that_is_not_there_is_refused(within, number):
    values = arguments(within, experts=np.array([[0, 1], [2, 0], [1, number], [0, 2]], np.int32))
    with pytest.raises(REFUSED, match="INVALID_ARGUMENT"):
        jax.block_until_ready(inside.rows(within.target, *values))


def test_other_numbers_and_results_are_refused(within):
    good = arguments(within)
    for shapes, values in [
        (jax.ShapeDtypeStruct((7, WIDTH), np.float32), good),
        (jax.ShapeDtypeStruct((8, WIDTH - 1), np.float32), good),
        (jax.ShapeDtypeStruct((8, WIDTH), jnp.bfloat16), good),
        ([jax.ShapeDtypeStruct((8, WIDTH), np.float32)] * 2, good),
        (jax.ShapeDtypeStruct((8, WIDTH), np.float32), [*good[:3], *good[2:]]),
        (jax.ShapeDtypeStruct((8, WIDTH), np.float32), good[:1]),
    ]:
        with pytest.raises(REFUSED, match="INVALID_ARGUMENT"):
            jax.block_until_ready(jax.ffi.ffi_call(within.target, shapes)(*values))
    found = inside.rows(within.target, *good)  # and a right one is done
    assert found.shape == (8, WIDTH)
    assert not np.asarray(found)[4:6].any()


def struct(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


OTHERS = {
    "products": (
        lambda: products_target(FLOAT32, LOOPS_OF_PRODUCTS),
        [struct(3, 32), struct(64, 32), struct(32, 32)],
        [struct(3, 64), struct(3, 32)],
    ),
    "sums": (
        lambda: sums_target(FLOAT32),
        [struct(3, 8), struct(7, 8), struct(3, 2)],
        [struct(3, 8)],
    ),
    "attention of a token": (
        lambda: attention_target(FLOAT32, True),
        [
            struct(2, 4, 8),
            struct(2, 2, 8, 32),
            struct(2, 2, 32, 6),
            struct(2, 2, dtype=np.int32),
            struct(4, 2),
        ],
        [struct(2, 4, 6)],
    ),
    "attention of many": (
        lambda: attention_target(FLOAT32, False),
        [
            struct(2, 3, 4, 64),
            struct(2, 2, 64, 32),
            struct(2, 2, 32, 32),
            struct(2, 3, 2, dtype=np.int32),
            struct(4, 2),
        ],
        [struct(2, 3, 4, 32)],
    ),
    "latent attention": (
        lambda: latent_target(FLOAT32),
        [struct(2, 3, 8), struct(2, 5, 8), struct(2, dtype=np.int32), struct(1)],
        [struct(2, 3, 8)],
    ),
    "products of heads": (
        lambda: head_products_target(FLOAT32, LOOPS_OF_PRODUCTS),
        [struct(2, 3, 32), struct(3, 64, 32)],
        [struct(2, 3, 64)],
    ),
    "memory of DeltaNet": (
        memory_target,
        [
            struct(2, 3, 2, 8),
            struct(2, 3, 2, 8),
            struct(2, 3, 4, 32),
            struct(2, 3, 4),
            struct(2, 3, 4),
            struct(2, 4, 8, 32),
        ],
        [struct(2, 3, 4, 32), struct(2, 4, 8, 32)],
    ),
}


UNREAD = {
    ("sums", 1, 0),
    ("attention of a token", 2, 3),
    ("attention of many", 2, 3),
    ("latent attention", 1, 1),
}
"""Axes of arguments that may be longer: nobody reads what lies behind."""


@pytest.mark.parametrize("kind", OTHERS)
def test_others_are_refused_where_any_size_or_type_is_another(within, kind):
    target, arguments, results = OTHERS[kind]
    name = target()
    table = jnp.asarray(within.table)

    def call(arguments, results):
        values = [np.zeros(one.shape, one.dtype) for one in arguments]  # nothing is compiled for them
        return jax.block_until_ready(jax.ffi.ffi_call(name, results)(*values, table))

    assert [one.shape for one in call(arguments, results)] == [one.shape for one in results]
    for index, given in enumerate(arguments + results):
        changed = [struct(*given.shape, dtype=jnp.bfloat16), struct(*given.shape, 1, dtype=given.dtype)]
        for axis, size in enumerate(given.shape):
            if (kind, index, axis) not in UNREAD:
                shape = (*given.shape[:axis], size + 1, *given.shape[axis + 1 :])
                changed.append(struct(*shape, dtype=given.dtype))
        for other in changed:
            parts = [*arguments, *results]
            parts[index] = other
            with pytest.raises(REFUSED, match=rf"INVALID_ARGUMENT.*{name}"):
                call(parts[: len(arguments)], parts[len(arguments) :])
    with pytest.raises(REFUSED, match="INVALID_ARGUMENT"):
        call(arguments[:-1], results)


@pytest.mark.parametrize(
    ("kind", "index", "bounds"),
    [
        ("attention of a token", 3, [[0, 1], [0, 33]]),
        ("attention of a token", 3, [[0, 1], [-1, 5]]),
        ("latent attention", 2, [5, 6]),
        ("latent attention", 2, [-1, 5]),
    ],
)
def test_a_bound_where_nothing_is_is_refused(within, kind, index, bounds):
    target, arguments, results = OTHERS[kind]
    name = target()
    values = [jnp.zeros(one.shape, one.dtype) for one in arguments]
    values[index] = jnp.array(bounds, jnp.int32)
    call = jax.ffi.ffi_call(name, results)
    with pytest.raises(REFUSED, match="INVALID_ARGUMENT"):
        jax.block_until_ready(call(*values, jnp.asarray(within.table)))


@pytest.mark.parametrize(
    "matrices",
    [
        expert()._replace(down=jnp.ones((HIDDEN, WIDTH))),
        expert()._replace(up=jnp.ones((HIDDEN + 1, WIDTH))),
        expert()._replace(up=jnp.ones((HIDDEN, WIDTH), jnp.bfloat16)),
        ExpertWeights(*(jnp.ones((2, 2, 2)) for _ in range(3))),
    ],
)
def test_matrices_that_are_no_expert_are_refused(matrices):
    with pytest.raises(ValueError, match=r"an expert is gate \[F, D\]"):
        InMemory.of(matrices)


BIASED = PlainFormat("float32", ExpertBody("clamped", bias=True))


@pytest.mark.parametrize(
    "bias",
    [
        jnp.ones(2 * HIDDEN + WIDTH - 1),
        jnp.ones((1, 2 * HIDDEN + WIDTH)),
        jnp.ones(2 * HIDDEN + WIDTH, jnp.bfloat16),
        None,
    ],
)
def test_biases_that_do_not_fit_are_refused(bias):
    arrays = expert() if bias is None else BiasedWeights(*expert(), bias)
    with pytest.raises(ValueError, match=r"an expert in the format 'float32' is .* bias float32\[116\], got"):
        InMemory.of(arrays, BIASED)
    if bias is not None:
        with pytest.raises(ValueError, match=r"down float32\[44, 36\], got"):  # not that they are left out
            InMemory.of(arrays)
    right = InMemory.of(BiasedWeights(*expert(), jnp.ones(2 * HIDDEN + WIDTH)), BIASED)
    assert np.frombuffer(right.addresses, np.int64)[3] == right.arrays.bias.unsafe_buffer_pointer()
    assert np.frombuffer(InMemory.of(expert()).addresses, np.int64)[3] == 0


def strided(shape):
    return np.zeros((shape[0], 2 * shape[1]), np.float32)[:, ::2]


@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [
        (np.zeros((3, WIDTH), np.float32), np.zeros((3, WIDTH), np.float32)),
        (np.zeros((4, WIDTH - 1), np.float32), np.zeros((3, WIDTH), np.float32)),
        (np.zeros((4, WIDTH), np.float32), np.zeros((2, WIDTH), np.float32)),
        (np.zeros((4, WIDTH), np.float32), np.zeros((3, WIDTH), ml_dtypes.bfloat16)),
        (strided((4, WIDTH)), np.zeros((3, WIDTH), np.float32)),
        (np.zeros((4, WIDTH), np.float32), strided((3, WIDTH))),
    ],
)
def test_rows_that_do_not_fit_are_refused(outputs, inputs):
    computer, held = CpuExperts(1, LOOPS), InMemory.of(expert())
    rows = Assignments(np.zeros((3, 1), np.int32))
    with pytest.raises(ValueError, match="row after row, got"):
        computer.compute(outputs, inputs, rows, [0], lambda _: [held], WorkStats())
    computer.close()


@pytest.fixture
def afresh(monkeypatch):
    """As in a new process; XLA keeps the functions that it knows."""
    monkeypatch.setattr(xla_ffi, "_known", {})
    monkeypatch.setattr(registry, "_fallbacks", {})
    once = (xla_ffi.interface, xla_ffi.try_out, registry.choose)
    for one in once:
        one.cache_clear()
    yield
    for one in once:
        one.cache_clear()


def test_the_version_that_comes_with_jax_is_the_one_that_is_told(afresh):
    version = xla_ffi.interface()
    assert version[0] == xla_ffi.MAJOR
    assert version[1] in xla_ffi.MINORS
    assert xla_ffi.version_to_tell() == version


def test_the_version_is_written_where_xla_asks_for_it():
    """Into the structure behind a call's extension, and nowhere else."""
    extension, metadata, call = (np.zeros(8, np.int64) for _ in range(3))
    call[xla_calls.EXTENSION // 8] = extension.ctypes.data
    extension.view(np.int32)[xla_calls.KIND // 4] = xla_calls.ASKS_VERSION
    extension[xla_calls.METADATA // 8] = metadata.ctypes.data
    assert xla_calls.asks_version(call.ctypes.data, 5 << 32 | 7)
    told = metadata.view(np.int32)[xla_calls.VERSION // 4 :][:2]
    assert told.tolist() == [5, 7]
    told[:] = 0
    assert not metadata.any()
    extension[:] = 0
    assert not xla_calls.asks_version(call.ctypes.data, 5 << 32 | 7)


@pytest.mark.parametrize("version", [(1, 0), (0, 0)])
def test_another_version_is_left_to_xla_with_one_warning(afresh, monkeypatch, version):
    monkeypatch.setattr(xla_ffi, "interface", lambda: version)
    computer = CpuExperts(1, LOOPS)
    x, weights = np.ones((2, 32), np.float32), np.ones((32, 32), np.float32)
    made, results = [], []

    def use():
        for _ in range(2):
            made.append(Inside(computer, "float32", FLOAT32))
            results.extend(products(made[-1].table, jnp.asarray(x), jnp.asarray(weights)))

    with pytest.warns(RuntimeWarning, match=rf"interface is of version {version[0]}\.{version[1]}") as said:
        use()
    assert [one.target for one in made] == [None, None]
    assert len(said) == len(registry.fallbacks()) == 1
    for result in results:
        np.testing.assert_array_equal(result, x @ weights.T)
    for one in (*made, computer):
        one.close()


def test_a_later_minor_version_is_tried_before_it_is_trusted(afresh, monkeypatch):
    monkeypatch.setattr(xla_ffi, "interface", lambda: (0, 99))
    tried = []
    monkeypatch.setattr(xla_ffi, "announce", lambda name, *rest: tried.append((name, rest[-1])) or name)
    with pytest.raises(xla_ffi.Unavailable, match=r"0\.99, and a trial failed: .*layerscope_trial"):
        xla_ffi.version_to_tell()
    assert tried == [("layerscope_trial", (0, 99))]


def test_a_trial_at_the_version_that_is_there_succeeds(afresh):
    xla_ffi.try_out(xla_ffi.interface())


def test_the_header_tells_the_version(afresh, monkeypatch, tmp_path):
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    assert xla_ffi.interface() is None
    assert xla_ffi.version_to_tell() == (xla_ffi.MAJOR, xla_ffi.MINORS[0])
    xla_ffi.interface.cache_clear()
    header = Path(tmp_path, "xla", "ffi", "api", "c_api.h")
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 3\n#define XLA_FFI_API_MINOR 14\n")
    assert xla_ffi.interface() == (3, 14)


def test_what_fails_to_compile_is_left_to_xla(afresh, monkeypatch):
    def broken(*_):
        raise RuntimeError("LLVM gave up")

    monkeypatch.setattr(crew, "experts", broken)
    computer = CpuExperts(1, LOOPS)
    reason = "layerscope_experts_loops_float32_float32: RuntimeError: LLVM gave up"
    with pytest.warns(RuntimeWarning, match=reason):
        first = Inside(computer, "float32", FLOAT32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = Inside(computer, "float32", FLOAT32)
    assert first.target is second.target is None
    assert registry.fallbacks() == (reason,)
    for one in (first, second, computer):
        one.close()
