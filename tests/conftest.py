"""What every test runs under, and which tests are the core.

JAX reads the settings below when it first makes an array, so they are set as this is imported.
"""

import gc
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from compiled_programs import compiled
from hypothesis import settings
from quick_compiling import compile_quickly

from layerscope_jax.profiling import disk_costs, measure
from layerscope_jax.support import compile_cache

ROOT = Path(__file__).parents[1]

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes may share one GPU

# What one process compiles, the others read, those that tests start and those of the next run too: as the
# compiled kernels, it stays in the checkout. JAX compiles again what a changed line makes another program.
PROGRAMS = ROOT / ".cache" / "programs" / compile_cache.default_folder().name
# Before 0.10.2 XLA says two lines for each program that it reads: there processes share none.
READS_QUIETLY = jax.__version_info__ >= (0, 10, 2)
if READS_QUIETLY and "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has what its parent set
    PROGRAMS.mkdir(parents=True, exist_ok=True)
    compile_cache.prune([PROGRAMS], 512 * 2**20)
    compile_cache.discard_damaged(PROGRAMS)  # of a run that was killed
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(PROGRAMS)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

jax.config.update("jax_num_cpu_devices", 4)  # the last one stands for the host beside an accelerator
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
if READS_QUIETLY:
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# Python's own compiled files stay as well, wherever it is told to write none: else every process reads all
# sources anew, and every worker rewrites the assertions of all tests, which takes it ten seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

settings.register_profile("thorough", max_examples=100)  # of tests that otherwise try few: they take long

gc.set_threshold(10_000, 20, 20)  # what is traced and compiled is many objects, and little of it garbage

# No test asks how long something takes, and many make engines that measure.
measure.ROUNDS = measure.MOST_ROUNDS = 3
measure.ROUNDS_S = disk_costs.READS_S = 0.01

collect_ignore_glob = ["*conftest.py"]  # has no doctests, and there are several of that name

CORE = (
    # what is decided
    "layerscope_jax/scheduling",
    "tests/scheduling",
    "layerscope_jax/simulation",
    "tests/simulation",
    # requests
    "tests/generation/test_scheduler.py",
    "tests/generation/test_chat.py",
    "tests/generation/test_openai_requests.py",
    "tests/generation/test_stop_strings.py",
    "tests/serving/test_answers.py",
    "tests/serving/test_bodies.py",
    # residency and the link
    "layerscope_jax/offload",
    "tests/offload",
    # settings, of models and of engines
    "tests/models/test_config_keys.py",
    "tests/models/test_configs.py",
    "tests/test_config.py",
    # files
    "layerscope_jax/checkpoints",
    "tests/checkpoints",
    "tests/prediction/test_traces.py",
    "tests/faults/test_files.py",
    "tests/faults/test_locks.py",
    "tests/faults/test_tokenizer_files.py",
    # what all of them stand on, and where everything lies
    "layerscope_jax/support",
    "tests/support/test_threads.py",
    "tests/test_rooms.py",
)
"""Folders and files of `pytest -m core`: a minute's tests of what decides, keeps books and reads files."""

COMPILES = (
    "tests/checkpoints/test_checkpoints.py::test_a_failing_save_leaves_nothing_half_written",
    "tests/checkpoints/test_checkpoints.py::test_a_long_list_of_wrong_tensors_ends_with_their_number",
    "tests/checkpoints/test_checkpoints.py::test_a_model_of_a_decoder_computes_the_same",
    "tests/checkpoints/test_checkpoints.py::test_what_is_saved_is_loaded_bit_for_bit",
    "tests/checkpoints/test_quantised_checkpoints.py::test_an_engine_runs_one",
    "tests/offload/test_executors.py",
    "tests/offload/test_fills.py",
    "tests/offload/test_link_thread.py::test_an_engine_whose_links_thread_has_ended_says_so",
    "tests/offload/test_parcels.py",
    "tests/offload/test_slot_experts.py",
    "tests/offload/test_slots.py",
    "tests/simulation/test_comparison.py",
    "tests/simulation/test_contention.py::test_no_bound_counts_on_parts_hindering_each_other",
    "tests/simulation/test_devices.py::test_no_policy_is_faster_than_the_bound",
    "tests/simulation/test_devices.py::test_profiles_are_compared_on_several_devices",
    "tests/simulation/test_simulated_runs.py::test_the_engine_and_its_simulation_decide_alike",
)
"""Files and tests among them that compile programs, and so are not of the core."""

