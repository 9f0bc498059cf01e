"""What stands in for a part of the engine has the whole face of it."""

import inspect

import jax
import pytest
from helpers import random_model

from layerscope_jax.config import OffloadConfig
from layerscope_jax.engine import Engine
from layerscope_jax.kernels.cpu import CpuExperts
from layerscope_jax.offload.executors import DeviceExperts, SharedExperts
from layerscope_jax.offload.host_experts import HostExperts
from layerscope_jax.offload.link import Transfers
from layerscope_jax.profiling import measure as calibration
from layerscope_jax.profiling.jobs import NoCopies
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.runtime.resident import DecodeRehearsal, ResidentOnCpu
from layerscope_jax.runtime.runner import Runner
from layerscope_jax.runtime.warmup import Rehearsal
from layerscope_jax.runtime.whole import WholeModel
from layerscope_jax.scheduling.plan import Policy, Replay
from layerscope_jax.scheduling.registry import POLICIES
from layerscope_jax.simulation.virtual_link import Link

pytestmark = pytest.mark.usefixtures("quick_compiles")

RUNNERS = (WholeModel, LayerByLayer, ResidentOnCpu, Rehearsal, DecodeRehearsal)


def face(owner):
    """Public methods by name, with the names of their parameters."""
    methods = inspect.getmembers(owner, inspect.isfunction)
    return {name: list(inspect.signature(call).parameters) for name, call in methods if name[0] != "_"}


@pytest.mark.parametrize(
    ("stand_in", "real"),
    [
        (NoCopies, Transfers),
        (SharedExperts, DeviceExperts),
        (DeviceExperts, SharedExperts),
        *((runner, Runner) for runner in RUNNERS),
        *((policy, Policy) for policy in [*POLICIES.values(), Replay]),
    ],
)
def test_a_stand_in_has_every_method_of_what_it_stands_for(stand_in, real):
    found, wanted = face(stand_in), face(real)
    assert wanted.keys() <= found.keys()
    for name in wanted:
        assert len(found[name]) == len(wanted[name]), name


def test_a_virtual_link_has_what_is_asked_of_a_link():
    """What a runner asks of its link by itself; on a virtual clock each is told the time."""
    found, wanted = face(Link), face(Transfers)
    for name in ("submit", "drop", "arrivals", "rest"):
        assert found[name] == [*wanted[name], "now"]


@pytest.mark.parametrize("runner", RUNNERS)
def test_runners_are_told_and_asked_the_same(runner):
    asked = {"step", "score", "reset", "stats", "rehearsal", "settle_if_needed", "close"}
    assert face(Runner).keys() == asked
    assert {name: face(runner)[name] for name in face(Runner)} == face(Runner)


def test_the_attributes_that_a_runner_reads_of_its_link_are_there():
    real = Transfers(random_model().bank, jax.devices()[0])
    real.close()
    without = NoCopies(real.sharding)
    for name in ("sharding", "stats", "within"):
        assert hasattr(without, name)
        assert hasattr(real, name)
    with pytest.raises(RuntimeError, match="nothing is to be copied here"):
        without.submit([(0, 0)], [])


@pytest.mark.parametrize("what", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("call", [1, 2, 6, 12])
def test_an_engine_that_is_interrupted_while_it_measures_says_just_that(what, call, monkeypatch):
    """And none of its threads goes on; the next engine is made as ever."""
    model, calls, made = random_model(num_layers=2), [], []
    compute, init = HostExperts.compute, HostExperts.__init__

    def interrupted(self, *arguments):
        calls.append(None)
        if len(calls) == call:
            raise what
        return compute(self, *arguments)

    def kept(self, *arguments, **named):
        made.append(self)
        init(self, *arguments, **named)

    monkeypatch.setattr(calibration, "ROUGH", calibration.Points(tokens=(1,), decode=(1,), prefill=(8,)))
    monkeypatch.setattr(HostExperts, "compute", interrupted)
    monkeypatch.setattr(HostExperts, "__init__", kept)
    config = OffloadConfig(device_budget=8 * model.bank.expert_bytes, policy="presched")
    with pytest.raises(what):
        Engine(model, config)
    (host,) = made
    assert not any(thread.is_alive() for thread in [*host._thread._threads, *host.cpu._helpers._threads])


def test_an_engine_that_is_interrupted_in_a_layer_that_it_times_says_just_that(monkeypatch):
    """There a stand-in takes the link's place."""
    model = random_model(num_layers=2)
    decide = LayerByLayer._decide

    def interrupted(self, *arguments):
        decide(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "ROUGH", calibration.Points(tokens=(1,), decode=(1,), prefill=(8,)))
    monkeypatch.setattr(LayerByLayer, "_decide", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Engine(model, OffloadConfig(device_budget=8 * model.bank.expert_bytes, policy="presched"))


def test_no_two_threads_are_in_one_executor_while_an_engine_measures(monkeypatch):
    """Host and device are timed beside each other; where both are this CPU, by threads of their own each."""
    inside, twice = {}, []
    compute = CpuExperts.compute

    def watched(self, *arguments):
        if inside.setdefault(id(self), 0):
            twice.append(self)
        inside[id(self)] += 1
        try:
            return compute(self, *arguments)
        finally:
            inside[id(self)] -= 1

    monkeypatch.setattr(CpuExperts, "compute", watched)
    monkeypatch.setattr(calibration, "ROUGH", calibration.Points(tokens=(1, 64), decode=(1,), prefill=(8,)))
    model = random_model(num_layers=2)
    Engine(model, OffloadConfig(device_budget=8 * model.bank.expert_bytes, policy="presched")).close()
    assert len(inside) >= 2
    assert twice == []
