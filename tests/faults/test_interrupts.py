"""Whatever interrupts a step, wherever it waits: all threads come to rest, and the next call is right."""

import threading
from collections import Counter
from contextlib import suppress
from functools import partial
from queue import SimpleQueue

import jax
import numpy as np
import pytest
from disk_models import on_disk
from exact_cases import RandomPolicy, agree, case, oracle, run
from helpers import copying_by, in_time

from layerscope_jax import Engine, ExpertId, LayerPlan, OffloadConfig, TransferError
from layerscope_jax.kernels import cpu
from layerscope_jax.offload.slotted import SlottedExperts
from layerscope_jax.runtime import device_side, layerwise, reading_back
from layerscope_jax.support import threads

pytestmark = pytest.mark.usefixtures("quick_compiles")


class Split:
    """Odd experts on the device, even ones on the host: an expert is computed in one place, come what may."""

    name = "split"
    uses_costs = False

    def init(self, geometry, profile):
        return geometry

    def plan(self, geometry, seen):
        after = (seen.layer + 1) % geometry.num_layers
        needed = [ExpertId(seen.layer, expert) for expert in sorted(seen.demand) if expert % 2]
        ahead = [ExpertId(after, expert) for expert in range(1, geometry.num_experts, 2)]
        evict = [expert for expert in seen.resident if expert not in needed]
        there = {*seen.resident, *seen.in_flight}.difference(evict)
        load = [expert for expert in needed if expert not in there]
        room = geometry.slots - len(there) - len(load)
        return geometry, LayerPlan(
            step=seen.step,
            layer=seen.layer,
            device=tuple(expert.expert for expert in needed),
            host=tuple(expert for expert in sorted(seen.demand) if expert % 2 == 0),
            evict=tuple(evict),
            load=tuple(load),
            prefetch=tuple([expert for expert in ahead if expert not in there][:room]),
        )


class Trap:
    """Raises, once, at a call of the engine's own thread (or of any) to whatever it is put around."""

    def __init__(self):
        self.set(None, 0)

    def set(self, what, at, everywhere=False):
        self.what, self.at, self.everywhere, self.sprung = what, at, everywhere, threading.Event()
        self.thread = threading.get_ident()

    def look(self):
        if self.what is None or self.sprung.is_set():
            return
        if self.everywhere or threading.get_ident() == self.thread:
            self.at -= 1
            if self.at == 0:
                self.sprung.set()
                raise self.what

    def around(self, call):
        def trapped(*arguments, **named):
            self.look()
            return call(*arguments, **named)

        return trapped


class Without:
    """A module in which one name is another."""

    def __init__(self, module, name, value):
        self._module = module
        setattr(self, name, value)

    def __getattr__(self, name):
        return getattr(self._module, name)


class Work:
    """Counts the threads that compute; helpers stay at it until the trap has sprung, where that is said."""

    def __init__(self, monkeypatch):
        self.busy, self.waits_for, self.lock, self.by = 0, None, threading.Lock(), Counter()
        loops = cpu.CpuExperts._loops

        def watched(computer, *arguments):
            share, parts = loops(computer, *arguments)

            def counted(number):
                with self.lock:
                    self.busy += 1
                try:
                    if self.waits_for is not None and "layerscope-cpu" in threading.current_thread().name:
                        assert self.waits_for.wait(60)
                    share(number)
                finally:
                    with self.lock:
                        self.busy -= 1
                        self.by[threading.current_thread().name] += 1

            return counted, parts

        monkeypatch.setattr(cpu.CpuExperts, "_loops", watched)
        monkeypatch.setattr(cpu, "SHARE_BYTES", 1)


def at_rest(engine, work):
    """No thread computes, nothing is queued, and the books hold nothing that is not on the device."""
    runner, link = engine.runner, engine.runner.transfers
    assert work.busy == 0
    for helpers in (runner.host_experts._thread, runner.host_experts.cpu._helpers):
        assert helpers._job is None
        assert helpers._calls.empty()
    queue = link.queue
    assert [*queue.demand, *queue.prefetch, *queue.begun, *queue.failed] == []
    assert queue.on_link == 0
    assert not runner.residency.coming
    assert runner.residency.used_bytes <= engine.budget_bytes
    if runner.pool is not None:
        assert [*runner.pool._held.values()] == [{}, {}]
        assert runner.pool._reading == 0
    assert runner._settled


