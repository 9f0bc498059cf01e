"""Measuring a machine: what is in a profile, that the budget is kept to and that nothing is left behind."""

import threading
from contextlib import contextmanager
from dataclasses import replace

import jax
import pytest
from disk_models import on_disk
from helpers import TINY, copying_by, in_time, random_model

from layerscope_jax import Engine, ExpertId, OffloadConfig
from layerscope_jax.offload.executors import SharedExperts
from layerscope_jax.offload.host_experts import HostExperts
from layerscope_jax.offload.link import Transfers
from layerscope_jax.offload.slotted import SlottedExperts
from layerscope_jax.offload.staged import host_parts
from layerscope_jax.profiling import calibrate as profiling
from layerscope_jax.profiling import disk_costs, jobs
from layerscope_jax.profiling import measure as calibration
from layerscope_jax.profiling.calibrate import calibrate
from layerscope_jax.profiling.jobs import Jobs
from layerscope_jax.profiling.machine_profile import MachineProfile
from layerscope_jax.profiling.measure import Points, busy, others, tables
from layerscope_jax.support import machine
from layerscope_jax.support.errors import TransferError

pytestmark = pytest.mark.usefixtures("quick_compiles")

SMALL = replace(
    TINY,
    num_experts=6,
    hidden_size=36,
    moe_intermediate_size=28,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=18,
    qk_norm="all",
)
POINTS = Points(tokens=(2,), decode=(1,), prefill=(4,))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few points, as each compiles something, and few rounds."""
    monkeypatch.setattr(calibration, "ROUGH", POINTS)
    monkeypatch.setattr(calibration, "ROUNDS_S", 0.0)
    monkeypatch.setattr(disk_costs, "READS_S", 0.0)
    monkeypatch.setattr(calibration, "BUSY_TOKENS", 2)
    monkeypatch.setattr(machine, "MOST_BYTES", 2**20)


@contextmanager
def rooms(model, bandwidth=None, copy=jax.device_put):
    device, *_, host_device = jax.devices()
    host = HostExperts(model.bank, host_device, threads=2)
    transfers = Transfers(model.bank, device, bandwidth, copy)
    try:
        yield host, transfers
    finally:
        transfers.close()
        host.close()


@pytest.fixture(scope="module")
def small():
    """A model whose experts have shapes of their own."""
    return random_model(SMALL)


def test_profile_of_this_machine(small):
    bandwidth = 10_000_000
    with rooms(small, bandwidth) as (host, transfers):
        profile = calibration.measure(small, host, transfers, 24)
        assert transfers.arrivals() == ({}, [])
    assert profile.layer_ms.tokens == (1, 4)
    for tokens in (profile.host_ms, profile.device_ms):
        assert tokens.tokens == POINTS.tokens
    for measured in (profile.host_ms, profile.device_ms, profile.layer_ms):
        assert all(ms > 0 for ms in measured.ms)
        assert list(measured.ms) == sorted(measured.ms)
    # The link was measured as it is used: a paced copy takes its time.
    assert profile.transfer_ms >= 0.99e3 * small.bank.expert_bytes / bandwidth
    assert jax.devices()[0].device_kind in profile.source


@pytest.fixture
def most(monkeypatch, small):
    """The most bytes of expert weights on the device, whenever some are computed or copied there."""
    bank = small.bank
    device = jax.devices()[0]
    shapes = {matrix.shape for matrix in bank.layers[0][0]}
    seen, alone = [0], threading.Lock()

    def look():
        with alone:  # who looks holds all arrays for a moment, also those that a thread is done with
            seen[0] = max(seen[0], on_device())

    def on_device():
        found = {  # by address: JAX may have several arrays for one buffer
            array.unsafe_buffer_pointer(): array.nbytes
            for array in jax.live_arrays()
            if array.shape in shapes and array.device == device and array.sharding.memory_kind == "device"
        }
        return sum(found.values())

    assert on_device() == 0
    run = SharedExperts.run

    def looking(*arguments):
        look()
        return run(*arguments)

    def copy(array, sharding):
        copied = jax.device_put(array, sharding)
        look()
        return copied

    monkeypatch.setattr(SharedExperts, "run", looking)
    return copy, seen, on_device


@pytest.mark.parametrize(("slots", "experts"), [(0, 1), (3, 3)])
def test_measuring_keeps_to_the_budget(small, most, slots, experts):
    """With no room at all it takes that of one expert."""
    copy, seen, on_device = most
    with rooms(small, copy=copy) as (host, transfers):
        calibration.measure(small, host, transfers, slots)
    assert 0 < seen[0] <= experts * small.bank.expert_bytes
    assert on_device() == 0


def test_what_an_accelerator_runs_is_measured(small, monkeypatch):
    """There rows are donated from call to call, and no job may take another's; experts are in slots."""
    monkeypatch.setattr(jobs, "device_experts", lambda device, cpu: SlottedExperts(device, cpu.format))
    with rooms(small) as (host, transfers):
        found = calibration.measure(small, host, transfers, 40)
    assert min(*found.device_ms.ms, *found.host_ms.ms, *found.layer_ms.ms) > 0


