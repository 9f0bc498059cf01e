"""The benchmark of a step's parts runs, and says what it found."""

import json

import pytest

from benchmarks import bench_step_time

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_it_takes_a_step_apart(tmp_path, capsys):
    file = tmp_path / "step_time.json"
    bench_step_time.main(bench_step_time.Options(quick=True, formats=("int8",), json=file))
    [row] = json.loads(file.read_text())["rows"]
    assert (row["format"], row["batch"]) == ("int8", 1)
    assert all(ms["median"] > 0 for ms in row["ms"].values())
    # 1 layer of 4 of 32 experts: three matrices of 32 x 32 in 8 bits with a scale of 4 bytes for each row.
    assert row["bytes"]["experts"] == 4 * (3 * 32 * 32 + 3 * 32 * 4)
    assert row["compiled_while_timed"] == 0
    assert "reading experts" in capsys.readouterr().out
