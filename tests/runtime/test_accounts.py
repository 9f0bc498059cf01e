"""Calls that go on beside each other are each counted for themselves."""

from dataclasses import replace

import pytest

from layerscope_jax import ExpertId, LayerPlan, Observation
from layerscope_jax.offload.residency import Residency
from layerscope_jax.runtime.accounts import Account, run_stats
from layerscope_jax.runtime.runner import RunnerStats
from layerscope_jax.runtime.statistics import Times

A, B, C, D = (ExpertId(0, expert) for expert in range(4))
RUNNER = RunnerStats(policy="lru", mode="layers", format="float32", dense_kernels={}, peak_expert_bytes=300)


def come(books, *experts):
    for expert in experts:
        books.reserve(expert, prefetched=True)
        books.arrive(expert, None)


def test_peaks_and_waste_are_of_the_own_steps():
    books, first, second = Residency(400, 100), Account(), Account()
    first.take_books([books])
    come(books, A, B, C)
    books.evict(A)  # in vain
    books.evict(B)
    first.leave_books([books])
    assert (first.peak_bytes, first.wasted_bytes) == (300, 300)  # the third was not used either
    second.take_books([books])
    come(books, D)
    books.use(0, [C.expert, D.expert])
    second.leave_books([books])
    assert (second.peak_bytes, second.wasted_bytes) == (200, 0)
    first.take_books([books])
    books.evict(D)
    first.leave_books([books])
    assert (first.peak_bytes, first.wasted_bytes) == (300, 300)


def test_what_is_still_on_its_way_is_counted_for_who_began_it():
    account = Account(plans=[], decoded=[])
    nobody = account.after()
    assert nobody.links is account.links
    assert nobody.host is account.host
    assert nobody.device is account.device
    assert nobody.meter is not account.meter
    assert account.records
    assert not nobody.records


def test_plans_and_demand_are_recorded_where_that_is_asked_for():
    seen = Observation(step=1, layer=0, phase="decode", demand={2: 1}, resident=(), in_flight=())
    plan = LayerPlan(step=1, layer=0, host=(2,))
    account = Account(plans=[], decoded=[])
    account.enter(seen, plan, set())
    account.enter(replace(seen, phase="prefill"), plan, set())
    assert account.plans == [plan, plan]
    assert account.decoded == [{2: 1}]
    assert account.meter.layers == 2


@pytest.mark.parametrize("least_s", [None, 0.25])
def test_the_share_of_the_bound_is_of_the_decode_steps(least_s):
    stats = run_stats(
        Account(),
        replace(RUNNER, least_decode_s=least_s),
        Times(decode_s=[0.2, 0.3]),
        2.0,
        prompts=1,
        new_tokens=4,
        budget_bytes=400,
    )
    assert stats.share_of_bound == (None if least_s is None else 0.5)
    assert (stats.policy, stats.mode, stats.peak_expert_bytes) == ("lru", "layers", 300)
    assert (stats.tokens_per_s, stats.tpot_s, stats.kernels) == (2.0, 0.25, None)