def traps(engine, trap, monkeypatch):
    """Puts the trap, name by name, around every call in which a step waits, or has others wait."""
    runner = engine.runner
    places = {
        f"{room}.{name}": (getattr(runner, room), name)
        for room, names in {
            "policy": ["plan"],
            "transfers": ["submit", "wait", "drop", "arrivals", "cancel"],
            "host_experts": ["compute", "start"],
            "device_experts": ["begin", "keep", "run", "take", "place", "clear"],
            "residency": ["follow", "arrive", "use"],
            "forecasts": ["read", "learn"],
            "pool": ["hold", "wait", "let_go", "is_ready", "slot", "read_ahead", "settle"],
        }.items()
        for name in names
        if getattr(runner, room) is not None
    } | {
        "a condition of the link": (runner.transfers._changed, "wait"),
        "waiting for a job": (threads.Job, "_failure"),
        "waiting for the device": (layerwise.jax, "block_until_ready"),
    }
    if runner.pool is not None:
        places["a condition of the pool"] = (runner.pool._changed, "wait")
    for where, (owner, name) in places.items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, trap.around(getattr(owner, name)))
            yield where
    with monkeypatch.context() as patch:
        for module in (layerwise, reading_back):  # on a CPU, and from an accelerator
            patch.setattr(module, "np", Without(np, "asarray", trap.around(np.asarray)))
        yield "reading back"
    for name in ("embed", "attend_and_route", "finish"):
        with monkeypatch.context() as patch:
            dense, program = runner.dense, getattr(runner.dense.programs, name)
            patch.setattr(dense, "programs", dense.programs._replace(**{name: trap.around(program)}))
            patch.setattr(dense, "attend_alone", trap.around(dense.attend_alone))
            yield name
    with monkeypatch.context() as patch:
        patch.setattr(runner.transfers, "copy", trap.around(runner.transfers.copy))
        yield "copying"


def interrupted_everywhere(engine, batch, expected, what, at, monkeypatch, reached):
    """Springs the trap at a call of each place in turn; the engine is right after each."""
    trap, work = Trap(), Work(monkeypatch)
    again = partial(run_untapped, engine, batch)
    assert again() == expected
    for where in traps(engine, trap, monkeypatch):
        trap.set(what, at, everywhere=where == "copying")
        decisions, policy = engine.runner.decisions, engine.runner.policy
        if where in CLEANING:
            decisions.policy = None
        done = False
        with suppress(what, *[AttributeError] * (where in CLEANING)):
            assert again() == expected, where
            done = True
        decisions.policy = policy
        if trap.sprung.is_set():
            reached.add(where)
        if not engine.runner._settled:  # interrupted where it came to rest: the next call does so first
            assert where in (*CLEANING, "a condition of the link")
        elif not done:
            at_rest(engine, work)
        trap.set(None, 0)
        assert in_time(again) == expected, where
        if where == "copying":
            engine.runner.transfers.rest()
        engine.runner.settle()
        at_rest(engine, work)
    return work


def run_untapped(engine, batch):
    """Tokens, and logits as they are, of a call."""
    logits, step = [], engine.runner.step

    def tapped(*inputs):
        found = step(*inputs)
        logits.append(np.asarray(found[1]).tobytes())
        return found

    engine.runner.step = tapped
    try:
        return engine.generate(batch, max_new_tokens=3).token_ids, logits
    finally:
        del engine.runner.step


CLEANING = ("transfers.cancel", "device_experts.clear", "pool.settle")
"""Called where something else has gone wrong before."""

PLACES = {
    "policy.plan",
    "transfers.submit",
    "transfers.wait",
    "transfers.arrivals",
    "transfers.cancel",
    "device_experts.run",
    "device_experts.clear",
    "residency.follow",
    "residency.arrive",
    "a condition of the link",
    "waiting for a job",
    "reading back",
    "embed",
    "attend_and_route",
    "finish",
    "copying",
}


@pytest.mark.parametrize(
    ("what", "at", "accelerator"),
    [(KeyboardInterrupt, 1, False), (KeyboardInterrupt, 1, True), (MemoryError, 3, True)],
)
def test_wherever_a_step_is_interrupted_the_next_one_is_right(what, at, accelerator, monkeypatch):
    """On this CPU alone; and as beside an accelerator, with the host's experts on a thread of their own."""
    model, batches, _ = case("bfloat16")
    if accelerator:
        monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device))
    policy = Split() if accelerator else RandomPolicy(3)
    budget = 9 * model.bank.expert_bytes
    config = OffloadConfig(device_budget=budget, policy=policy, numerics="auto", host_threads=2)
    reached = set()
    with Engine(model, config) as engine:
        expected = run_untapped(engine, batches[0])
        work = interrupted_everywhere(engine, batches[0], expected, what, at, monkeypatch, reached)
        assert work.by["layerscope-cpu_0"] > 0
    if at > 1:
        return  # not every place is come to so often
    missing = (PLACES | {"host_experts.start", "device_experts.place"} if accelerator else PLACES) - reached
    # Waited for is only a copy that is slower than the engine, which beside an accelerator none may be.
    by_chance = {"a condition of the link", *(["transfers.wait"] if accelerator else [])}
    assert not missing - by_chance


