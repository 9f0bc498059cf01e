"""The link's thread: what it has chosen it has begun, and if it ends before its time, nobody waits for it."""

import threading
from contextlib import suppress

import jax
import pytest
from helpers import in_time, random_model
from links import A, B, C, Link, collect, random_bank, right

from layerscope_jax import Engine, OffloadConfig, TransferError
from layerscope_jax.offload import link as transfers_module
from layerscope_jax.offload.link import Transfers


class Slow:
    """A bank that stands still between a chunk's being chosen and its beginning."""

    def __init__(self, bank, expert):
        self.bank, self.expert = bank, expert
        self.chosen, self.go = threading.Event(), threading.Event()

    def chunks(self, expert):
        if expert == self.expert and threading.current_thread().name == "layerscope-link":
            self.chosen.set()
            assert self.go.wait(60)
        return self.bank.chunks(expert)

    def __contains__(self, expert):
        return expert in self.bank

    def __getattr__(self, name):
        return getattr(self.bank, name)


def test_what_was_chosen_is_not_dropped_any_more(bank, monkeypatch):
    """Else its room would be given to another, and who asks for it next would wait for what never comes."""
    monkeypatch.setattr(transfers_module, "STANDSTILL_S", 5.0)
    slow = Slow(bank, A)
    transfers = Transfers(slow, jax.devices()[0], None, Link(bank))
    transfers.ahead = 0
    dropped = []
    try:
        transfers.submit([], [A, B])
        assert slow.chosen.wait(60)
        dropper = threading.Thread(
            target=lambda: dropped.extend(transfers.drop(lambda e: e == A)), daemon=True
        )
        dropper.start()
        dropper.join(0.2)  # where it need not wait, it is through by now
        slow.go.set()
        dropper.join(60)
        for expert in dropped:  # as the books do, which then hold it for absent
            assert expert not in transfers.queue.begun
        transfers.submit([A], [])
        assert right(bank, collect(transfers, [A, B]))
        assert dropped == []
    finally:
        slow.go.set()
        in_time(transfers.close)


class Odd:
    """What a copy is not: its end cannot be entered."""

    def block_until_ready(self):
        return self


@pytest.fixture
def broken(bank):
    """A link whose thread ends unexpectedly, once it is allowed to."""
    gate, begun = threading.Event(), threading.Event()

    def copy(array, sharding):
        begun.set()
        assert gate.wait(60)
        return Odd()

    transfers = Transfers(bank, jax.devices()[0], None, copy)
    transfers.submit([A], [B])
    assert begun.wait(60)
    yield transfers, gate
    gate.set()
    in_time(transfers.close)


def ended(cause):
    """The error that says so, with what it comes from."""
    assert isinstance(cause.__cause__, AttributeError)
    return "the link's thread has ended" in str(cause) and "make a new Engine" in str(cause)


@pytest.mark.parametrize("call", ["wait", "rest", "cancel"])
def test_who_waits_for_a_thread_that_has_ended_hears_of_it_at_once(broken, call):
    transfers, gate = broken
    outcome, waiting = [], threading.Event()

    def wait():
        waiting.set()
        try:
            transfers.wait([A]) if call == "wait" else getattr(transfers, call)()
        except TransferError as error:
            outcome.append(error)

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    assert waiting.wait(60)
    gate.set()
    waiter.join(4)  # `GRACE_S` is longer, and so is `STANDSTILL_S`
    assert [ended(error) for error in outcome] == [True]
    for again in (lambda: transfers.submit([C], []), lambda: transfers.wait([A]), transfers.cancel):
        with pytest.raises(TransferError) as caught:
            in_time(again, 4)
        assert ended(caught.value)


@pytest.mark.usefixtures("quick_compiles")
def test_an_engine_whose_links_thread_has_ended_says_so(monkeypatch):
    model, broken = random_model(num_layers=2), []
    finish = Transfers._finish

    def failing(self, chunk):
        if broken:
            raise ZeroDivisionError("injected")
        return finish(self, chunk)

    monkeypatch.setattr(Transfers, "_finish", failing)
    config = OffloadConfig(device_budget=8 * model.bank.expert_bytes, policy="on-demand")
    with Engine(model, config) as engine:
        in_time(lambda: engine.generate([[1, 2]], max_new_tokens=2))
        broken.append(True)
        for _ in range(3):
            with pytest.raises(TransferError, match=r"ended .*injected.*; make a new Engine"):
                in_time(lambda: engine.generate([[1, 2]], max_new_tokens=2), 30)


@pytest.mark.parametrize("what", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_whatever_a_copy_raises_is_a_copy_that_failed(bank, what):
    """In the link's thread nobody else would hear of it."""
    left = [2]

    def copy(array, sharding):
        if left[0]:
            left[0] -= 1
            raise what
        return jax.device_put(array, sharding)

    transfers = Transfers(bank, jax.devices()[0], None, copy)
    try:
        transfers.submit([A], [B])
        assert right(bank, collect(transfers, [A, B]))
        left[0] = 100
        transfers.submit([C], [])
        with pytest.raises(TransferError, match="layer 1 to the device failed 3 times"):
            in_time(lambda: transfers.wait([C]))
        left[0] = 0
        with suppress(TransferError):
            in_time(transfers.cancel)
        transfers.submit([C], [])
        assert right(bank, collect(transfers, [C]))
    finally:
        in_time(transfers.close)


def test_a_link_can_be_closed_by_its_own_thread():
    """Which may be the one that collects an engine nobody holds any more."""
    closed = threading.Event()

    def copy(array, sharding):
        transfers.close()
        closed.set()
        return jax.device_put(array, sharding)

    transfers = Transfers(random_bank(), jax.devices()[0], None, copy)
    transfers.submit([A], [])
    assert closed.wait(60)
    transfers._thread.join(60)
    assert not transfers._thread.is_alive()
    assert transfers._broken is None
