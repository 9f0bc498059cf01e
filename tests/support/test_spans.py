"""Recorded spans: in memory that is bounded, whoever adds them."""

import threading
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.runtime.timeline import Decided
from layerscope_jax.scheduling.plan import ExpertId, LayerPlan
from layerscope_jax.support.spans import ITEM_BYTES, SPAN_BYTES, Moved, Spans


@given(
    items=st.lists(st.integers(0, 40), max_size=60),
    most_bytes=st.integers(1, 60 * SPAN_BYTES),
)
@settings(deadline=None)
def test_the_latest_are_kept_as_far_as_they_fit(items, most_bytes):
    spans = Spans(most_bytes)
    for begin, number in enumerate(items):
        spans.add("device", "experts", begin, begin + 1, what=tuple(range(number)), items=number)
    kept = list(spans)
    assert [span.begin for span in kept] == list(range(len(items)))[len(items) - len(kept) :]
    assert spans.left_out == len(items) - len(kept)
    sizes = [SPAN_BYTES + ITEM_BYTES * number for number in items]
    if len(kept) > 1:
        assert sum(sizes[-len(kept) :]) <= most_bytes
    if spans.left_out:  # the next one would not have fitted
        assert sum(sizes[-len(kept) - 1 :]) > most_bytes
    assert bool(kept) == bool(items)


def some_decision(step):
    experts = tuple(ExpertId(300 + step, 1000 + number) for number in range(6))
    numbers = tuple(expert.expert for expert in experts)
    plan = LayerPlan(step=step, layer=0, device=numbers, load=experts, prefetch=experts)
    expected = {number: step + 0.1 * number for number in numbers}
    return Decided("decode", plan, {number: 1 for number in numbers}, numbers[:2], expected)


@pytest.mark.parametrize("kind", ["moved", "experts", "plan"])
def test_the_estimates_of_memory_are_not_too_low(kind):
    def what(number):
        if kind == "moved":
            return Moved(number, 10**9 + number, 1, 3), 0
        if kind == "experts":
            return tuple(range(number, number + 8)), 8
        decided = some_decision(number)
        return decided, decided.items

    spans = Spans()
    tracemalloc.start()
    for number in range(1000, 3000):
        spans.add("link", "demand", number + 0.1, number + 0.2, number, *what(number))
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken <= sum(span.bytes for span in spans)


def test_threads_add_to_one_recording():
    spans = Spans(most_bytes=500 * SPAN_BYTES)
    threads = [
        threading.Thread(target=lambda: [spans.add("disk", "read", i, i + 1) for i in range(1000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(list(spans)), spans.left_out) == (500, 3500)
