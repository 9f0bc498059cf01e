"""The benchmark of experts on the disk runs, and its candidates give the same tokens."""

import json

import pytest

from benchmarks import bench_disk

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_bench_disk(tmp_path, capsys):
    file = tmp_path / "disk.json"
    bench_disk.main(bench_disk.Options(quick=True, budgets=(50,), json=file, folder=tmp_path))
    result = json.loads(file.read_text())
    rows = {row["candidate"]: row for row in result["rows"]}
    assert list(rows) == ["memory", "on demand", "popularity", "gate", "int4", "mmap"]
    assert rows["on demand"]["read"]["median"] > 0
    assert rows["on demand"]["wasted"]["median"] == 0
    assert result["read_ms"] > 0
    assert "Decode steps with experts on the disk" in capsys.readouterr().out
