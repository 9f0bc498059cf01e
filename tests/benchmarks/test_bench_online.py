"""The benchmark of online tuning refuses a trace with too few rows; tuning itself has tests of its own."""

import pytest
from synthetic import write_trace

from benchmarks import bench_online


def test_bench_online_says_when_there_are_too_few_rows(tmp_path):
    trace = write_trace(tmp_path / "trace")
    with pytest.raises(
        SystemExit, match="expected 256 held-out rows of verse and 384 of letters or more, got 96"
    ):
        bench_online.main(bench_online.Options(traces=trace.folder, domains=("verse", "letters")))
