"""Threads that change places all the time, and programs of a step that was interrupted twice."""

import sys

import pytest
from exact_cases import RandomPolicy, agree, case, oracle, run
from helpers import in_time

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.kernels import cpu
from layerscope_jax.offload.slotted import SlottedExperts
from layerscope_jax.runtime import device_side

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
    finish = device_side.finish_all
    monkeypatch.setattr(device_side, "finish_all", lambda place: waited.append(place) or finish(place))
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
