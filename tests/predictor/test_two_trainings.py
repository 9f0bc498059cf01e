"""Training and fitting where another run is at it."""

import sys

import pytest
from synthetic import write_trace

from layerscope_jax.support.locks import locked, locked_folder
from predictor import fitted
from predictor import train as module
from predictor.train import TrainConfig, train


def test_what_training_needs_and_is_not_installed_is_named(tmp_path, monkeypatch):
    trace = write_trace(tmp_path / "trace")
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(
        ValueError, match=r"Orbax, which is not installed: pip install 'layerscope-jax\[train\]'$"
    ):
        train(TrainConfig(traces=trace.folder, out=tmp_path / "run", look_ahead=1), progress=False)


HOLDER = r"being written by another run \(process \d+ on \S+, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\)"


def listing(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def test_training_and_fitting(tmp_path, capsys, monkeypatch):
    trace = write_trace(tmp_path / "trace")
    with locked_folder(tmp_path / "run"):
        before = listing(tmp_path)
        with pytest.raises(ValueError, match=HOLDER):
            train(TrainConfig(traces=trace.folder, out=tmp_path / "run", look_ahead=1), progress=False)
        monkeypatch.setattr(sys, "argv", ["train", f"--traces={trace.folder}", f"--out={tmp_path / 'run'}"])
        with pytest.raises(SystemExit) as stopped:
            module.main()
        assert stopped.value.code == 2
        assert listing(tmp_path) == before
    folder = tmp_path / "predictor"
    folder.mkdir()
    with locked(folder / fitted.FILE), pytest.raises(ValueError, match=HOLDER):
        fitted.load_or_fit(folder, trace, (1,), 100, progress=False)
