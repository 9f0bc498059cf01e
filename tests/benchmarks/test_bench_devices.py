"""Several simulated cards, in one quick run."""

import json

from helpers import MACHINE

from benchmarks import bench_devices


def test_cards_are_compared_and_written(tmp_path, capsys):
    file = tmp_path / "devices.json"
    bench_devices.main(bench_devices.Options(quick=True, json=file, policies=("presched", "lru")))
    result = json.loads(file.read_text())
    assert result["machine"].keys() == MACHINE
    assert {(row["devices"], row["root_link"] is None) for row in result["rows"]} == {
        (1, True),
        (2, True),
        (2, False),
    }
    for row in result["rows"]:
        assert 0 < row["bound_s"] <= row["step_s"] * (1 + 1e-9)
    assert "2, one root" in capsys.readouterr().out
