"""When the device's memory runs out, steps are repeated by a runner with fewer experts, for all calls.

The runners are made of arithmetic, as in `test_loop.py`.
"""

import logging
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
from arithmetic import Arithmetic, alone, looped
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.generation.fitting import Fitting, ran_out
from layerscope_jax.generation.handles import Handle
from layerscope_jax.generation.requests import Request
from layerscope_jax.support.errors import TransferError

pytestmark = pytest.mark.usefixtures("quick_compiles")

OUT = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."
EACH = 100
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]


class Short(Arithmetic):
    """A runner whose device has no memory in some of its steps, counted over all runners."""

    costs = None

    def __init__(self, budget, at, counted):
        super().__init__()
        self.budget, self.at, self.counted, self.closed = budget, at, counted, False

    def step(self, *inputs):
        assert not self.closed
        self.counted.append(self.budget)
        if len(self.counted) - 1 in self.at:
            raise RuntimeError(OUT)
        return super().step(*inputs)

    def close(self):
        self.closed = True


def fitted(at=(), budget=16 * EACH, refused_below=0, made_from=10**9, may_shrink=True):
    """A loop with such runners, what it fits by, and the budget of each step.

    Args:
        at: steps without memory.
        refused_below: experts that the policy needs.
        made_from: experts from which on a runner cannot be made.
    """
    counted = []

    def make(budget_bytes, costs, alternates):
        if budget_bytes < refused_below * EACH:
            raise ValueError("device_budget is too small")
        if budget_bytes >= made_from * EACH:
            raise TransferError("a copy failed 3 times") from RuntimeError(OUT)
        return Short(budget_bytes, at, counted)

    resources = SimpleNamespace(add=lambda part: part, drop=lambda part: part.close(), opening=nullcontext)
    fitting = Fitting(make, resources, budget, EACH, may_shrink)
    loop, _ = looped(runner=fitting.runner)
    loop._fitting, loop._budget_bytes = fitting, budget
    return loop, fitting, counted


def handles(loop, count):
    made = []
    for prompt in PROMPTS:
        request = Request(prompt=prompt, max_new_tokens=count)
        call = loop.call([request], [prompt], record_plans=False, bound=False)
        made.append(Handle(None, loop, call))
        loop.submit(call)
    return made


@given(at=st.sets(st.integers(0, 12), max_size=5), count=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_every_call_gets_its_tokens(at, count):
    """Also those that another thread's step was for; each time that memory runs out costs experts once."""
    loop, fitting, counted = fitted(at)
    with mock.patch("gc.collect"):  # which would go through all that this process holds
        results = [handle.result() for handle in handles(loop, count)]
    assert [result.token_ids for result in results] == [alone(prompt, count) for prompt in PROMPTS]
    assert [result.finish_reason for result in results] == ["length"] * 3
    ran = len([step for step in at if step < len(counted)])
    assert fitting.cuts == results[-1].stats.budget_cuts == ran
    budget = 16
    for step, given_bytes in enumerate(counted):
        assert given_bytes == budget * EACH
        budget = budget * 7 // 8 if step in at else budget
    assert fitting.budget_bytes == results[-1].stats.budget_bytes == budget * EACH


def test_an_engine_is_warmed_up_all_the_same():
    loop, fitting, counted = fitted({1})
    call = loop.call(
        [Request(prompt=PROMPTS[0], max_new_tokens=4)], PROMPTS[:1], record_plans=False, bound=False
    )
    loop.rehearse(call, lambda: loop._runner.step)
    assert counted == [1600, 1600, 1400, 1400]  # a prefill and a decode step, twice
    assert fitting.cuts == 1


def test_a_runner_that_cannot_be_made_is_made_smaller(caplog):
    with caplog.at_level(logging.WARNING):
        _, fitting, _ = fitted(made_from=11)
    assert (fitting.budget_bytes, fitting.cuts) == (10 * EACH, 3)
    assert [record.message[:45] for record in caplog.records] == [
        "the device's memory ran out: experts may now "
    ]


def test_a_policy_that_needs_more_ends_it():
    """The runner of before is made again, so that the next call is answered."""
    loop, fitting, _ = fitted({0, 1, 2}, refused_below=15)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        handles(loop, 3)[0].result()
    assert (fitting.budget_bytes, fitting.cuts) == (16 * EACH, 0)
    fitting.runner.at = ()
    assert handles(loop, 3)[1].result().token_ids == alone(PROMPTS[1], 3)


@pytest.mark.parametrize("options", [{"may_shrink": False}, {"budget": EACH - 1}])
def test_what_cannot_shrink_is_an_error(options):
    loop, fitting, _ = fitted({0}, **options)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        handles(loop, 3)[0].result()
    assert fitting.cuts == 0


def test_only_a_device_that_is_full_is_meant():
    failed = TransferError("copying failed 3 times")
    failed.__cause__ = RuntimeError(OUT)
    assert ran_out(failed)
    assert not ran_out(MemoryError(OUT))
    assert not ran_out(OSError("RESOURCE_EXHAUSTED"))
