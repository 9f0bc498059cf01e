"""What forecasts are worth is simulated and written, over a link and a disk, and drawn."""

import importlib.util
import json

import pytest
from helpers import MACHINE

from benchmarks import bench_worth


def test_bench_worth(tmp_path, capsys):
    file, plot = tmp_path / "worth.json", tmp_path / "worth.png"
    drawn = importlib.util.find_spec("matplotlib") is not None
    bench_worth.main(
        bench_worth.Options(quick=True, models=("mixtral-8x7b",), json=file, plot=plot if drawn else None)
    )
    result = json.loads(file.read_text())
    assert result["machine"].keys() == MACHINE
    assert [(row["link"], row["batch"]) for row in result["rows"]] == [
        ("", 1),
        ("", 4),
        ("disk", 1),
        ("disk", 4),
    ]
    for row in result["rows"]:
        assert row["step_ms"].keys() == {"none", "gate", "llapor", "perfect"}
        assert min(row["step_ms"].values()) > 0
    by_link = {row["link"]: row["step_ms"]["none"] for row in result["rows"] if row["batch"] == 4}
    assert by_link["disk"] > by_link[""]
    assert "half on a disk" in capsys.readouterr().out
    if drawn:
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_profiles_that_are_not_there_are_said():
    with pytest.raises(SystemExit, match="mixtral-8x7b@pcie4-x16"):
        bench_worth.main(bench_worth.Options(quick=True, models=("phi",)))
