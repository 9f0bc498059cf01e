"""What do many workers on a Ray cluster cost, beside plain processes that do the same?

Both complete the same shards with the same class of worker, one thread each. The plain processes take shards
from a queue that all share, and each writes its lines to a file of its own: the least that anybody would do,
and nobody notices a process that is lost. Models are loaded and programs compiled before anything is timed.
Also measured is how many lines a second go through the process that runs a job, from workers that have them
ready. Where other programs run beside, times say little: the CPU time that the cluster and the process of the
job take beside that of the workers says what Ray costs where all cores are busy.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from benchmarks import harness
from layerscope_jax import OffloadConfig
from layerscope_jax.cli.demo import SHIPPED, read_demo_prompts
from layerscope_jax.distributed.cluster import RayCluster, connected
from layerscope_jax.distributed.crew import Crew
from layerscope_jax.distributed.placing import Place
from layerscope_jax.distributed.shards import expected_tokens, shards_of
from layerscope_jax.distributed.worker import Beat, Failure, Identity, Job, Limits, Worker
from layerscope_jax.generation.prompt_files import Row, rows_of

LINE_BYTES = 2048
"""Of the lines of workers that have them ready."""


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """What to measure."""

    checkpoint: Path = SHIPPED
    workers: tuple[int, ...] = (1, 2, 4)
    rows: int = 64
    new_tokens: int = 16
    slots: int = 4
    rounds: int = 5
    lines: int = 100_000
    """Lines that go through one process."""


class Pinned(Worker):
    """A worker of one thread, on one core; workers take the cores in turns."""

    def __init__(self, job: Job, place: Place):
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[place.number % len(cores)]})
        super().__init__(job, place._replace(of=1))


class Ready:
    """A worker whose lines are ready."""

    def __init__(self, job: Job, place: Place):
        self._line = b"x" * (LINE_BYTES - 1) + b"\n"

    def start(self) -> Iterator[Identity]:
        yield Identity({}, "nothing", os.getpid())

    def run(self, rows: Sequence[tuple[int, Any]], limits: Limits) -> Iterator[Beat]:
        yield Beat(tuple((number, self._line, False) for number, _ in rows), len(rows))


@dataclass(frozen=True)
class Located:
    """A row that is no more than its place."""

    where: str


def work_of(options: Options) -> tuple[list[Row], list[int], Limits]:
    """Returns rows, their expected tokens, and what they need of an engine."""
    known = [row["prompt"] for row in read_demo_prompts()]
    settings = {"max_new_tokens": options.new_tokens, "ignore_eos": True}
    records = [("", {"prompt": known[index % len(known)], "id": index}) for index in range(options.rows)]
    rows = rows_of(records, settings)
    # A letter is a token at most: the benchmark needs no better guess.
    tokens = [expected_tokens(row.request, len(str(row.request.prompt))) for row in rows]
    return rows, tokens, Limits(max(tokens), options.slots)


def plain_process(job: Job, place: Place, limits: Limits, shards: Any, told: Any, folder: str) -> None:
    """What a plain process does: it takes shards until there is None, and writes lines to its file."""
    worker = Pinned(job, place)
    for said in worker.start():
        assert isinstance(said, Identity), said
    told.put(0)
    with (Path(folder) / f"{place.number}.jsonl").open("ab", buffering=0) as file:
        while (rows := shards.get()) is not None:
            for said in worker.run(rows, limits):
                assert not isinstance(said, Failure), said
                for _, line, _ in said.lines:
                    file.write(line)
            told.put(len(rows))


class Plain:
    """Plain processes that share a queue; a context manager."""

    def __init__(self, job: Job, places: Sequence[Place], limits: Limits, folder: str):
        spawned = multiprocessing.get_context("spawn")
        self._shards, self._told = spawned.Queue(), spawned.Queue()
        shared = (limits, self._shards, self._told, folder)
        self._processes = [
            spawned.Process(target=plain_process, args=(job, place, *shared)) for place in places
        ]
        for process in self._processes:
            process.start()
        for _ in self._processes:
            self._told.get()

    def work(self, shards: Sequence[tuple[int, ...]], rows: Sequence[Row]) -> None:
        """Has all rows completed."""
        for shard in shards:
            self._shards.put([(number, rows[number]) for number in shard])
        left = sum(map(len, shards))
        while left:
            left -= self._told.get()

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        for _ in self._processes:
            self._shards.put(None)
        for process in self._processes:
            process.join()


def race(ray: Any, job: Job, options: Options, count: int) -> dict[str, Any]:
    """Times `count` workers on the cluster, and as many plain processes, in turns."""
    rows, tokens, limits = work_of(options)
    shards = shards_of(tokens, count, options.slots)
    each = [tuple(range(options.slots))] * count  # warms every worker up, whoever takes what
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        crew = Crew(RayCluster(ray, job, Pinned), workers=count, timeout_s=600, retries=0)
        stack.enter_context(crew)
        places = [worker_place(ray, number, count) for number in range(count)]
        plain = stack.enter_context(Plain(job, places, limits, folder))
        file = stack.enter_context((Path(folder) / "all.jsonl").open("ab", buffering=0))

        shares: list[float] = []

        def by_ray() -> None:
            pids = {worker.identity.pid for worker in crew.all if worker.identity is not None}
            before = cpu_seconds()
            crew.work(shards, rows, limits, lambda number, line, failed: file.write(line))
            after = cpu_seconds()
            took = {pid: after[pid] - before.get(pid, 0.0) for pid in after}
            own = sum(taken for pid, taken in took.items() if pid in pids)
            shares.append((sum(took.values()) - own) / own if own else 0.0)

        def by_processes() -> None:
            plain.work(shards, rows)

        while len(crew.all) < count or not all(worker.rows for worker in crew.all):
            crew.hire(count)
            by_ray()
        for _ in range(3):  # so that each plain process has had one of all kinds of shards
            plain.work(each, rows)
            by_processes()
        names: dict[str, Callable[[], None]] = {"ray": by_ray, "processes": by_processes}
        samples = harness.measure(names, options.rounds, warm_ups=1)
        shares = shares[-options.rounds :]
    seconds = {name: sample.parts["seconds"] for name, sample in samples.items()}
    return {
        "workers": count,
        "shards": len(shards),
        "rows_per_s": {
            name: harness.spread(options.rows / taken for taken in times) for name, times in seconds.items()
        },
        "overhead": harness.ratio(seconds["ray"], seconds["processes"]),
        "cpu_beside_workers": harness.spread(shares),
    }


def cpu_seconds() -> dict[int, float]:
    """Returns the CPU time (s) of this process and all below it, by process; empty without /proc."""
    parents: dict[int, int] = {}
    times: dict[int, float] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        parents[int(stat.parent.name)] = int(fields[1])
        times[int(stat.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    own, size = {os.getpid()}, 0
    while len(own) > size:
        size = len(own)
        own |= {pid for pid, parent in parents.items() if parent in own}
    return {pid: times[pid] for pid in own if pid in times}


def worker_place(ray: Any, number: int, count: int) -> Place:
    """Returns a place on the first node."""
    job = Job(checkpoint="", config=OffloadConfig())
    return Place(RayCluster(ray, job, Ready).nodes()[0], number, count)


def lines_per_s(ray: Any, options: Options) -> dict[str, Any]:
    """Returns how many lines a second one process takes and writes."""
    size = 256
    rows = [Located("")] * options.lines
    shards = [
        tuple(range(start, min(start + size, options.lines))) for start in range(0, options.lines, size)
    ]
    job = Job(checkpoint="", config=OffloadConfig())
    with (
        tempfile.TemporaryFile(buffering=0) as file,
        Crew(RayCluster(ray, job, Ready), workers=2, timeout_s=600, retries=0) as crew,
    ):
        crew.work(shards[:8], rows, Limits(1, 1), lambda *_: None)
        began = time.perf_counter()
        crew.work(shards, rows, Limits(1, 1), lambda number, line, failed: file.write(line))
        taken = time.perf_counter() - began
    return {"lines": options.lines, "line_bytes": LINE_BYTES, "per_s": round(options.lines / taken)}


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        changes: Any = {"workers": (1,), "rows": 4, "new_tokens": 2, "slots": 2, "rounds": 1, "lines": 512}
        options = replace(options, **changes)
    # Ray lets its workers give way to other programs; beside plain processes they would wait for those.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    record, progress, rows = harness.machine(), Console(stderr=True), []
    config = OffloadConfig(max_num_seqs=options.slots, host_threads=1)
    job = Job(checkpoint=str(options.checkpoint), config=config, model="benchmark")
    with connected("local") as ray:
        for count in options.workers:
            rows.append(race(ray, job, options, count))
            progress.print(f"measured {count} workers: {json.dumps(rows[-1]['overhead'])}")
        through = lines_per_s(ray, options)
    harness.print_table(
        f"Rows/s, {options.rows} rows of {options.new_tokens} new tokens, medians",
        ("workers", "shards", "Ray", "processes", "time of Ray to processes", "p90", "CPU beside workers"),
        [
            (
                row["workers"],
                row["shards"],
                *(f"{row['rows_per_s'][name]['median']:.2f}" for name in ("ray", "processes")),
                f"{row['overhead']['median']:.3f}",
                f"{row['overhead']['p90']:.3f}",
                f"{row['cpu_beside_workers']['median']:.1%}",
            )
            for row in rows
        ],
    )
    print(
        f"\nlines through one process: {through['per_s']:,} a second of {through['line_bytes']:,} bytes each"
    )
    return harness.finish(
        options,
        {
            "benchmark": "distributed",
            "quick": options.quick,
            "machine": record,
            "rows_of_a_job": options.rows,
            "new_tokens": options.new_tokens,
            "slots": options.slots,
            "rounds": options.rounds,
            "rows": rows,
            "lines_through_one_process": through,
        },
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
