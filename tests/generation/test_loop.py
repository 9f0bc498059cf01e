"""Calls come, wait, are cancelled and interrupted as they like: each gets its tokens, and nothing hangs.

The runner is made of arithmetic: a token is a function of all that its row has cached, so that a row that was
mixed up with another, or not filled again, says something else.
"""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from arithmetic import WORDS, alone, looped
from helpers import in_time
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.generation import (
    calls,
    loop,
    prefixes,
    row_settings,
    run,
    scheduler,
    shares,
    slots,
    stop_strings,
)
from layerscope_jax.generation.handles import Handle
from layerscope_jax.generation.requests import Request

pytestmark = pytest.mark.usefixtures("quick_compiles")


def submitted(made, prompt, count, **options):
    call = made.call([Request(prompt=prompt, max_new_tokens=count)], [prompt], **options or FREE)
    handle = Handle(None, made, call)
    made.submit(call)
    return handle


FREE = {"record_plans": False, "bound": False}


def is_idle(made):
    made._ready()  # as the next step begins
    return made._run is None and not made._calls and made._settled


def is_right(result, prompt, count):
    expected = alone(prompt, count)
    if result.finish_reason == "abort":
        return result.token_ids == expected[: len(result.token_ids)]
    return result.finish_reason == "length" and result.token_ids == expected


prompts = st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=60)
alike = prompts.map(lambda prompt: [*range(30), *prompt[:30]])
acts = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), prompts, st.integers(1, 30)),
        st.tuples(st.sampled_from(["read", "result", "cancel", "drop"]), st.integers(0, 20), st.just(0)),
    ),
    min_size=1,
    max_size=25,
)


@given(acts=acts, most=st.integers(1, 5), fails=st.sets(st.integers(1, 60), max_size=2))
@settings(deadline=None, max_examples=60)
def test_whatever_callers_do_each_gets_its_own_tokens(acts, most, fails):
    """Also where steps fail: only whoever drives one hears of it, and the others go on."""
    made, runner = looped(most)
    live, step = [], runner.step

    def failing(*inputs):
        runner.fails = int(runner.steps + 1 in fails)
        return step(*inputs)

    runner.step = failing
    for act, what, count in acts:
        if act == "submit":
            live.append([submitted(made, what, count), what, count, None])
        elif live:
            entry = live[what % len(live)]
            handle, prompt, size, reader = entry
            try:
                if act == "read":
                    entry[3] = reader or iter(handle)
                    next(entry[3], None)
                elif act == "result":
                    assert is_right(handle.result(), prompt, size)
                elif act == "cancel":
                    handle.cancel()
                else:
                    live.remove(entry)
                    del handle, reader, entry
            except OSError:
                entry[3] = None
                assert handle.done
                assert handle.result().finish_reason == "abort"
    for handle, prompt, size, _ in live:
        for _ in range(3):  # a step may fail, twice
            try:
                result = handle.result()
                break
            except OSError:
                continue
        assert is_right(result, prompt, size)
    assert is_idle(made)


MODULES = (calls, loop, prefixes, row_settings, run, scheduler, shares, slots, stop_strings)
OURS = tuple(m.__file__ for m in MODULES)


class Interrupts:
    """Raises KeyboardInterrupt in the calling thread where given numbers of lines of ours have begun."""

    def __init__(self, lines):
        self.lines, self.seen, self.sprung = sorted(lines), 0, 0

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in OURS or frame.f_code.co_name in ("_drive", "follow"):
            return None  # these two only wait: an interrupt of theirs comes from what they call
        return self.line

    def line(self, frame, event, argument):
        if event == "line":
            self.seen += 1
            if self.sprung < len(self.lines) and self.seen >= self.lines[self.sprung]:
                self.sprung += 1
                raise KeyboardInterrupt
        return self.line


