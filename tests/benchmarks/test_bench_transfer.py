"""The benchmark of starting from another model's predictor trains from each start and tells what it took."""

import json

import jax
import pytest
from helpers import once
from synthetic import MODEL, WIDTH, write_trace

from benchmarks import bench_transfer
from predictor import train as module
from predictor.llapor import LLaPor
from predictor.pca import Basis
from predictor.step import first_params, stacks
from predictor.train import TrainConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_bench_transfer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "make_steps", once(module.make_steps))  # both trainings take the same steps
    trace = write_trace(tmp_path / "trace", documents=60, tokens=32)
    groups = TrainConfig(traces=trace.folder, out=tmp_path).groups
    stacked = stacks(MODEL, WIDTH, 2, groups)
    other = LLaPor(MODEL, 2, Basis.load(trace.folder), stacked, first_params(MODEL, stacked, 2, seed=5))
    other.save(tmp_path / "other")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as Optax needs
        bench_transfer.main(
            bench_transfer.Options(
                traces=trace.folder,
                start_from=(tmp_path / "other",),
                tokens=(1024, 2048),
                look_ahead=2,
                quick=True,
                json=tmp_path / "transfer.json",
            )
        )
    result = json.loads((tmp_path / "transfer.json").read_text())
    starts = {row["start"]: row for row in result["rows"]}
    assert list(starts) == ["nothing", str(tmp_path / "other")]
    assert [list(row["recall"]) for row in starts.values()] == [["1024"], ["1024"]]
    assert result["own"] == starts["nothing"]["recall"]["1024"]
    assert starts["nothing"]["own"] == 1024
    assert "Recall in %, mean over horizons" in capsys.readouterr().out