@pytest.mark.parametrize(
    ("what", "at", "accelerator"), [(KeyboardInterrupt, 1, False), (MemoryError, 4, True)]
)
def test_the_same_holds_while_experts_are_read_from_the_disk(what, at, accelerator, monkeypatch, tmp_path):
    model, batches, _ = case("bfloat16")
    model = on_disk(model, tmp_path)
    if accelerator:
        monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device))
    size = model.bank.expert_bytes
    config = OffloadConfig(
        device_budget=9 * size,
        host_budget=3 * size,
        policy=Split() if accelerator else RandomPolicy(3),
        numerics="auto",
        host_threads=2,
    )
    reached = set()
    with Engine(model, config) as engine:
        expected = run_untapped(engine, batches[0])
        interrupted_everywhere(engine, batches[0], expected, what, at, monkeypatch, reached)
    assert at > 1 or {"pool.hold", "pool.let_go", "pool.read_ahead", "pool.settle"} <= reached


def test_an_interrupted_wait_for_helpers_leaves_no_completion_behind(monkeypatch):
    """The interrupt comes while a helper computes: it is raised when that one has ended."""
    model, batches, steps = case("bfloat16")
    trap, work = Trap(), Work(monkeypatch)

    class Queue(SimpleQueue):
        def get(self, *arguments):
            if not threading.current_thread().name.startswith("layerscope"):
                trap.look()
            return super().get(*arguments)

    monkeypatch.setattr(threads, "SimpleQueue", Queue)
    config = OffloadConfig(device_budget=0, policy="host-only", numerics="auto", host_threads=2)
    with Engine(model, config) as engine:

        def interrupted():
            trap.set(KeyboardInterrupt, 1)
            work.waits_for = trap.sprung
            engine.generate(batches[0], max_new_tokens=steps)

        with pytest.raises(KeyboardInterrupt):
            in_time(interrupted)
        work.waits_for = None
        agree(in_time(lambda: run(engine, batches, steps)), oracle("bfloat16"))
        at_rest(engine, work)


def test_a_failed_copy_waits_for_the_host_and_does_not_hide_its_failure(monkeypatch):
    """The link breaks while the host computes beside the device: the host is waited for, both are told."""
    model, batches, _ = case("bfloat16")
    monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device))
    begun, told, broken, ended = threading.Event(), threading.Event(), [True], []

    def copy(array, sharding):
        if broken[0]:
            raise OSError("injected: the link")
        return jax.device_put(array, sharding)

    config = OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy=Split(), numerics="auto")
    with copying_by(copy), Engine(model, config) as engine:
        runner = engine.runner
        compute, wait, rest = runner.host_experts.compute, runner.transfers.wait, runner.host_experts.rest

        def slow(*arguments):
            begun.set()  # else it might be given up
            assert told.wait(60)  # until whoever waits for the link knows
            compute(*arguments)
            ended.append(True)
            raise ZeroDivisionError("injected: the host")

        def telling(*arguments):
            try:
                wait(*arguments)
            except TransferError:
                assert begun.wait(60)
                threading.Timer(0.1, told.set).start()
                raise

        monkeypatch.setattr(runner.host_experts, "compute", slow)
        monkeypatch.setattr(runner.transfers, "wait", telling)
        with pytest.raises(TransferError, match="injected: the link") as caught:
            in_time(lambda: engine.generate(batches[0], max_new_tokens=2))
        assert ended == [True]
        assert "ZeroDivisionError('injected: the host')" in "".join(caught.value.__notes__)
        assert rest() is None
        broken[0] = False
        monkeypatch.setattr(runner.host_experts, "compute", compute)
        monkeypatch.setattr(runner.transfers, "wait", wait)
        found = in_time(lambda: run_untapped(engine, batches[0]))
    with Engine(model, config) as engine:
        assert run_untapped(engine, batches[0]) == found
