"""The measured profile: what is in it, and that measuring keeps to the budget and leaves nothing behind."""

from contextlib import contextmanager

import jax
import pytest
from helpers import random_model

from layerscope_jax import Engine, OffloadConfig, calibration
from layerscope_jax.experts.executors import HostExperts
from layerscope_jax.experts.transfers import Transfers


@contextmanager
def rooms(bank, bandwidth=None, copy=jax.device_put):
    device, host_device = jax.devices()
    host, transfers = HostExperts(bank, host_device), Transfers(bank, device, bandwidth, copy)
    try:
        yield device, host, transfers
    finally:
        transfers.close()
        host.close()


def test_profile_of_this_machine():
    bank = random_model().bank
    bandwidth = 10_000_000
    with rooms(bank, bandwidth) as (device, host, transfers):
        profile = calibration.measure(bank, device, host, transfers, 24)
        assert transfers.arrivals() == ({}, [])
    for table in (profile.host_ms, profile.device_ms):
        assert table.tokens == calibration.TOKENS
        assert all(ms > 0 for ms in table.ms)
        assert list(table.ms) == sorted(table.ms)
    # The link was measured as it is used: a paced copy takes its time.
    assert profile.transfer_ms >= 0.99e3 * bank.expert_bytes / bandwidth
    assert device.device_kind in profile.source


@pytest.fixture
def most(monkeypatch):
    """The most bytes of expert weights on the device, whenever some are computed or copied there."""
    bank = random_model(num_experts=20, hidden_size=36, expert_hidden=28, num_layers=2).bank
    device = jax.devices()[0]
    shapes = {matrix.shape for matrix in bank.layers[0][0]}
    seen = [0]

    def look():
        seen[0] = max(seen[0], on_device())

    def on_device():
        return sum(
            array.nbytes
            for array in jax.live_arrays()
            if array.shape in shapes and array.device == device and array.sharding.memory_kind == "device"
        )

    assert on_device() == 0
    grouped_rows = calibration.grouped_rows

    def looking(*arguments):
        look()
        return grouped_rows(*arguments)

    def copy(array, sharding):
        copied = jax.device_put(array, sharding)
        look()
        return copied

    monkeypatch.setattr(calibration, "grouped_rows", looking)
    monkeypatch.setattr(calibration, "TOKENS", (1, 3))
    return bank, copy, seen, on_device


@pytest.mark.parametrize(("slots", "experts"), [(0, 1), (3, 3), (40, 16)])
def test_measuring_keeps_to_the_budget(most, slots, experts):
    """With no room at all it takes that of one expert."""
    bank, copy, seen, on_device = most
    with rooms(bank, copy=copy) as (device, host, transfers):
        calibration.measure(bank, device, host, transfers, slots)
    assert seen == [experts * bank.expert_bytes]
    assert on_device() == 0


def test_an_engine_measures_within_its_budget(most):
    bank, copy, seen, _ = most
    model = random_model(num_experts=20, hidden_size=36, expert_hidden=28, num_layers=2)
    budget = 5 * bank.expert_bytes
    with Engine(model, OffloadConfig(device_budget=budget, policy="fiddler"), copy=copy):
        assert 0 < seen[0] <= budget
