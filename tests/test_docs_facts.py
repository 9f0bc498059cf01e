"""What the pages say is so: figures of the README, messages of troubleshooting, pages of the site."""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
from docs_pages import ROOT, blocks

from tools.site_pages import gather, place_of

RESULTS = ROOT / "benchmarks" / "results"


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def figure_of(row):
    """The figure of a row of the README's table, by the beginning of the row."""
    table = (ROOT / "README.md").read_text()
    [line] = [line for line in table.splitlines() if line.startswith(f"| {row}")]
    return line.split(" | ")[1]


def numbers(text):
    return [float(number) for number in re.findall(r"[\d.]*\d", text.partition("([")[0])]


def test_decode_against_transformers():
    rows = result("families")["rows"] + result("families_others")["rows"]
    ratios = [row["ratios"]["decode"]["hf/engine"]["median"] for row in rows]
    assert numbers(figure_of("decode, all experts")) == [round(min(ratios), 1), round(max(ratios), 1)]
    assert result("families")["machine"]["versions"]["transformers"].startswith("5.24")


def test_decode_against_llama_cpp():
    [row] = [row for row in result("peers_avx2")["rows"] if row["batch"] == 1]
    assert row["dtype"] == "float32"
    ratio = row["to_engine"]["decode"]["llama.cpp"]["median"]
    assert numbers(figure_of("decode of one request")) == [round(ratio, 2)]


def test_packed_experts_against_llama_cpp():
    rows = result("peers_packed")["rows"]
    ratios = {
        part: [row["to_engine"][part]["llama.cpp"]["median"] for row in rows]
        for part in ("prefill", "decode")
    }
    many = [found for row, found in zip(rows, ratios["decode"], strict=True) if row["batch"] >= 8]
    page = (ROOT / "benchmarks" / "answers" / "peers.md").read_text()
    [said] = re.findall(
        r"engine is ([\d.]+) to ([\d.]+) times as fast in prefill, and ([\d.]+) to ([\d.]+) times", page
    )
    expected = [min(ratios["prefill"]), max(ratios["prefill"]), min(many), max(many)]
    assert [float(number) for number in said] == [round(number, 1) for number in expected]


def test_auto_against_the_best():
    ratios = [row["time_to_best"]["median"] for row in result("policies")["rows"] if row["policy"] == "auto"]
    assert len(ratios) == 9
    assert numbers(figure_of("`auto` against")) == [round(min(ratios), 2), round(max(ratios), 2)]


def figures_in(page, pattern):
    """The figures that a page of the benchmarks states where a pattern matches, which it does once."""
    [found] = re.findall(pattern, (ROOT / "benchmarks" / page).read_text())
    return [float(number) for number in ([found] if isinstance(found, str) else found)]


def test_the_share_of_the_bound():
    shares = [
        row["share_of_bound"]
        for file in RESULTS.glob("simulated_*.json")
        for row in json.loads(file.read_text())["rows"]
        if (row["policy"], row["phase"]) == ("presched", "decode")
    ]
    assert len(shares) == 12
    stated = figures_in("README.md", r"`presched` at (\d+) to ([\d.]+)% of the bound")
    assert stated == [round(100 * min(shares)), round(100 * max(shares), 1)]


def test_the_error_of_the_simulator():
    found = result("simulator")["summary"]
    errors = [found[name]["mean"] for name in ("decode_error_with_planning", "decode_error")]
    pattern = r"How far off is the simulator\? \| (\d+)% in the mean with planning counted, (\d+)% without"
    assert figures_in("README.md", pattern) == [round(100 * error) for error in errors]


def of_int4(file):
    """The loss that int4 adds (percent), and its bytes as a share of those of bfloat16."""
    found = result(file)
    share = found["expert_bytes"]["int4"] / found["expert_bytes"]["bfloat16"]
    return round(100 * (found["quality"]["int4"]["loss_to_plain"] - 1), 2), round(share, 2)


def test_quality_and_bytes_of_int4():
    loss, share = of_int4("quantised")
    assert numbers(figure_of("experts in int4")) == [loss, share]
    loss, share = of_int4("quantised_smollm2")
    row = r"\| int4 \| bfloat16 \| ([\d.]+) \| [\d.]+ \| \+([\d.]+)%"
    assert figures_in("answers/quantised.md", row) == [share, loss]