@given(
    first=st.lists(st.tuples(prompts | alike, st.integers(1, 12)), min_size=2, max_size=4),
    lines=st.lists(st.integers(1, 700), min_size=1, max_size=2),
    cancelled=st.booleans(),
    prefix_cache=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_an_interrupt_at_any_line_harms_nobody_else(first, lines, cancelled, prefix_cache):
    """The first handle's reader is interrupted, twice perhaps, the second time while all is put right."""
    made, _ = looped(2, prefix_cache=prefix_cache)
    handles = [submitted(made, *each) for each in first]
    next(iter(handles[-1]))
    late = submitted(made, [5, 6], 7)
    if cancelled := cancelled and not handles[1].done:
        handles[1].cancel()
    trap = Interrupts(lines)
    before = sys.gettrace()
    sys.settrace(trap)
    try:
        handles[0].result()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    for handle, (prompt, count) in zip([*handles[1:], late], [*first[1:], ([5, 6], 7)], strict=True):
        result = in_time(handle.result)
        assert is_right(result, prompt, count)
        assert result.finish_reason == ("abort" if cancelled and handle is handles[1] else "length")
    assert is_right(in_time(handles[0].result), *first[0])
    assert is_idle(made)


def test_threads_with_a_handle_each_share_every_step():
    made, runner = looped(8, 256)
    asked = [([7 * n + 1, n], 20 + n) for n in range(8)]
    handles = [submitted(made, *each) for each in asked]
    with ThreadPoolExecutor(8) as pool:
        results = [in_time(each.result) for each in [pool.submit(handle.result) for handle in handles]]
    assert all(is_right(result, *each) for result, each in zip(results, asked, strict=True))
    assert len(runner.shapes) == 27  # one prefill of all, and as many decode steps as the longest has left
    assert is_idle(made)


def test_a_thread_that_drives_all_the_time_leaves_others_their_turn():
    """One reads long answers until the other has had its short ones."""
    made, _ = looped(2)
    ended = threading.Event()

    def reads():
        rounds = 0
        while not ended.is_set():
            submitted(made, [1, 2], 90).result()
            rounds += 1
        return rounds

    def asks():
        try:
            return [submitted(made, [3], 5).result().token_ids for _ in range(20)]
        finally:
            ended.set()

    with ThreadPoolExecutor(2) as pool:
        reader, other = pool.submit(reads), pool.submit(asks)
        assert in_time(lambda: other.result(60)) == [alone([3], 5)] * 20
        assert in_time(lambda: reader.result(60)) >= 1


def test_a_newcomer_makes_room_for_itself():
    """More rows, and longer ones, until the engine is idle; what was cached stays."""
    made, runner = looped(8)
    first = submitted(made, [9, 8], 40)
    reader = iter(first)
    found = [next(reader).token_id for _ in range(3)]
    others = [submitted(made, [4] * size, 30) for size in (20, 31, 60)]
    found += [token.token_id for token in reader]
    assert found == alone([9, 8], 40)
    assert [other.result().token_ids for other in others] == [alone([4] * n, 30) for n in (20, 31, 60)]
    decode = [shape for shape in runner.shapes if shape[1] == 1]
    assert decode[0] == (2, 1, 64)
    assert decode[-1] == (4, 1, 96)
    submitted(made, [1], 2).result()
    assert runner.shapes[-1] == (2, 1, 64)


def test_a_cancelled_request_leaves_at_the_next_step_and_its_slot_is_free():
    made, runner = looped(1)
    first, second = submitted(made, [1, 2, 3], 50), submitted(made, [4, 5], 3)
    reader = iter(first)
    for _ in range(5):
        next(reader)
    steps = runner.steps
    first.cancel()
    assert first.done
    last = list(reader)[-1]
    assert (last.token_id, last.finish_reason) == (-1, "abort")
    assert second.result().token_ids == alone([4, 5], 3)
    assert runner.steps == steps + 3
    result = first.result()
    assert (result.finish_reason, result.token_ids) == ("abort", alone([1, 2, 3], 5))
    first.cancel()
    assert is_idle(made)


def test_one_that_waits_can_be_cancelled_too():
    made, _ = looped(1)
    first, second = submitted(made, [1, 2, 3], 5), submitted(made, [4, 5], 3)
    next(iter(first))
    second.cancel()
    assert (second.result().finish_reason, second.result().token_ids) == ("abort", [])
    assert first.result().token_ids == alone([1, 2, 3], 5)


def test_cancelling_does_not_wait_for_a_step():
    made, runner = looped(2)
    step, within, go_on = runner.step, threading.Event(), threading.Event()

    def slow(*inputs):
        within.set()
        assert go_on.wait(60)
        return step(*inputs)

    runner.step = slow
    handle = submitted(made, [1], 9)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(handle.result)
        assert within.wait(60)
        in_time(handle.cancel, 10)
        other = in_time(lambda: submitted(made, [2], 2), 10)
        assert not handle.done
        go_on.set()
        assert in_time(waiting.result).token_ids == alone([1], 1)
    assert other.result().token_ids == alone([2], 2)


def test_a_stream_that_is_dropped_frees_its_slot():
    made, _ = looped(1)
    streams = [
        made.stream(made.call([Request(prompt=[n], max_new_tokens=50)], [[n]], **FREE)) for n in range(3)
    ]
    for stream in streams:
        assert next(stream).token_id == alone([streams.index(stream)], 1)[0]
        if stream is not streams[-1]:
            stream.close()
    del stream, streams
    assert made._run is None
    assert not made._calls


def test_a_closed_engine_ends_those_who_wait():
    closed = []
    made, runner = looped(2, closed=closed)
    step = runner.step

    def closing(*inputs):
        closed.append(True)
        return step(*inputs)

    handles = [submitted(made, [n], 5) for n in range(4)]
    runner.step = closing
    with ThreadPoolExecutor(4) as pool:
        for waiting in [pool.submit(handle.result) for handle in handles]:
            with pytest.raises(ValueError, match="the engine was closed; make a new Engine"):
                in_time(waiting.result)


def test_one_thread_advances_all():
    """Each step brings a token for every handle, also for those that the thread does not wait for."""
    made, _ = looped(2)
    handles = [submitted(made, [n], 4) for n in range(3)]
    tokens, steps = [[] for _ in handles], 0
    while not all(handle.done for handle in handles):
        next(handle for handle in handles if not handle.done).advance()
        steps += 1
        for handle, known in zip(handles, tokens, strict=True):
            new, ended = handle.since(len(known))
            known += [event.token_id for event in new]
            assert ended == (len(known) == 4) == handle.done
    assert tokens == [alone([n], 4) for n in range(3)]
    assert steps == 8  # two prefills; the third waits for a slot
    handles[0].advance()
    assert is_idle(made)


def test_what_is_counted_begins_with_the_call(monkeypatch):
    monkeypatch.setattr(shares, "FORGOTTEN", 1)  # times that nobody may ask for
    made, runner = looped(4)
    step = runner.step

    def counting(*inputs):
        runner.account.meter.experts += 1
        return step(*inputs)

    runner.step = counting
    first = submitted(made, [1, 2], 9)
    reader = iter(first)
    for _ in range(4):
        next(reader)
    second = submitted(made, [3], 3)
    ended = second.result()
    whole = first.result()
    assert second._call.counted.meter.experts == 3  # its prefill, and two decode steps
    assert first._call.counted.meter.experts == 10
    assert (whole.stats.prompts, whole.stats.prompt_tokens, whole.stats.new_tokens) == (1, 2, 9)
    assert (ended.stats.prompt_tokens, ended.stats.new_tokens) == (1, 3)
    assert len(second._call.times.decode_s) == 2
    assert len(first._call.times.decode_s) == 8
    alone_again = submitted(made, [1, 2], 9)
    alone_again.result()
    assert alone_again._call.counted.meter.experts == 9
