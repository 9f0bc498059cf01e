"""The disk on a virtual clock: examples by hand, every policy over it, and limits."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_runs import SEEDS, geometry, random_costs, random_demand
from recorded import small_profile, small_routing

from layerscope_jax import POLICIES, HardwareProfile, MachineProfile, TimeTable, simulate_profile
from layerscope_jax.cli import comparison_view
from layerscope_jax.simulation.policies import SIMULATED, run, workloads
from layerscope_jax.simulation.simulator import Workload, simulate

pytestmark = pytest.mark.usefixtures("quick_compiles")

# An expert takes 4 ms on the host, 1 ms on the device, 3 ms to get there, and 5 ms to be read.
COSTS = HardwareProfile(
    host_ms=TimeTable((1,), (4.0,)),
    device_ms=TimeTable((1,), (1.0,)),
    transfer_ms=3.0,
    read_ms=5.0,
    read_start_ms=0.5,
    source="made up",
)


def decode(*counts):
    return Workload(phase="decode", tokens=1, counts=np.array(counts))


def times(policy, workload, slots, host_slots, **changes):
    shape = workload.counts.shape
    made = geometry(shape, slots)
    return simulate(POLICIES[policy](), [workload], made, replace(COSTS, **changes), host_slots=host_slots)[0]


def test_the_host_computes_experts_as_they_are_read():
    """Read until 5.5 and 10.5, computed until 9.5 and 14.5; then both are there; then a third is read."""
    result = times("host-only", decode([[1, 1, 0]], [[1, 1, 0]], [[0, 0, 1]]), 0, 2)
    assert result.step_ms == (14.5, 8.0, 9.5)
    assert (result.bytes_read, result.host_hit_rate) == (9, 2 / 5)
    assert result.disk_wait_s == pytest.approx(1e-3 * (5.5 + 1.0 + 5.5))
    one = times("host-only", decode([[1, 1, 0]], [[1, 1, 0]]), 0, 1)  # each waits for the other to be used
    assert one.step_ms[0] == 5.5 + 4 + 5.5 + 4
    assert one.bytes_read >= 9


def test_the_link_copies_experts_as_they_are_read():
    """Read until 5.5 and 10.5, copied until 8.5 and 13.5, computed until 14.5."""
    result = times("on-demand", decode([[1, 1, 0]]), 3, 2)
    assert result.step_ms == pytest.approx((14.5,))
    assert result.link_share == pytest.approx(6 / 14.5)
    one = times("on-demand", decode([[1, 1, 0]]), 3, 1)  # the second is read when the first has been copied
    assert one.step_ms == pytest.approx((8.5 + 5.5 + 3 + 1,))


def test_what_is_expected_is_read_ahead():
    """Memory holds two of three layers; from the second step on, each is read while another computes."""
    step = [[1, 0], [1, 0], [1, 0]]
    result = times("host-only", decode(step, step, step), 0, 2, read_ms=1.0, read_start_ms=0.0)
    assert result.step_ms == (15.0, 12.0, 12.0)
    assert result.bytes_read_ahead == result.bytes_read - 9 > 0
    assert result.disk_wait_s == pytest.approx(3e-3)


def test_costs_of_the_disk_must_be_known():
    with pytest.raises(ValueError, match=r"no costs of a disk \(read_ms\).*calibrate"):
        times("host-only", decode([[1]]), 0, 1, read_ms=0.0)
    with pytest.raises(ValueError, match="host_slots must be 1 expert or more, got 0"):
        times("host-only", decode([[1]]), 0, 0)


@pytest.mark.parametrize("policy", SIMULATED)
@pytest.mark.parametrize("host_slots", [1, 4, 18])
def test_every_policy_runs_over_the_disk(policy, host_slots):
    profile, parts = small_profile(), workloads(small_routing(), 2, "llapor")
    costs, made = replace(profile.costs, read_ms=1.0, read_start_ms=0.2), profile.geometry()
    results = run(policy, parts, made, costs, host_slots)
    again = run(policy, parts, made, costs, host_slots)
    assert [result.step_ms for result in results] == [result.step_ms for result in again]
    size = made.expert_bytes
    assert results[0].bytes_read >= size * min(host_slots, np.count_nonzero(parts[0].counts))
    for result in results:
        assert result.total_ms >= 1e3 * result.disk_share * result.total_s - 1e-6
        assert result.bytes_read % size == 0


@given(SEEDS, st.sampled_from(["host-only", "lru", "fiddler", "presched"]), st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_a_disk_without_cost_changes_nothing_and_with_cost_it_is_a_limit(seed, policy, host_slots):
    rng = np.random.default_rng(seed)
    shape = (3, 2, 5)
    workload = Workload(phase="decode", tokens=2, counts=random_demand(rng, shape))
    costs, made = random_costs(rng), geometry(shape, int(rng.integers(5, 8)))
    plain = simulate(POLICIES[policy](), [workload], made, costs)[0]
    free = simulate(POLICIES[policy](), [workload], made, replace(costs, read_ms=1e-12), host_slots=10)[0]
    # Which of two copies goes first may differ.
    within = 1e-6 if policy == "host-only" else shape[1] * costs.transfer_ms
    np.testing.assert_allclose(free.step_ms, plain.step_ms, rtol=0, atol=within)
    slow = replace(costs, read_ms=2.0)
    result = simulate(POLICIES[policy](), [workload], made, slow, host_slots=host_slots)[0]
    assert result.total_ms >= 2.0 * np.count_nonzero(workload.counts.any(0)) - 1e-6
    assert result.total_ms >= 2.0 * (result.bytes_read - result.bytes_read_ahead) / made.expert_bytes - 1e-6


def test_a_profile_with_a_disk_is_compared_and_stored(tmp_path):
    profile = small_profile()
    machine = dict.fromkeys(["cpu", "cores", "device", "memory_bytes"])
    with_disk = replace(
        profile, machine=machine, costs=replace(profile.costs, read_ms=1.5, read_start_ms=0.25)
    )
    with_disk.save(tmp_path / "profile.json")
    again = MachineProfile.load(tmp_path / "profile.json")
    assert (again.costs.read_ms, again.costs.read_start_ms) == (1.5, 0.25)
    assert "read_ms" not in profile.to_json()["costs"]  # an old profile is as it was
    comparison = simulate_profile(again, small_routing(), batches=[2], policies=["lru"], host_slots=6)
    row = comparison.rows[1]
    assert (row.phase, comparison.host_experts) == ("decode", 6)
    assert row.bytes_read > 0
    table = comparison_view.decode_table([row])
    assert [column.header for column in table.columns][-3:] == list(comparison_view.DISK)
