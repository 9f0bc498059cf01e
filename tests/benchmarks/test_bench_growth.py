"""How costs grow is measured, written and drawn, along three axes of small sizes."""

import importlib.util
import json
from dataclasses import replace

import pytest
from helpers import MACHINE

from benchmarks import bench_growth

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_bench_growth(tmp_path, capsys):
    file, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    drawn = importlib.util.find_spec("matplotlib") is not None
    options = bench_growth.Options(
        quick=True, policies=("host-only", "lru"), json=file, plot=plot if drawn else None
    )
    bench_growth.main(replace(options, axes=("batch", "prompt", "budget")))
    result = json.loads(file.read_text())
    assert result["benchmark"] == "growth"
    assert result["machine"].keys() == MACHINE
    found = {(row["axis"], row["value"], row["policy"]): row for row in result["rows"]}
    both = [("batch", 2), ("batch", 4), ("prompt", 16), ("prompt", 32)]
    assert found.keys() == {(*at, policy) for at in both for policy in options.policies} | {
        ("budget", 50, "lru"),
        ("budget", 100, "lru"),
    }
    for (axis, value, _), row in found.items():
        tokens = {"batch": 16 * value, "prompt": 4 * value, "budget": 4 * 16}[axis]
        by_time = 1e3 * tokens / row["ms"]["prefill"]["median"]
        assert row["tokens_per_s"]["prefill"]["median"] == pytest.approx(by_time, rel=1e-3)
        for phase in ("prefill", "decode"):
            assert row["work_ms"][phase].keys() == {"dense", "attention", "experts"}
    # Whoever computes them, the same experts are chosen.
    for at in both:
        assert found[(*at, "lru")]["work_ms"] == found[(*at, "host-only")]["work_ms"]
    for grown in result["growth"]:
        assert (grown["work"] > 1) == (grown["axis"] != "budget") or grown["phase"] == "decode"
    assert "steepest step" in capsys.readouterr().out
    if drawn:
        assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="axes are batch, prompt, experts"):
        bench_growth.main(replace(options, axes=("width",)))