def test_an_engine_measures_within_its_budget(small, most):
    copy, seen, _ = most
    budget = 5 * small.bank.expert_bytes
    with copying_by(copy), Engine(small, OffloadConfig(device_budget=budget, policy="fiddler")):
        assert 0 < seen[0] <= budget


@pytest.mark.parametrize(
    ("slots", "resident", "arriving"), [(0, 1, 1), (2, 1, 1), (5, 2, 3), (9, 5, 4), (40, 16, 16)]
)
def test_resident_and_arriving_experts_share_the_room(slots, resident, arriving):
    model = random_model(SMALL, num_experts=20)  # more than are in one job
    with rooms(model) as (host, transfers):
        found = Jobs(model, host, transfers, slots)
        assert (found.resident, found.arriving, found.computed) == (resident, arriving, 16)
        assert found.roomy == (slots >= 2)
        # Where there is room for one expert, nothing that puts one there runs beside another.
        assert [len(others(found, part)) for part in ("host", "device", "link", "layer")] == (
            [2, 2, 2, 1] if slots >= 2 else [1, 1, 1, 1]
        )


def test_jobs_do_their_work(small):
    with rooms(small) as (host, transfers):
        found = Jobs(small, host, transfers, 40)
        found.host(2)(0)
        assert (host.stats.experts, host.stats.tokens) == (6, 12)
        found.link(5)(7)
        assert transfers.stats.demand_bytes == 5 * small.bank.expert_bytes
        for shape in ((1, 1, 96), (1, 4, 4)):
            job = found.layer(*shape)
            job(0)
            job(1)  # its cache was donated, and came back


def test_the_link_is_timed_while_other_devices_copy_too(small, monkeypatch):
    near, copied, copy = jax.devices()[1], [], jax.device_put

    def counting(tree, to):
        if getattr(to, "device_set", ()) == {near}:
            copied.append(tree)
        return copy(tree, to)

    monkeypatch.setattr(jobs.jax, "device_put", counting)
    model = small.over([jax.devices()[0], near])
    with Engine(model, OffloadConfig(device_budget=5 * small.bank.expert_bytes, policy="fiddler")):
        assert copied
    copied.clear()
    with rooms(small) as (host, transfers):
        (job,) = Jobs(small, host, transfers, 40, [near]).neighbours()
        job(0), job(13)
    assert [id(tree) for tree in copied] == [id(small.bank[ExpertId(0, 0)]), id(small.bank[ExpertId(1, 0)])]


def test_experts_do_not_count_as_the_rest_of_a_layer(small, monkeypatch):
    """What the host says that their arithmetic took is subtracted, whatever it is."""
    compute = HostExperts.compute

    def early(host, *arguments):
        compute(host, *arguments)
        host.stats.arithmetic_s -= 1000.0

    with rooms(small) as (host, transfers):
        job = Jobs(small, host, transfers, 40).layer(2, 1, 16)
        job(0)
        assert 0 < job(1) < 900
        monkeypatch.setattr(HostExperts, "compute", early)
        assert 900 < job(2) < 1100


def test_what_others_wait_for_the_disk_does_not_count(small, tmp_path, monkeypatch):
    stored = on_disk(small, tmp_path)
    pool, host, transfers = host_parts(stored.bank, jax.devices()[0], jax.devices()[1], 2, host_bytes=10**6)
    wait = transfers.wait

    def long_waits(*arguments):
        pool.stats.host_wait_s += 1000.0
        wait(*arguments)

    try:
        job = Jobs(stored, host, transfers, 4).link(2)
        job(0)
        monkeypatch.setattr(transfers, "wait", long_waits)
        assert 0 < job(1) < 900
    finally:
        transfers.close()
        host.close()
        pool.close()


