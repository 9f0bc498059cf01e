"""`layerscope demo`: what it reports, how that looks, what it refuses."""

import json
import sys
from io import StringIO

import pytest
from command_lines import refusal
from helpers import one_jit
from rich.console import Console

import layerscope_jax
from layerscope_jax.cli import demo, demo_view
from layerscope_jax.cli import main as cli
from layerscope_jax.cli.report_runs import runs_of, unknown

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def timeline(tmp_path_factory):
    """The timeline of the runs of `report`."""
    return tmp_path_factory.mktemp("demo") / "runs.json"


@pytest.fixture(scope="module")
def report(tiny, timeline):
    """What `demo --json` prints; nothing else may stand beside it."""
    found = StringIO()
    with one_jit(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", found)
        code = cli.main(
            [
                "demo",
                "--json",
                str(tiny),
                "--policy=lru",
                "host-only",
                "--budget-share=0.6",
                "--max-new-tokens=3",
                f"--timeline={timeline}",
            ]
        )
    assert code == 0
    return json.loads(found.getvalue())


def test_shipped_prompts():
    rows = demo.read_demo_prompts()
    assert len(rows) == len({row["id"] for row in rows}) == 8
    assert {row["domain"] for row in rows} == {
        "novels",
        "verse",
        "speeches",
        "python-source",
        "python-docs",
    }


def test_report(report):
    assert report["exact"] is True
    assert [(run["policy"], run["mode"]) for run in report["runs"]] == [
        ("resident", "whole"),
        ("resident", "decode"),
        ("lru", "layers"),
        ("host-only", "layers"),
    ]
    total = report["model"]["total_expert_bytes"]
    for run in report["runs"]:
        assert {"tokens_per_s", "ttft_s", "tpot_s", "hit_rate", "bytes_moved"} <= run.keys()
        assert run["budget_bytes"] == (total if run["policy"] == "resident" else int(0.6 * total))
        assert run["same_tokens"]
        assert run["programs_compiled"] == 0
    assert [len(row["tokens"]) for row in report["prompts"]] == [3] * 8
    assert {"layerscope-jax", "jax", "python"} <= report["versions"].keys()


def test_its_timeline_holds_every_run(report, timeline):
    """One jitted step is one slice: of its layers nothing is known, and nothing made up."""
    runs = runs_of(timeline)
    policies = [run["policy"] for run in report["runs"]]
    assert [outcome["policy"] for run in runs for outcome in run.outcomes] == policies
    assert [run.outcomes[0]["tpot_s"] for run in runs] == [run["tpot_s"] for run in report["runs"]]
    assert [run.figures.steps["decode"] for run in runs] == [2] * 4
    assert [bool(run.figures.layers) for run in runs] == [False, True, True, True]
    assert "ran as one program each" in unknown(runs[0])[0]


@pytest.mark.parametrize("width", [80, 120])
def test_fits_the_terminal(report, width):
    console = Console(file=StringIO(), width=width, highlight=False)
    demo_view.show(report, console)
    text = console.file.getvalue()
    assert max(map(len, text.split("\n"))) <= width
    assert "…" not in text  # rich cuts cells that do not fit
    text = " ".join(text.split())
    assert "All 4 runs gave the same 24 tokens." in text
    assert "no compilation is in the figures" in text
    assert "With 60% of the experts' bytes on the device" in text


def test_other_tokens_end_in_1(report, monkeypatch, capsys):
    runs = [run | {"same_tokens": run["policy"] != "lru"} for run in report["runs"]]
    monkeypatch.setattr(demo, "compare", lambda *_, **__: report | {"exact": False, "runs": runs})
    monkeypatch.setattr(cli, "open_model", lambda *_, **__: None)
    assert cli.main(["demo"]) == 1
    assert "everything resident: lru." in capsys.readouterr().out
    assert cli.main(["demo", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["exact"] is False


def test_one_jit_may_round_differently(report, tiny, monkeypatch):
    class Rounding(demo.Engine):
        def generate(self, *args, **settings):
            result = super().generate(*args, **settings)
            if result.stats.mode == "whole":
                result.token_ids[0][0] += 1
            return result

    monkeypatch.setattr(demo, "Engine", Rounding)
    with one_jit():
        found = demo.compare(
            layerscope_jax.load(tiny),
            demo.read_demo_prompts(),
            policies=["host-only"],
            max_new_tokens=3,
            budget_share=0.6,
            emulated_link_bandwidth=None,
        )
    assert found["exact"] is True
    assert [run["same_tokens"] for run in found["runs"]] == [False, True, True]
    assert "the same 24 tokens; one jit rounds differently" in demo_view.verdict(found).plain


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--policy", "best"], "policy must be one of"),
        (["--budget-share", "1.5"], "budget-share must lie between 0 and 1, got 1.5"),
        (["--budget-share", "0.1"], "device_budget is too small for policy 'on-demand'"),
        (["--emulated-link-bandwidth", "fast"], "emulated_link_bandwidth must be a size such as '8GiB'"),
        (
            ["--policy", "host-only", "--max-new-tokens", "0"],
            "max_new_tokens must be a whole number in 1..2**31-1, got 0",
        ),
    ],
)
def test_refusals(tiny, capsys, args, message):
    assert message in refusal(capsys, "demo", str(tiny), *args)
