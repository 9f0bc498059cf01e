"""The benchmark of starting from another predictor tells what each start and number of tokens gave."""

import json
from dataclasses import replace

import jax
import pytest
from synthetic import untrained, write_trace

from benchmarks import bench_transfer

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_bench_transfer(tmp_path, capsys, monkeypatch):
    """Training has tests of its own, and takes long: here it gives what it begins with."""
    trace = write_trace(tmp_path / "trace", documents=60, tokens=32)
    asked = []
    monkeypatch.setattr(bench_transfer, "train", lambda config: asked.append(config) or untrained(trace))
    options = bench_transfer.Options(
        traces=trace.folder,
        start_from=(tmp_path / "other",),
        tokens=(1024, 2048),
        look_ahead=2,
        json=tmp_path / "transfer.json",
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as Optax needs
        bench_transfer.main(replace(options, quick=True))
    result = json.loads((tmp_path / "transfer.json").read_text())
    starts = {row["start"]: row for row in result["rows"]}
    assert list(starts) == ["nothing", str(tmp_path / "other")]
    assert [(config.start_from, config.tokens) for config in asked] == [
        (None, 1024),
        (tmp_path / "other", 1024),
    ]
    assert [list(row["recall"]) for row in starts.values()] == [["1024"], ["1024"]]
    assert result["own"] == starts["nothing"]["recall"]["1024"]
    assert starts["nothing"]["own"] == 1024
    assert "Recall in %, mean over horizons" in capsys.readouterr().out