def test_serving():
    of_large = result("serving_444m")["rows"] + result("serving_offload")["rows"]
    [of_small] = result("serving")["rows"]
    assert {row["clients"] for row in (of_small, *of_large)} == {16}
    ratios = sorted(row["throughput_to_generate"]["median"] for row in of_large)
    expected = [
        round(ratio, 2) for ratio in (ratios[0], ratios[-1], of_small["throughput_to_generate"]["median"])
    ]
    pattern = r"16 streaming clients get ([\d.]+) to ([\d.]+) of .* of the small shipped model ([\d.]+),"
    assert figures_in("README.md", pattern) == expected


def test_what_forecasts_save():
    rows = result("worth")["rows"]

    def saved(*batches):
        return [100 * (1 - row["to_none"]["llapor"]) for row in rows if row["batch"] in batches]

    many = saved(*{row["batch"] for row in rows if row["batch"] >= 16})
    pattern = r"up to (\d+)% at batch 4 and (\d+)% at 1; from 16 on ([\d.]+)% in the mean, ([\d.]+)% at most"
    most = [round(max(saved(batch))) for batch in (4, 1)]
    assert figures_in("README.md", pattern) == [*most, round(sum(many) / len(many), 1), round(max(many), 1)]


def test_loading_on_a_gpu():
    stats = [row["stats"] for row in result("h200/real_qwen3")["rows"]]
    rates = [one["bytes_demand"] / (one["link_share"] * one["total_s"]) / 1e9 for one in stats]
    assert numbers(figure_of("experts of Qwen3")) == [round(min(rates)), round(max(rates))]


def texts(folder):
    """Every text of a folder's Python files; `…` stands for what is put into one."""
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_messages_of_the_troubleshooting_page_are_ours():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(messages) > 15
    ours = list(texts(ROOT / "layerscope_jax"))
    unknown = [message for message in messages if not any(message.rstrip("…") in text for text in ours)]
    assert not unknown


def test_the_policy_of_the_page_is_that_of_the_example():
    page, example = ROOT / "docs" / "write_policy.md", ROOT / "examples" / "own_policy.py"
    [block] = [block for block in blocks(page) if "class Twice" in block.text]
    assert block.text.partition("@ls.register_policy")[2].strip() in example.read_text()


def test_every_page_has_its_place_in_the_site(tmp_path):
    gather(tmp_path)
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.md")}
    named = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(named) == len(set(named))
    assert pages == set(named)
    assert place_of("docs/usage.md") == "usage.md"


def test_links_of_the_site_lead_somewhere(tmp_path):
    gather(tmp_path)
    for page in tmp_path.rglob("*.md"):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            there = target.startswith("http") or (page.parent / target).exists()
            assert there, (page.relative_to(tmp_path), target)


def test_the_site_builds_strictly(tmp_path):
    """Where the extra `docs` is installed: every link, anchor, reference and docstring is right."""
    pytest.importorskip("zensical")
    pytest.importorskip("mkdocstrings")
    gather()
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (ROOT / "build" / "site" / "reference" / "engine" / "index.html").exists()
    shutil.rmtree(ROOT / "build" / "site")


ROW = re.compile(r"^\| (\[[\w./-]+\.json\][^|]*)\|(.*)\|$", re.MULTILINE)
"""Of a page's table of its figures: the files, and the cells behind them."""


def test_pages_say_at_which_commit_their_figures_were_made():
    checked = 0
    for page in sorted((ROOT / "benchmarks" / "answers").glob("*.md")):
        for files, cells in ROW.findall(page.read_text()):
            said = cells.rpartition("|")[2].strip()
            if said == "the same":
                continue
            assert re.match(r"[0-9a-f]{7} of \d{4}-\d\d-\d\d\b", said), (page.name, files, said)
            made = [result(name)["machine"] for name in re.findall(r"results/([\w./-]+)\.json", files)]
            assert {each["commit"][:7] for each in made} == {said[:7]}, (page.name, files)
            changed = any(each["changed_since_commit"] for each in made)
            assert changed == ("with local changes" in said), (page.name, files)
            checked += len(made)
    assert checked > 50
