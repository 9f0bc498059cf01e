"""Threads that change places all the time, and what a step reads as its engine ends."""

import gc
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from exact_cases import RandomPolicy, agree, case, oracle, run
from helpers import in_time

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.kernels import cpu
from layerscope_jax.offload.host_experts import HostExperts
from layerscope_jax.offload.slotted import SlottedExperts
from layerscope_jax.runtime import device_side, layerwise, resources, unsettled

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_threads_that_change_places_all_the_time_give_the_same_bits(monkeypatch):
    model, batches, steps = case("bfloat16")
    monkeypatch.setattr(cpu, "SHARE_BYTES", 1)  # several threads compute even a little
    config = OffloadConfig(
        device_budget=9 * model.bank.expert_bytes, policy=RandomPolicy(7), numerics="auto", host_threads=3
    )
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with Engine(model, config) as engine:
            agree(in_time(lambda: run(engine, batches, steps)), oracle("bfloat16"))
    finally:
        sys.setswitchinterval(before)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("accelerator", [False, True])
def test_programs_of_an_interrupted_step_have_ended_before_its_memory_goes(accelerator, monkeypatch):
    """They read the model and jobs by address; a second interrupt ends the waiting for them."""
    model, batches, _ = case("bfloat16")
    if accelerator:
        monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device))
    waited = []
    finish = layerwise.finish_all
    monkeypatch.setattr(layerwise, "finish_all", lambda place: waited.append(place) or finish(place))
    config = OffloadConfig(device_budget=0, policy="host-only", numerics="auto")
    with Engine(model, config) as engine:
        monkeypatch.setattr(engine.runner, "_read_back", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(batches[0], max_new_tokens=2)
        assert len(waited) == 1
        with monkeypatch.context() as patch:
            patch.setattr(engine.runner.host_experts, "rest", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.generate(batches[0], max_new_tokens=2)
        assert len(waited) == 1
    assert len(waited) == 2


def test_an_engine_that_is_only_dropped_leaves_them_what_they_read_until_another_is_made(monkeypatch):
    model, batches, _ = case("bfloat16")
    config = OffloadConfig(device_budget=0, policy="host-only", numerics="auto")
    with monkeypatch.context() as patch:
        engine = Engine(model, config)
        runner = engine.runner
        patch.setattr(runner, "_read_back", interrupt)
        patch.setattr(runner.host_experts, "rest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(batches[0], max_new_tokens=2)
        del engine
        gc.collect()
        assert unsettled._kept == [runner]
    with Engine(model, config):
        assert unsettled._kept == []


def test_programs_of_several_devices_are_waited_for_too(monkeypatch):
    """XLA runs a program of several devices in no order with those of one."""
    model, batches, _ = case("bfloat16")
    model, waited = model.over(2), []
    finish = layerwise.finish_all
    monkeypatch.setattr(layerwise, "finish_all", lambda place: waited.append(place) or finish(place))
    with Engine(model, OffloadConfig(device_budget=0, policy="host-only", numerics="auto")) as engine:
        monkeypatch.setattr(engine.runner, "_read_back", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(batches[0], max_new_tokens=2)
        assert waited == [engine.runner.transfers.sharding, model.partition.replicated]


@pytest.mark.parametrize("accelerator", [False, True])
def test_an_engine_is_closed_after_a_step_however_long_that_takes(accelerator, monkeypatch):
    model, batches, _ = case("bfloat16")
    if accelerator:
        monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device))
    monkeypatch.setattr(resources, "PATIENCE_S", 0.01)
    compute, begun, go_on = HostExperts.compute, threading.Event(), threading.Event()

    def slow(self, *arguments):
        begun.set()
        assert go_on.wait(60)
        compute(self, *arguments)

    config = OffloadConfig(device_budget=0, policy="host-only", numerics="auto")
    with Engine(model, config) as engine, ThreadPoolExecutor(2) as threads:
        expected = engine.generate(batches[0], max_new_tokens=1).token_ids
        monkeypatch.setattr(HostExperts, "compute", slow)
        answer = threads.submit(engine.generate, batches[0], max_new_tokens=1)
        assert begun.wait(60)
        closed = threads.submit(engine.close)
        threading.Timer(0.2, go_on.set).start()
        assert in_time(answer.result).token_ids == expected
        in_time(closed.result)


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="has no such signal")
def test_a_signal_handler_may_close_the_engine_that_runs(monkeypatch):
    """The step then fails, or has ended: nobody waits for ever."""
    model, batches, _ = case("bfloat16")
    monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device))
    compute = HostExperts.compute

    def signalled(self, *arguments):
        signal.raise_signal(signal.SIGALRM)  # of which the main thread hears, wherever it is
        compute(self, *arguments)

    engine = Engine(model, OffloadConfig(device_budget=0, policy="host-only", numerics="auto"))
    before = signal.signal(signal.SIGALRM, lambda *_: engine.close())
    try:
        monkeypatch.setattr(HostExperts, "compute", signalled)
        with suppress(Exception):
            engine.generate(batches[0], max_new_tokens=2)
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ValueError, match="closed"):
        engine.generate(batches[0], max_new_tokens=2)
