"""Transfers over an injected link."""

import jax
import pytest
from helpers import in_time
from links import random_bank

from layerscope_jax.experts.transfers import Transfers


@pytest.fixture(scope="module")
def bank():
    return random_bank()


@pytest.fixture
def start(bank):
    """Begins transfers over an injected link; ends them after the test."""
    running = []

    def start(link, bandwidth=None):
        running.append((Transfers(bank, jax.devices()[0], bandwidth, link), link))
        return running[-1][0]

    yield start
    for transfers, link in running:
        if link.permits is not None:
            link.allow(1000)
        in_time(transfers.close)
