"""The house: which room may import which, how long a file may be, what lies at the package's root."""

import ast
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ROOMS = [
    "cli",
    "predictor",
    "distributed",
    "evaluation",
    "serving",
    "simulation",
    "engine",
    "config",
    "generation",
    "profiling",
    "runtime",
    "prediction",
    "checkpoints",
    "offload",
    "kernels",
    "formats",
    "scheduling",
    "models",
    "support",
]
"""From the top down: a room imports those after it. `predictor` stands beside the library; `cli` opens it."""

AT_THE_ROOT = {"__init__.py", "engine.py", "config.py", "py.typed"}

MAX_LINES = 400


@lru_cache
def modules() -> dict[str, Path]:
    """Every module of what is installed, by its dotted name."""
    files = [file for package in ("layerscope_jax", "predictor") for file in (ROOT / package).rglob("*.py")]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


def imports_of(module: str, tree: ast.AST) -> set[str]:
    """Modules of ours that a file imports anywhere in it, for types alone too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute here, so that they can be read"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules().keys()


def room_of(module: str) -> str:
    """The room that a module lies in; empty for the package itself, a table of contents."""
    package, _, rest = module.partition(".")
    return "predictor" if package == "predictor" else rest.partition(".")[0]


def upward(module: str, source: str) -> list[str]:
    """What a file imports from rooms above its own."""
    floor = ROOMS.index(room_of(module))
    return [
        f"{module} -> {other}"
        for other in sorted(imports_of(module, ast.parse(source)))
        if room_of(other) and ROOMS.index(room_of(other)) < floor
    ]


def test_imports_point_down():
    found = []
    for module, file in modules().items():
        if room_of(module):
            found += upward(module, file.read_text())
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "from layerscope_jax.cli import main",
        "def late():\n    from layerscope_jax.engine import Engine",
        "import predictor.llapor",
    ],
)
def test_an_import_from_above_is_seen_wherever_it_stands(source):
    assert upward("layerscope_jax.scheduling.plan", source)


def test_every_room_is_known():
    assert {room_of(module) for module in modules()} - {""} <= set(ROOMS)


def test_deciding_needs_no_arrays_of_jax():
    for module, file in modules().items():
        if room_of(module) == "scheduling":
            assert "import jax" not in file.read_text(), module


def test_nothing_else_lies_at_the_root():
    assert {path.name for path in (ROOT / "layerscope_jax").iterdir() if path.is_file()} <= AT_THE_ROOT


def test_only_tests_import_from_tests():
    helpers = {file.stem for file in (ROOT / "tests").rglob("*.py")}
    for folder in ("layerscope_jax", "predictor", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text())
            imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            assert not imported & (helpers | {"tests"}), file


def test_a_file_is_one_idea():
    folders = ("layerscope_jax", "predictor", "tools", "tests", "benchmarks")
    lengths = {
        file.relative_to(ROOT): len(file.read_text().splitlines())
        for folder in folders
        for file in (ROOT / folder).rglob("*.py")
    }
    assert {str(file): lines for file, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_two_test_files_have_one_name():
    """Pytest imports them by their names alone."""
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
