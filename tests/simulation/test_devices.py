"""Several devices on the virtual clock."""

from dataclasses import replace

import numpy as np
import pytest

from layerscope_jax import Geometry, HardwareProfile, TimeTable
from layerscope_jax.scheduling.caching import LRU
from layerscope_jax.simulation.comparison import simulate_profile
from layerscope_jax.simulation.devices import Server, server_bound_ms, simulate_server
from layerscope_jax.simulation.policies import run
from layerscope_jax.simulation.simulator import Workload

COSTS = HardwareProfile(
    host_ms=TimeTable((1, 8), (1.0, 4.0)),
    device_ms=TimeTable((1, 8), (0.2, 0.4)),
    transfer_ms=2.0,
    layer_ms=TimeTable((1,), (0.5,)),
    host_start_ms=0.1,
    source="made up",
)
SHAPE = Geometry(num_layers=4, num_experts=8, experts_per_token=2, expert_bytes=3000, slots=12)
POLICIES = ["lru", "fiddler", "presched", "hybrimoe", "host-only", "oracle"]


def workload(seed=0, steps=6, tokens=4):
    random = np.random.default_rng(seed)
    counts = np.zeros((steps, SHAPE.num_layers, SHAPE.num_experts), np.int64)
    for step, layer in np.ndindex(steps, SHAPE.num_layers):
        for _ in range(tokens):
            counts[step, layer, random.choice(SHAPE.num_experts, 2, replace=False)] += 1
    forecasts = random.random((steps, SHAPE.num_layers, 2, SHAPE.num_experts))
    return Workload(phase="decode", tokens=tokens, counts=counts, forecasts=forecasts, predictor="random")


@pytest.mark.parametrize("policy", POLICIES)
def test_one_device_is_what_the_simulator_says_of_it(policy):
    work = workload()
    alone = run(policy, [work], SHAPE, COSTS)[0]
    assert run(policy, [work], SHAPE, COSTS, server=Server(devices=1))[0] == alone


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_policy_is_faster_than_the_bound(devices, seed):
    work, server = workload(seed), Server(devices=devices, exchange_ms_per_token=0.01)
    bound = server_bound_ms(work, SHAPE, COSTS, server, from_empty=True)
    for policy in POLICIES:
        result = run(policy, [work], SHAPE, COSTS, server=server)[0]
        assert bound * (1 - 1e-6) <= result.total_ms < 20 * bound


def test_devices_help_in_proportion_where_only_copies_take_time():
    """Every expert is loaded anew in each step: N links bring them in about an Nth of the time."""
    costs = replace(COSTS, host_ms=TimeTable((1,), (1e4,)), layer_ms=TimeTable((1,), (0.0,)))
    counts = np.ones((5, SHAPE.num_layers, SHAPE.num_experts), np.int64)
    work = Workload(phase="decode", tokens=4, counts=counts)
    times = {}
    for devices in (1, 2, 4):
        shape = replace(SHAPE, slots=SHAPE.num_experts // devices)
        (result,) = simulate_server(
            [LRU() for _ in range(devices)], [work], shape, costs, Server(devices=devices)
        )
        times[devices] = result.total_ms
        assert result.bytes_demand == counts.size * SHAPE.expert_bytes
    assert times[1] / times[2] == pytest.approx(2, rel=0.05)
    assert times[1] / times[4] == pytest.approx(4, rel=0.1)


def test_a_shared_root_takes_the_gain_back():
    costs = replace(COSTS, host_ms=TimeTable((1,), (1e4,)))
    work = Workload(
        phase="decode", tokens=4, counts=np.ones((5, SHAPE.num_layers, SHAPE.num_experts), np.int64)
    )
    own, shared, alone = (
        run("lru", [work], replace(SHAPE, slots=8 // server.devices), costs, server=server)[0].total_ms
        for server in (Server(devices=4), Server(devices=4, root_ms=costs.transfer_ms), Server(devices=1))
    )
    assert own < 0.5 * shared
    assert shared == pytest.approx(alone, rel=0.1)  # one link's rate, whatever the devices


def test_the_exchange_is_that_of_a_ring():
    server = Server.of(4, SHAPE, COSTS, row_bytes=1000)
    link = SHAPE.expert_bytes / COSTS.transfer_ms  # bytes a ms
    assert server.exchange_ms_per_token == pytest.approx(2 * 3 / 4 * 2 * 1000 / link)
    slow = Server.of(4, SHAPE, COSTS, row_bytes=1000, root_bandwidth=1e3 * link)
    assert slow.exchange_ms_per_token == pytest.approx(4 * server.exchange_ms_per_token)
    assert slow.root_ms == pytest.approx(COSTS.transfer_ms)


def test_profiles_are_compared_on_several_devices():
    settings = {"batches": [4], "steps": 6, "policies": ["lru", "presched"], "slots": 62}
    one = simulate_profile("mixtral-8x7b", **settings)
    four = simulate_profile("mixtral-8x7b", **settings, devices=4, root_bandwidth=10**11)
    assert four.devices == 4
    for before, after in zip(one.rows, four.rows, strict=True):
        assert after.step_s < before.step_s
        assert after.share_of_bound <= 1 + 1e-9
        assert after.budget_bytes == 4 * before.budget_bytes


def test_what_cannot_be_simulated_is_refused():
    work = workload()
    with pytest.raises(ValueError, match="evenly, got 3"):
        run("lru", [work], SHAPE, COSTS, server=Server(devices=3))
    with pytest.raises(ValueError, match="evenly, got 3"):
        simulate_server([LRU()] * 3, [work], SHAPE, COSTS, Server(devices=3))
    with pytest.raises(ValueError, match="1 or more"):
        Server(devices=0)
    with pytest.raises(ValueError, match="root_ms must be a time"):
        Server(devices=1, root_ms=-1)
    with pytest.raises(ValueError, match="without host_slots"):
        simulate_profile("mixtral-8x7b", batches=[4], policies=["lru"], devices=2, host_slots=9)
    with pytest.raises(ValueError, match="each of 2 devices"):
        simulate_server([], [work], SHAPE, COSTS, Server(devices=2))
