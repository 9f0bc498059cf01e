"""The simulated job of a thousand nodes, with eight."""

import json

from helpers import MACHINE

from benchmarks import bench_thousand_nodes


def test_every_case_is_simulated_and_written(tmp_path, capsys):
    file = tmp_path / "thousand.json"
    bench_thousand_nodes.main(bench_thousand_nodes.Options(quick=True, json=file))
    result = json.loads(file.read_text())
    assert result["machine"].keys() == MACHINE
    assert result["rows_of_the_job"] == 8 * 64
    rows = {row["case"]: row for row in result["rows"]}
    assert len(rows) == 13
    for row in rows.values():
        assert 0 < row["efficiency"] < 1
        assert row["makespan_s"] >= row["ideal"]["work_s"]
    usual, slow_storage = rows["by length, guessed"], rows["storage with a tenth of the bandwidth"]
    assert slow_storage["first_row_s"] > usual["first_row_s"]
    assert slow_storage["ideal"]["load_s"] > usual["ideal"]["load_s"]
    assert "in vain" in capsys.readouterr().out
