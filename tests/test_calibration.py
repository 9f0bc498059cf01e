"""The measured profile: what is in it, and that measuring leaves nothing behind."""

import jax
from helpers import random_model

from layerscope_jax import calibration
from layerscope_jax.experts.executors import HostExperts
from layerscope_jax.experts.transfers import Transfers


def test_profile_of_this_machine():
    model = random_model()
    device, host_device = jax.devices()
    bandwidth = 10_000_000
    host, transfers = HostExperts(model.bank, host_device), Transfers(model.bank, device, bandwidth)
    try:
        profile = calibration.measure(model.bank, device, host, transfers)
        assert transfers.arrivals() == ({}, [])
    finally:
        transfers.close()
        host.close()
    for table in (profile.host_ms, profile.device_ms):
        assert table.tokens == calibration.TOKENS
        assert all(ms > 0 for ms in table.ms)
        assert list(table.ms) == sorted(table.ms)
    # The link was measured as it is used: a paced copy takes its time.
    assert profile.transfer_ms >= 0.99e3 * model.bank.expert_bytes / bandwidth
    assert device.device_kind in profile.source
