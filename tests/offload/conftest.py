"""Transfers over an injected link."""

import jax
import pytest
from helpers import in_time
from links import random_bank

from layerscope_jax.offload.link import WITHIN_BYTES, Transfers


@pytest.fixture(scope="module")
def bank():
    return random_bank()


@pytest.fixture
def start(bank):
    """Begins transfers over an injected link, given no more than a paced one; ends them after the test."""
    running = []

    def start(link, bandwidth=None):
        transfers = Transfers(bank, jax.devices()[0], bandwidth, link)
        running.append((transfers, link))
        assert transfers.ahead == (0 if bandwidth else WITHIN_BYTES)  # of a CPU
        assert transfers.prefetch_ahead == 0
        transfers.ahead = 0
        return transfers

    yield start
    for transfers, link in running:
        if link.permits is not None:
            link.allow(1000)
        in_time(transfers.close)
