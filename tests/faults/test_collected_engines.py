"""The garbage collector may end an engine anywhere, also within JAX, which must not be called again there."""

import gc
import sys
import weakref
from pathlib import Path

import jax
import pytest
from disk_models import on_disk
from exact_cases import RandomPolicy, case
from helpers import one_jit

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.generation.slots import IDLE_ROWS
from layerscope_jax.offload.slotted import SlottedExperts
from layerscope_jax.runtime import device_side

pytestmark = pytest.mark.usefixtures("quick_compiles")

JAX = str(Path(jax.__file__).parent)


class Calls:
    """The functions of JAX's that are called while a finalizer of ours runs."""

    def __init__(self):
        self.seen, self.collecting = set(), False

    def __call__(self, frame, event, argument):
        name = frame.f_code.co_qualname
        its_own = name == "_xla_gc_callback"  # which JAX has the collector call
        if self.collecting and event == "call" and frame.f_code.co_filename.startswith(JAX) and not its_own:
            self.seen.add(name)

    def phase(self, phase, _):
        self.collecting = phase == "start"


def calls_as(owner):
    """What of JAX's is called as an object is collected that is part of a cycle; takes it out of a list."""
    calls, gone = Calls(), weakref.ref(owner[0])
    gc.callbacks.append(calls.phase)
    with jax.disable_jit():  # without compiled programs each operation is a call that shows
        sys.setprofile(calls)
        try:
            owner.clear()
            gc.collect()
        finally:
            sys.setprofile(None)
            gc.callbacks.remove(calls.phase)
    assert gone() is None
    return calls.seen


@pytest.mark.parametrize("kind", ["resident", "whole", "policy", "slots", "in-step", "disk"])
def test_no_engine_calls_jax_as_it_is_collected(kind, monkeypatch, tmp_path):
    model, _, _ = case("bfloat16")
    size = model.bank.expert_bytes
    if kind == "slots":
        monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device))
    if kind == "disk":
        model = on_disk(model, tmp_path)
    config = {
        "resident": lambda: OffloadConfig(),
        "whole": lambda: OffloadConfig(numerics="fast"),
        "in-step": lambda: OffloadConfig(policy="in-step", device_budget=20 * size),
        "disk": lambda: OffloadConfig(policy="lru", device_budget=9 * size, host_budget=5 * size),
    }.get(kind, lambda: OffloadConfig(policy=RandomPolicy(3), device_budget=9 * size))()
    with one_jit(kind == "whole"):
        engine = Engine(model, config)
    engine.generate([[1, 2, 3]], max_new_tokens=3)
    engine.itself = engine
    owner = [engine]
    del engine
    assert calls_as(owner) == set()


def test_nor_is_it_called_as_a_stream_is_collected():
    """Whose request then ends."""

    class Reader:
        pass

    model, _, _ = case("bfloat16")
    with Engine(model, OffloadConfig()) as engine:
        owner = [Reader()]
        owner[0].itself, owner[0].stream = owner[0], engine.stream([[1, 2, 3]], max_new_tokens=40)
        next(owner[0].stream)
        assert calls_as(owner) == set()
        assert engine.generate([[1, 2, 3]], max_new_tokens=3).token_ids


def test_nor_is_it_called_as_a_handle_is_collected_that_nobody_has_read():
    """Another call is to begin, and more rows are kept for prefixes than it takes."""

    class Holder:
        pass

    model, _, _ = case("bfloat16")
    with Engine(model, OffloadConfig(prefix_cache=True)) as engine:
        engine.generate([[number + 1, 2, 3] for number in range(8)], max_new_tokens=2)
        kept = engine._loop._slots.rows
        assert kept > IDLE_ROWS
        owner = [Holder()]
        owner[0].itself, owner[0].handle = owner[0], engine.submit([1, 2, 3], max_new_tokens=4)
        other = engine.submit([5, 6], max_new_tokens=2)
        assert calls_as(owner) == set()
        assert engine._loop._slots.rows == kept
        assert len(other.result().token_ids) == 2


def test_what_would_be_seen_is_seen():
    class Owner:
        pass

    owner = [Owner()]
    owner[0].itself = owner[0]
    weakref.finalize(owner[0], jax.device_put, 1.0)
    assert "device_put" in calls_as(owner)