def test_others_work_while_one_is_timed():
    """Each has begun before, goes on meanwhile and has ended after."""
    counts = {"one": 0, "other": 0}

    def counting(name):
        def job(round):
            counts[name] += 1

        return job

    def look(round):
        before = dict(counts)
        while any(counts[name] == before[name] for name in counts) and len(threading.enumerate()) > idle:
            threading.Event().wait(0.001)

    idle = threading.active_count() + 1  # in_time's own
    (measured,) = in_time(lambda: tables({1: look, 2: look}, [[counting("one"), counting("other")]]))
    assert measured.tokens == (1, 2)
    assert min(counts.values()) > 2 * calibration.ROUNDS
    assert threading.active_count() == idle - 1


def test_what_goes_wrong_beside_is_said():
    def fails(round):
        raise TransferError("broken")

    def run():
        with busy([fails]):
            pass

    with pytest.raises(TransferError, match="broken"):
        in_time(run)


def test_noise_makes_no_time_shorter_with_more_tokens(monkeypatch):
    monkeypatch.setattr(calibration, "timed_ms", lambda job, beside, share: job)
    (measured,) = tables({1: 3.0, 2: 1.0, 4: 5.0, 8: 4.0}, [[]])
    assert measured.ms == (1.0, 1.0, 4.0, 4.0)


@pytest.mark.parametrize("budget", [3, None])
def test_calibrate(small, tmp_path, budget):
    bank = small.bank
    profile = profiling.calibrate(
        small,
        device_budget=None if budget is None else budget * bank.expert_bytes,
        emulated_link_bandwidth="50MB",
        points=POINTS,
        contexts=(8, 4096),
    )
    profile.check(small, 50_000_000)
    assert (profile.slots, profile.emulated_link_bandwidth, profile.name) == (budget, 50_000_000, "olmoe")
    details = profile.details
    busy = profile.to_json()["costs"]
    for measured in (busy, busy["alone"]):
        assert measured["host_ms"]["tokens"] == measured["device_ms"]["tokens"] == [2]
        assert measured["layer_ms"]["tokens"] == [1, 4]
        assert measured["transfer_ms"] >= 0.99e3 * bank.expert_bytes / 50e6
    sizes = [1, 2] if budget else [1, 2, 4]
    for sent in details["transfer_by_size"].values():
        assert sent["experts"] == sizes
        assert sent["bytes"] == [size * bank.expert_bytes for size in sizes]
        assert all(ms >= 0.99e3 * size / 50e6 for ms, size in zip(sent["ms"], sent["bytes"], strict=True))
    assert list(details["layer_ms_by_context"]) == ["8"]  # the model is made for 96 positions
    assert details["layer_ms_by_context"]["8"]["together"]["tokens"] == [1]
    assert details["memory"]["host_read_bytes_per_s"] > 0
    assert 0 < details["memory"]["host_free_bytes"] <= profile.machine["memory_bytes"]
    profile.save(tmp_path / "profile.json")
    assert MachineProfile.load(tmp_path / "profile.json") == profile


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_budget": 10}, "must hold an expert of 12096 B, got 10"),
        ({"device_budget": "much"}, "device_budget must be a size"),
        ({"emulated_link_bandwidth": 0}, "emulated_link_bandwidth must be more than 0"),
    ],
)
def test_calibrate_refuses(small, settings, message):
    with pytest.raises(ValueError, match=message):
        profiling.calibrate(small, **settings)


def test_the_disk_is_measured_where_experts_are_read_from_it(small, tmp_path):
    stored = on_disk(small, tmp_path)
    size = stored.bank.expert_bytes
    profile = calibrate(stored, host_budget=3 * size, points=POINTS, contexts=())
    assert profile.costs.read_ms > 0
    assert profile.costs.read_start_ms >= 0
    assert profile.costs.alone.read_ms == profile.costs.read_ms
    profile.save(tmp_path / "profile.json")
    again = MachineProfile.load(tmp_path / "profile.json")
    assert again.costs == profile.costs
    config = OffloadConfig(device_budget=4 * size, host_budget=3 * size, policy="fiddler", profile=again)
    with Engine(stored, config) as engine:
        assert engine.runner.costs.read_ms == profile.costs.read_ms
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("layerscope-disk")]
