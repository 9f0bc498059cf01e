"""PreSched is set beside what a policy could reach that knows the future, and one that does not."""

import json

import numpy as np
import pytest
from helpers import MACHINE

from benchmarks import bench_foresight

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_bench_foresight(tmp_path, capsys):
    file = tmp_path / "foresight.json"
    bench_foresight.main(bench_foresight.Options(quick=True, profiles=("mixtral-8x7b",), json=file))
    result = json.loads(file.read_text())
    assert result["machine"].keys() == MACHINE
    [row] = result["rows"]
    assert (row["profile"], row["batch"], row["steps"]) == ("mixtral-8x7b", 4, 2)
    assert (
        0 < max(row["bound_ms"], row["causal_bound_ms"]) < min(row["presched_ms"], row["presched_drawn_ms"])
    )
    assert "knows 8 layers" in capsys.readouterr().out


def test_what_is_drawn_is_each_layers_own_in_another_order():
    counts = np.random.default_rng(0).integers(0, 99, (5, 3, 4))
    found = bench_foresight.drawn(counts, 1)
    for layer in range(3):
        assert sorted(map(tuple, found[:, layer])) == sorted(map(tuple, counts[:, layer]))
    assert (found != counts).any()
