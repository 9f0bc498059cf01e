"""The benchmark of exact numerics runs, and says what it found."""

import json

import pytest

from benchmarks import bench_exact

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_it_compares_both_ways(tmp_path, capsys):
    file = tmp_path / "exact.json"
    bench_exact.main(bench_exact.Options(quick=True, shapes=("grouped",), dtypes=("float32",), json=file))
    result = json.loads(file.read_text())
    [row] = result["rows"]
    assert (row["shape"], row["dtype"], row["batch"]) == ("grouped", "float32", 1)
    assert set(row["exact/auto"]) == {"prefill", "decode"}
    assert all(
        row["tokens_per_s"][way][part] > 0 for way in ("auto", "exact") for part in ("prefill", "decode")
    )
    assert row["same_tokens"] == 1
    assert "exact/auto" in capsys.readouterr().out