OUR_COPIES = {"stage"}
"""Programs of ours without arithmetic: memory is handed over."""


def takes_long(program: str) -> bool:
    """Whether a program is more than one operation of JAX's own, which is compiled in milliseconds."""
    own = program.startswith("_") or hasattr(jnp, program) or hasattr(jax.lax, program)
    return program not in ("", *OUR_COPIES) and not own  # an older JAX does not tell names


def lies_in(test: str, places: tuple[str, ...]) -> bool:
    """Whether a test, by its id, is in one of some folders, files and functions."""
    return any(test == place or test.startswith((f"{place}/", f"{place}::", f"{place}[")) for place in places)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves files without a test of the core unread where nothing else is asked for: that takes time."""
    if config.option.markexpr != "core" or collection_path.suffix != ".py":
        return None
    return None if lies_in(collection_path.relative_to(ROOT).as_posix(), CORE) else True


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the core, and puts it behind half of the others.

    Two workers begin with a half each. In a checkout that is new, one of them compiles the CPU's kernels
    while the other is at the core, which needs few, and finds them afterwards.
    """
    for item in items:
        if lies_in(item.nodeid, CORE) and not lies_in(item.nodeid, COMPILES):
            item.add_marker("core")
    core = [item for item in items if item.get_closest_marker("core")]
    others = [item for item in items if not item.get_closest_marker("core")]
    quick = {item.path for item in others if compiles_quickly(item)}
    others.sort(key=lambda item: item.path not in quick)  # compiled programs go where that changes
    half = min(len(items) // 2, len(others))
    while 0 < half < len(others) and others[half].path == others[half - 1].path:
        half += 1  # a file stays whole
    items[:] = others[:half] + core + others[half:]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Called for doctests of the package as well: hooks of a phase are called for tests below this folder."""
    if not FILES or FILES[-1] != item.path:
        FILES.append(item.path)
        forget()
    item.stash[BEFORE] = len(compiled)
    if not item.get_closest_marker("core"):  # which compiles nothing
        compile_quickly(compiles_quickly(item))
    return (yield)


FILES: list[Path] = []
"""Files whose tests have been run in this process, in order."""


def forget() -> None:
    """Drops what files of before left in cycles, and has Python look no more through all that they keep.

    A process that has traced and compiled for a while holds a million objects, and looking through them
    again and again took a tenth of the tests' time. What became garbage since is found at every 25th file.
    """
    if len(FILES) % 25 == 0:
        gc.unfreeze()
    gc.collect()
    gc.freeze()


def compiles_quickly(item: pytest.Item) -> bool:
    """Whether XLA may optimise little for a test."""
    return isinstance(item, pytest.DoctestItem) or "quick_compiles" in item.fixturenames


BEFORE = pytest.StashKey[int]()
"""How many programs were compiled before a test and what is set up for it."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Fails a test of the core that compiles a program."""
    result = yield
    if item.get_closest_marker("core"):
        programs = sorted(filter(takes_long, compiled[item.stash[BEFORE] :]))
        if programs:
            pytest.fail(
                f"a test of the core compiled {', '.join(programs)}: let it do without, or name it in "
                "COMPILES in tests/conftest.py",
                pytrace=False,
            )
    return result


@pytest.fixture
def quick_compiles() -> None:
    """For tests that compare numbers to a tolerance, or one program with itself: XLA optimises little.

    That takes less than half of the time. Where XLA's optimisations could change the bits of one program
    and not of another, tests let it do as it does for users, and go without this.
    """
