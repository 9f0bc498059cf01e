"""The pages: their Python runs, and every file, command and option that they name exists."""

import ast
import dataclasses
import functools
import re
from importlib.util import find_spec
from unittest import mock

import pytest
from docs_pages import LINK, NAMED_FILE, OPTION, PAGES, ROOT, anchors, blocks, commands, prose
from small_checkpoint import write_checkpoint

import layerscope_jax
from layerscope_jax.cli.main import COMMANDS, parsed
from layerscope_jax.models import FAMILIES
from layerscope_jax.scheduling.registry import FORECASTING, POLICIES

pytestmark = pytest.mark.usefixtures("quick_compiles")

PYTHON_PAGES = [page for page in PAGES if any(b.language == "python" and b.run for b in blocks(page))]

OF_THE_READER = {
    "added_tokens.json",
    "config.json",
    "continuations.jsonl",
    "generation_config.json",
    "layerscope.json",
    "NAME.json",
    "NAME.npz",
    "plans.jsonl",
    "predictor.json",
    "profile.json",
    "prompts.jsonl",
    "routing.npz",
    "rows.json",
    "verdict.json",
    "run.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
}
"""Files that a reader has, or makes by a command of the page."""

IMPORT = re.compile(r"^ *from ((?:predictor|benchmarks|tools)[\w.]*) import (\([^)]*\)|.*)", re.MULTILINE)

load = functools.cache(layerscope_jax.load)
"""The pages share what they load."""

COMMON_OPTIONS = {"--help", "--debug", "--version"}


def shown(path):
    return str(path.relative_to(ROOT))


@pytest.fixture
def _registries():
    names = POLICIES.copy(), FORECASTING.copy()
    with mock.patch.dict(FAMILIES):
        yield
    POLICIES.clear()
    POLICIES.update(names[0])
    FORECASTING.clear()
    FORECASTING.update(names[1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny one in place of the reader's; its programs are those of tests of commands."""
    return str(write_checkpoint(tmp_path_factory.mktemp("docs") / "tiny"))


@pytest.mark.usefixtures("_registries")
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=shown)
def test_python_runs(page, checkpoint, tmp_path, monkeypatch, capsys):
    """On a tiny model; where a page names a policy, within a budget that leaves something to decide."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    monkeypatch.setattr(layerscope_jax, "use_compilation_cache", lambda: None)  # a setting of the process
    monkeypatch.setattr(layerscope_jax, "load", load)
    try:
        for block in blocks(page):
            if block.language == "python" and block.run:
                code = block.text.replace("path/to/checkpoint", checkpoint)
                code = code.replace('"2GiB", policy', '"70KB", policy').replace('"3MB"', '"30KB"')
                code = code.replace("batches=[4]", "batches=[1]")
                code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=3", code)
                exec(compile(code, shown(page), "exec"), names)
    finally:
        if "engine" in names:
            names["engine"].close()


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_commands_exist(page):
    for words in commands(page, ("", "bash")):
        problem = problem_of(words)
        assert problem is None, f"{' '.join(words)}: {problem}"


def test_commands_of_shells_are_among_them():
    """Two servers behind a balancer, and lm-eval."""
    found = [commands(ROOT / "docs" / f"{name}.md", ("bash",)) for name in ("balancing", "evaluation")]
    assert [[words[:3] for words in each] for each in found] == [
        [["layerscope", "serve", "path/to/checkpoint"]] * 2,
        [["python", "-m", "layerscope_jax.evaluation"]],
    ]


def problem_of(words):
    """What is wrong with a command, if anything is."""
    if words[0] == "layerscope":
        try:
            if words[1:] != ["--version"]:
                parsed(words[1:])  # every option and its value
        except SystemExit as ended:
            return None if ended.code == 0 else "it cannot be parsed"
        return None
    options = {word.partition("=")[0] for word in words if word.startswith("--")} - COMMON_OPTIONS
    module = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
    if module in ("venv", "pytest", "pip"):
        return None
    if find_spec(module) is None:
        return f"there is no module {module}"
    if module == "layerscope_jax.evaluation":  # whose options are lm-eval's; tests/evaluation runs it
        return None
    known = options_of(module)
    return f"unknown {sorted(options - known)}" if options - known else None


def options_of(module):
    """Options that the dataclasses of a command's module have, those of its settings and its bases too.

    Read from the source: importing a benchmark or a tool takes seconds, and may need packages that are not
    installed.
    """
    seen, fields, left = set(), set(), [module]
    while left:
        name = left.pop()
        file = ROOT / (name.replace(".", "/") + ".py")
        if name in seen or not file.exists():
            continue
        seen.add(name)
        source = file.read_text()
        fields |= {field.replace("_", "-") for field in re.findall(r"^    (\w+): ", source, re.MULTILINE)}
        for package, imported in IMPORT.findall(source):
            left += [package, *(f"{package}.{part}" for part in re.findall(r"\w+", imported))]
    return {f"--{field}" for field in fields} | {f"--{a}.{b}" for a in fields for b in fields}


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_named_files_exist(page):
    places = [
        page.parent,
        ROOT,
        ROOT / "layerscope_jax",
        ROOT / "benchmarks",
        ROOT / "benchmarks" / "results",
    ]
    text = prose(page)
    named = {name for name in NAMED_FILE.findall(re.sub(r"https?://\S+", "", text))}
    missing = {
        name
        for name in named - OF_THE_READER
        if not name.startswith("build/") and not any((place / name).exists() for place in places)
    }
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(prose(page)):
        if target.startswith(("http:", "https:")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target + anchor


@pytest.mark.parametrize(("walk", "rooms"), [("prompt", 12), ("plan", 3), ("tensor", 5)])
def test_walks_name_functions_that_exist(walk, rooms):
    """And go through few rooms: who changes the walk of a prompt past twelve should think again."""
    rows = re.findall(
        r"^\| \d+ \| `(\w+)` \| `([\w/]+\.py)` \| `(\w+)(?:\.(\w+))?` \|",
        (ROOT / "docs" / f"walk_{walk}.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) > rooms
    assert len({room for room, *_ in rows}) <= rooms
    for room, file, name, method in rows:
        assert file.partition("/")[0].removesuffix(".py") == room
        tree = ast.parse((ROOT / "layerscope_jax" / file).read_text())
        found = [node for node in tree.body if getattr(node, "name", None) == name]
        assert found, f"{file} has no {name}"
        if method:
            assert method in {getattr(node, "name", None) for node in found[0].body}, f"{name}.{method}"


ABOUT_OTHERS = ("benchmarks", "CHANGELOG")
"""Parts of the names of pages that name options of other programs, or options that are gone."""


@pytest.mark.parametrize(
    "page", [page for page in PAGES if not any(part in shown(page) for part in ABOUT_OTHERS)], ids=shown
)
def test_named_options_exist(page):
    ours = {f"--{field.name.replace('_', '-')}" for c in COMMANDS.values() for field in dataclasses.fields(c)}
    switches = [field for c in COMMANDS.values() for field in dataclasses.fields(c) if field.default is True]
    ours |= {f"--no-{field.name.replace('_', '-')}" for field in switches}
    benchmarks = [f"benchmarks.bench_{name}" for name in ("families", "peers", "serving")]
    modules = ("layerscope_jax.cli.routing", "predictor.train", "predictor.scorecard", "benchmarks.harness")
    for module in (*modules, *benchmarks):
        ours |= options_of(module)
    foreign = {"--cpu-moe", "--check"}  # of llama.cpp and ruff
    assert set(OPTION.findall(prose(page))) <= ours | COMMON_OPTIONS | foreign
