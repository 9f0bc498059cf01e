"""Whatever is asked of the link, and whatever fails: what comes is right, and the books come out even."""

import jax
import numpy as np
from helpers import in_time
from hypothesis import given, settings
from hypothesis import strategies as st
from links import CHUNK, NAMES, Link, random_bank, right

from layerscope_jax import ExpertId, TransferError
from layerscope_jax.offload.link import ATTEMPTS, Transfers

EXPERTS = [ExpertId(layer, expert) for layer in range(2) for expert in range(4)]


@given(
    st.lists(
        st.tuples(
            st.sets(st.sampled_from(EXPERTS), max_size=4),  # needed now
            st.lists(st.sampled_from(EXPERTS), max_size=4, unique=True),  # prefetched
            st.sets(st.sampled_from(EXPERTS), max_size=8),  # leave the device
            st.sets(st.sampled_from(EXPERTS), max_size=8),  # stale
            st.booleans(),  # whether this one looks what has arrived before it waits
        ),
        max_size=8,
    ),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.2, 0.5]),
    st.sampled_from([0, 4]),  # chunks given to the link ahead
)
@settings(deadline=None, max_examples=80)
def test_whatever_is_asked_for_in_whatever_order_and_fails(layers, seed, rate, chunks):
    """An engine's way with the link, with copies that fail at random: the books always come out even."""
    rng = np.random.default_rng(seed)
    link = Link(
        random_bank(), failing=lambda *_: rng.choice(["start", "end"]) if rng.random() < rate else None
    )
    transfers = Transfers(random_bank(), jax.devices()[0], None, link)
    transfers.ahead = transfers.prefetch_ahead = chunks * CHUNK
    resident, coming = set(), set()

    def absorb():
        arrived, lost = transfers.arrivals()
        assert right(random_bank(), arrived)
        assert arrived.keys() | set(lost) <= coming
        assert not arrived.keys() & set(lost)
        coming.difference_update(arrived, lost)
        resident.update(arrived)
        return lost

    def run():
        for needed, ahead, leaving, stale, looks in layers:
            if looks:
                absorb()
            dropped = transfers.drop(lambda e, stale=stale - needed: e in stale)
            assert set(dropped) <= coming & stale - needed
            coming.difference_update(dropped)
            resident.difference_update(leaving - needed)
            load = [e for e in needed if e not in resident]
            ahead = [e for e in ahead if e not in resident and e not in coming and e not in load]
            coming.update(load, ahead)
            transfers.submit(load, ahead)
            try:
                while not needed <= resident:
                    missing = [e for e in load if e not in resident]
                    transfers.wait(missing, min(len(missing), 1 + 2 * looks))
                    assert not set(absorb()) & needed
            except TransferError:
                # Then some wanted chunk failed as often as it may.
                assert any(link.attempts[e, name] >= ATTEMPTS for e in load for name in NAMES)
                transfers.cancel()
                absorb()
                coming.clear()
        transfers.rest()
        absorb()
        assert not coming

    try:
        in_time(run)
    finally:
        in_time(transfers.close)
    stats = transfers.stats
    assert stats.demand_bytes + stats.prefetch_bytes <= link.moved
    if rate == 0:
        assert stats.demand_bytes + stats.prefetch_bytes == link.moved
        assert stats.retries == stats.failed_prefetches == 0
    assert all(beside <= max(1, chunks - 1) for beside in link.beside)
