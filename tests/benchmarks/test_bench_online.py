"""The benchmark of online tuning runs, and writes what it says. No time is checked."""

import json
from dataclasses import replace

import pytest
from helpers import MACHINE
from synthetic import untrained, write_trace

from benchmarks import bench_online

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_bench_online(tmp_path, capsys):
    trace = write_trace(tmp_path / "trace", heldout=16, tokens=32)
    untrained(trace).save(tmp_path / "predictor")
    options = bench_online.Options(
        quick=True,
        traces=trace.folder,
        predictor=tmp_path / "predictor",
        domains=("verse", "letters"),
        json=tmp_path / "online.json",
    )
    bench_online.main(options)
    result = json.loads(options.json.read_text())
    assert result["benchmark"] == "online"
    assert result["machine"].keys() == MACHINE
    without, tuned = result["rows"]
    assert without["tried"] == 0 < tuned["tried"] <= len(tuned["tries"])
    for row in result["rows"]:
        for name in ("error", "error_ahead"):
            assert row[name].keys() == result["spans"].keys()
            assert all(0 < error < 1 for error in row[name].values())
    assert "just back" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected rows of prose, got none"):
        bench_online.main(replace(options, domains=("verse", "prose")))


def test_bench_online_says_when_there_are_too_few_rows(tmp_path):
    trace = write_trace(tmp_path / "trace")
    with pytest.raises(
        SystemExit, match="expected 256 held-out rows of verse and of letters or more, got 96"
    ):
        bench_online.main(bench_online.Options(traces=trace.folder, domains=("verse", "letters")))
