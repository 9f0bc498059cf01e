"""Jobs on a local cluster of Ray, whose processes are killed and stopped during work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import quick_compiling
from helpers import in_time
from light_workers import Light

import layerscope_jax as ls
from layerscope_jax.cli import main as cli
from layerscope_jax.distributed.cluster import RayCluster, connected
from layerscope_jax.distributed.crew import Crew
from layerscope_jax.distributed.job import generate
from layerscope_jax.distributed.tables import read_rows
from layerscope_jax.distributed.worker import Job, Limits
from layerscope_jax.generation.batch_files import CompletionFile

ray = pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]

SLOW = {"device_budget": "70KB", "policy": "on-demand", "emulated_link_bandwidth": "600KB"}
"""A link so slow that rows take a while: what is killed is killed at work."""


@pytest.fixture(scope="module")
def address():
    """The address of a cluster of this machine, to which this process is connected."""
    settings = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        **quick_compiling.ENVIRONMENT,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        with connected("local") as cluster:
            yield cluster.get_runtime_context().gcs_address


TIMEOUT_S = 3
"""Longer than a worker without a model takes for a row on a busy machine."""


def alive(pid):
    """Whether a process runs, or could."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # before it was opened, or between that and reading
        return False
    return state not in "ZX"


def until(true, seconds=240):
    """Waits until something is true; the limit is far beyond what it should take."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def test_four_workers_of_which_one_ends_and_one_hangs(address, tmp_path):
    rows = [f"row {number}" for number in range(20)]
    rows[3], rows[13] = f"end once {tmp_path / 'ended'}", f"hang once {tmp_path / 'hung'}"
    shards = [tuple(range(start, start + 2)) for start in range(0, 20, 2)]
    written, said = [], []

    def work():
        cluster = RayCluster(ray, Job(checkpoint="", config=None), Light)
        with Crew(cluster, workers=4, timeout_s=TIMEOUT_S, retries=2, say=said.append) as crew:
            crew.work(shards, rows, Limits(1, 4), lambda *row: written.append(row))
            return crew

    crew = in_time(work, 240)
    assert sorted(written) == [(n, f"{row} complete\n".encode(), False) for n, row in enumerate(rows)]
    assert [worker.place.number for worker in crew.all[:4]] == [0, 1, 2, 3]
    reasons = [worker.lost for worker in crew.all if worker.lost is not None]
    assert f"no new token for {TIMEOUT_S} s" in reasons
    assert len(reasons) == len(said) == 2
    hung = int((tmp_path / "hung").read_text())
    until(lambda: not alive(hung))  # a stopped process would keep the memory of its engine


@pytest.mark.usefixtures("quick_compiles")
def test_a_job_whose_own_process_and_then_a_worker_are_killed(address, tiny, tmp_path, monkeypatch):
    draws = np.random.default_rng(0)
    rows = [
        {"prompt": draws.integers(1, 600, 1 + n % 5).tolist(), "max_new_tokens": int(draws.integers(3, 7))}
        for n in range(14)
    ]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SLOW.items()]
    options += ["--numerics=exact", "--max-num-seqs=2", "--ignore-eos", "--workers=1", f"--ray={address}"]
    command = [sys.executable, "-m", "layerscope_jax.cli", "generate", str(tiny), f"--prompts={prompts}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*command, f"--out={out}", *options], env=environment) as driver:
        until(lambda: out.exists() and out.read_bytes().count(b"\n") >= 3)
        driver.kill()
    before = [json.loads(line) for line in out.read_bytes().splitlines()[:3]]

    pids, killed, write = [], [], CompletionFile.write
    compare = Crew._compare
    monkeypatch.setattr(
        Crew, "_compare", lambda crew, worker: (pids.append(worker.identity.pid), compare(crew, worker))
    )

    def killing(file, line):
        write(file, line)
        if len(pids) > 1 and not killed:
            killed.append(pids[1])
            os.kill(pids[1], signal.SIGKILL)

    monkeypatch.setattr(CompletionFile, "write", killing)
    config = ls.OffloadConfig(**SLOW, numerics="exact", max_num_seqs=2)
    report = generate(prompts, model=tiny, out=out, config=config, workers=2, ignore_eos=True)

    assert 3 <= report.done_before < 14
    assert killed
    assert [bool(worker.lost) for worker in report.workers].count(True) == 1
    assert report.done_before + sum(worker.rows for worker in report.workers) == 14
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in found] == list(range(14))
    assert [line for line in found if line["id"] in {line["id"] for line in before}] == sorted(
        before, key=lambda line: line["id"]
    )
    alone = ls.OffloadConfig(numerics="exact")
    with ls.Engine(ls.load(tiny), alone) as engine:
        requests = [ls.Request(**row, ignore_eos=True) for row in rows]
        assert [line["token_ids"] for line in found] == engine.generate(requests).token_ids


@pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")  # followed by another program
def test_a_server_that_goes_takes_no_row_with_it(address, tmp_path):
    """Another raylet is another server to Ray; here both are of this machine."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    def added(name):
        before = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        params = RayParams(gcs_address=address, num_cpus=1, node_name=name, include_dashboard=False)
        node = Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False, connect_only=False)
        until(lambda: before < {node["NodeID"] for node in ray.nodes() if node["Alive"]})
        return node

    second = added("second")
    rows = [f"slow row {number}" for number in range(20)]
    shards = [tuple(range(start, start + 2)) for start in range(0, 20, 2)]
    written, said, gone = [], [], []

    def write(number, line, failed):
        written.append(number)
        of_second = [worker for worker in crew.all if worker.place.node.name == "second"]
        if not gone and of_second and of_second[0].rows:
            gone.append(second)
            second.kill_all_processes(check_alive=False, allow_graceful=False)

    cluster = RayCluster(ray, Job(checkpoint="", config=None), Light)
    with Crew(cluster, workers=2, timeout_s=60, retries=2, say=said.append) as crew:
        in_time(lambda: crew.work(shards, rows, Limits(1, 4), write), 240)
    assert gone
    assert sorted(written) == list(range(20))
    assert {worker.place.node.name for worker in crew.all} > {"second"}


def test_what_is_no_cluster_is_said(address, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Call me"}\n')
    command = ["generate", "shipped", f"--prompts={prompts}", "--ray=ray://127.0.0.1:1"]
    assert cli.main([*command, f"--out={tmp_path / 'out.jsonl'}"]) == 2
    assert "error: ray://127.0.0.1:1: expected the address of a cluster that this" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.filterwarnings("ignore")  # Ray Data warns of its own settings
def test_a_dataset_has_its_rows_in_order(address):
    data = pytest.importorskip("ray.data")
    items = [{"prompt": f"row {number}", "n": None, "seed": number} for number in range(50)]
    rows = read_rows(data.from_items(items, override_num_blocks=4), {"max_new_tokens": 3})
    assert [(row.id, row.request.prompt, row.request.seed) for row in rows] == [
        (number, f"row {number}", number) for number in range(50)
    ]
    with pytest.raises(
        ValueError, match="the dataset: expected a column 'text' of prompts, got 'prompt', 'n'"
    ):
        read_rows(data.from_items(items[:1]), {}, column="text")
