"""What an engine refuses, counts and holds."""

import gc
import threading
import time

import jax
import pytest
from helpers import PROFILE, PROMPTS, Copies, copying_by, in_time, one_jit, random_model, spelling_model

from layerscope_jax import Engine, HardwareProfile, OffloadConfig, Request, TransferError, load, save
from layerscope_jax.offload import link as transfers_module
from layerscope_jax.offload.link import ATTEMPTS
from layerscope_jax.scheduling.baselines import HostOnly, Resident
from layerscope_jax.scheduling.caching import LRU
from layerscope_jax.scheduling.registry import POLICIES

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def model():
    return spelling_model()


@pytest.fixture(scope="module")
def layers(model):
    """Layer by layer, with experts coming and going."""
    with Engine(model, OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy="lru")) as engine:
        yield engine


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"policy": "magic"}, "policy must be one of arc, .*fiddler, .*lru, .* got 'magic'"),
        ({"device_budget": "8 Gb"}, "device_budget must be a size such as '8GiB'.* got '8 Gb'"),
        ({"device_budget": -1}, "device_budget must be a size"),
        ({"device_budget": 1.5}, "device_budget must be a size"),
        ({"device_budget": True}, "device_budget must be a size"),
        ({"emulated_link_bandwidth": "fast"}, "emulated_link_bandwidth must be a size"),
        ({"emulated_link_bandwidth": 0}, "emulated_link_bandwidth must be more than 0"),
        ({"numerics": "exactly"}, "numerics must be 'auto', 'exact' or 'fast', got 'exactly'"),
        ({"host_threads": 0}, "host_threads must be 1 or more, got 0"),
        (
            {"policy": "lru", "device_budget": "10 KB"},
            "device_budget is too small for policy 'lru'.*61,440 bytes",
        ),
        ({"policy": "on-demand", "device_budget": 0}, "device_budget is too small for policy 'on-demand'"),
        (
            {"policy": "resident", "device_budget": "100KB"},
            "'resident' needs a device_budget for all 16 experts",
        ),
    ],
    ids=str,
)
def test_bad_configurations_are_refused(model, config, message):
    before = threading.active_count()
    with pytest.raises(ValueError, match=message):
        Engine(model, OffloadConfig(**config))
    gc.collect()
    assert threading.active_count() <= before


def test_statistics_of_a_resident_model(model):
    with one_jit(), Engine(model, OffloadConfig(numerics="fast")) as engine:
        result = engine.generate(PROMPTS, max_new_tokens=5)
    stats = result.stats
    assert (stats.policy, stats.mode) == ("resident", "whole")
    assert stats.hit_rate == stats.token_hit_rate == 1
    assert stats.bytes_moved == stats.bytes_wasted == 0
    assert stats.peak_expert_bytes == stats.budget_bytes == model.bank.total_bytes
    assert (stats.prompts, stats.prompt_tokens, stats.new_tokens) == (4, 23, 20)
    assert stats.tokens_per_s == stats.new_tokens / stats.total_s
    assert 0 < stats.tpot_s < stats.total_s
    assert 0 < stats.ttft_s < stats.total_s
    assert 0 < stats.device_share <= 1

    with Engine(model) as engine:
        exact = engine.generate(PROMPTS, max_new_tokens=5)
    assert exact.token_ids == result.token_ids
    assert (exact.stats.policy, exact.stats.mode) == ("resident", "decode")
    assert exact.stats.hit_rate == exact.stats.token_hit_rate == 1
    assert exact.stats.bytes_moved == 0
    assert exact.stats.peak_expert_bytes == model.bank.total_bytes
    assert exact.stats.dispatches > 0
    assert result.stats.kernels is None  # all in one jit
    assert exact.stats.kernels == {"loops": 1.0, "xla": 0.0}


@pytest.mark.parametrize(
    ("policy", "rate"), [("lru", 0.0), ("on-demand", 0.2), ("host-only", 0.0), ("fiddler", 0.2)]
)
def test_bytes_are_those_that_moved(model, policy, rate):
    copies = Copies(rate)
    budget = 10 * model.bank.expert_bytes
    config = OffloadConfig(device_budget=budget, policy=policy, profile=PROFILE)
    with copying_by(copies), Engine(model, config) as engine:
        moved = 0
        for prompts in (PROMPTS, PROMPTS[:2]):
            result = engine.generate(prompts, max_new_tokens=5, record_plans=True)
            stats = result.stats
            assert stats.bytes_moved == stats.bytes_demand == copies.moved - moved
            assert stats.bytes_prefetch == stats.bytes_wasted == 0
            loads = sum(len(plan.load) for plan in result.plans)
            assert stats.bytes_moved == loads * model.bank.expert_bytes
            assert stats.peak_expert_bytes <= stats.budget_bytes == budget
            assert stats.kernels == {"loops": 1.0, "xla": 0.0}
            moved = copies.moved
            active = sum(len(plan.device) + len(plan.host) for plan in result.plans)
            if policy in ("lru", "on-demand"):
                assert stats.hit_rate == pytest.approx(1 - loads / active)
            assert 0 <= stats.hit_rate < 1
            assert 0 <= stats.token_hit_rate < 1
            assert stats.padding == 0  # on a CPU
            assert (stats.host_share > 0) == any(plan.host for plan in result.plans)
            assert stats.link_share <= 1.001
        if policy == "host-only":
            assert stats.bytes_moved == stats.hit_rate == stats.peak_expert_bytes == 0
        else:
            assert copies.moved > 0
            assert (copies.failed > 0) == (rate > 0)
    assert stats.policy == policy
    assert stats.to_json()["bytes_moved"] == stats.bytes_moved


def test_recorded_plans_are_the_calls_own(layers):
    first = layers.generate(PROMPTS[:2], max_new_tokens=3, record_plans=True)
    assert [(plan.step, plan.layer) for plan in first.plans] == [(s, x) for s in range(3) for x in range(2)]
    assert layers.generate(PROMPTS[:2], max_new_tokens=3).plans == []
    assert len(first.plans) == 6


def test_padding_and_finished_requests_route_nowhere(model, layers):
    """A token has K experts; whoever has ended has none."""
    requests = [Request(prompt=[5] * size, max_new_tokens=new) for size, new in ((1, 6), (1, 1), (1, 2))]
    plans = layers.generate(requests, record_plans=True).plans
    choices = model.config.experts_per_token
    for plan in plans:
        running = 3 if plan.step == 0 else 2 if plan.step == 1 else 1
        assert choices <= len(plan.device + plan.host) <= choices * running
    assert {len(plan.device + plan.host) for plan in plans if plan.step > 1} == {choices}


def test_a_progress_bar_changes_nothing(layers, capsys):
    plain = layers.generate(PROMPTS, max_new_tokens=3)
    assert layers.generate(PROMPTS, max_new_tokens=3, progress=True).token_ids == plain.token_ids


@pytest.mark.parametrize("numerics", ["fast", "auto"])
@pytest.mark.parametrize("policy", [Resident(), "resident", "lru"], ids=["object", "resident", "lru"])
def test_everything_fits_without_a_budget(model, policy, numerics):
    for accelerator in (False, True):
        with one_jit(accelerator), Engine(model, OffloadConfig(policy=policy, numerics=numerics)) as engine:
            stats = engine.generate(PROMPTS, max_new_tokens=2).stats
        assert (stats.policy, stats.hit_rate, stats.bytes_moved) == ("resident", 1, 0)
        assert stats.mode == ("whole" if accelerator and numerics == "fast" else "decode")


def test_an_accelerator_that_holds_everything_is_told_of_the_faster_way(model, caplog):
    for numerics, accelerator in [("auto", True), ("fast", True), ("auto", False)]:
        caplog.clear()
        with one_jit(accelerator):
            Engine(model, OffloadConfig(numerics=numerics)).close()
        assert ("numerics='fast'" in caplog.text) == (accelerator and numerics == "auto")


@pytest.mark.parametrize("policy", ["host-only", HostOnly(), LRU()], ids=["host-only", "HostOnly()", "LRU()"])
def test_who_names_host_only_or_brings_a_policy_gets_it(model, policy):
    with Engine(model, OffloadConfig(policy=policy)) as engine:
        stats = engine.generate(PROMPTS, max_new_tokens=2).stats
    assert (stats.policy, stats.mode) == (policy if isinstance(policy, str) else policy.name, "layers")


@pytest.mark.parametrize("numerics", ["fast", "auto"])
def test_it_runs_on_the_models_device(tmp_path, numerics):
    save(random_model(num_layers=1, qk_norm="all"), tmp_path)
    model = load(tmp_path, device=jax.devices()[1])
    with Engine(model, OffloadConfig(numerics=numerics)) as engine:
        assert engine.device == model.device == jax.devices()[1]
        assert len(engine.generate([[1, 2]], max_new_tokens=2).token_ids[0]) == 2
    with pytest.raises(ValueError, match="device must be the model's own"):
        Engine(model, OffloadConfig(numerics=numerics), device=jax.devices()[0])


@pytest.mark.parametrize(
    "config",
    [{"numerics": "fast"}, {}, {"policy": "host-only"}, {"policy": "lru", "device_budget": "60KiB"}],
    ids=["whole", "resident", "host-only", "lru"],
)
def test_a_closed_engine_says_so(model, config):
    with one_jit("numerics" in config):
        engine = Engine(model, OffloadConfig(**config))
    stream = engine.stream([[1]], max_new_tokens=5)
    next(stream)
    engine.close()
    engine.close()
    for call in (
        lambda: engine.generate([[1]], max_new_tokens=2),
        lambda: engine.stream([[1]], max_new_tokens=2),
        lambda: list(stream),
    ):
        with pytest.raises(ValueError, match="the engine was closed; make a new Engine"):
            in_time(call)


def test_leaving_an_engine_ends_its_threads(model):
    before = set(threading.enumerate())
    with Engine(
        model, OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy="fiddler", profile=PROFILE)
    ) as engine:
        engine.generate(PROMPTS, max_new_tokens=2)
        assert {thread.name.split("_")[0] for thread in set(threading.enumerate()) - before} >= {
            "layerscope-link"
        }
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("layerscope")]

    engine = Engine(model, OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy="lru"))
    del engine
    gc.collect()
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("layerscope")]


def interrupting(engine, monkeypatch, call=1):
    """The first wait after `call` calls begins with Ctrl-C."""
    transfers = engine.runner.transfers
    wait, calls = transfers.wait, []

    def interrupted(*arguments):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return wait(*arguments)

    monkeypatch.setattr(transfers, "wait", interrupted)


def test_an_interrupt_waits_for_no_queued_copies(model, monkeypatch):
    """On a link on which a layer's experts take a minute."""
    expected = Engine(model).generate(PROMPTS, max_new_tokens=3).token_ids
    config = OffloadConfig(
        device_budget=9 * model.bank.expert_bytes,
        policy="lru",
        emulated_link_bandwidth=model.bank.expert_bytes // 8,
    )
    with Engine(model, config) as engine:
        interrupting(engine, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            in_time(lambda: engine.generate(PROMPTS, max_new_tokens=3), 10)
        assert not engine.runner.residency.coming
        engine.runner.transfers.bandwidth = None
        assert in_time(lambda: engine.generate(PROMPTS, max_new_tokens=3)).token_ids == expected


def test_a_link_that_broke_is_not_tried_for_all_that_is_queued(model):
    tried = []

    def broken(array, sharding):
        tried.append(None)
        # From the first failure for good on, the engine is given time to hear of it.
        if len(tried) > ATTEMPTS + 1:
            until = time.monotonic() + 60
            while engine.runner.transfers.queue.begun and time.monotonic() < until:
                time.sleep(0.001)
        raise OSError("injected")

    config = OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy="lru")
    with copying_by(broken), Engine(model, config) as engine:
        # As where it is paced: else more begins before the first has failed for good.
        engine.runner.transfers.ahead = 0
        with pytest.raises(TransferError, match="failed 3 times: injected"):
            in_time(lambda: engine.generate(PROMPTS, max_new_tokens=3))
        assert not engine.runner.residency.coming
    assert len(tried) <= ATTEMPTS + 3  # two more chunks had begun by then


def test_an_interrupt_while_queueing_hangs_nobody(model, monkeypatch):
    expected = Engine(model).generate(PROMPTS, max_new_tokens=3).token_ids
    config = OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy="lru")
    with Engine(model, config) as engine:
        queue = engine.runner.transfers._changed

        def interrupted():
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(queue, "notify_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            in_time(lambda: engine.generate(PROMPTS, max_new_tokens=3))
        assert not engine.runner.residency.coming
        assert in_time(lambda: engine.generate(PROMPTS, max_new_tokens=3)).token_ids == expected


def test_a_copy_that_does_not_end_is_an_error_and_keeps_its_room(model, monkeypatch):
    """Also after an interrupt; once it has ended, the engine is fit again."""
    expected = Engine(model).generate(PROMPTS, max_new_tokens=3).token_ids
    monkeypatch.setattr(transfers_module, "STANDSTILL_S", 0.2)
    monkeypatch.setattr(transfers_module, "GRACE_S", 0.2)
    ends = threading.Event()

    class Chunk:
        def __init__(self, array, sharding):
            self.array = jax.device_put(array, sharding)

        def block_until_ready(self):
            ends.wait(60)
            return self.array.block_until_ready()

    config = OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy="lru")
    with copying_by(Chunk), Engine(model, config) as engine:
        residency = engine.runner.residency
        for _ in range(2):
            with pytest.raises(TransferError, match="the link to the device stands still"):
                in_time(lambda: engine.generate(PROMPTS, max_new_tokens=3), 20)
            assert residency.coming
        interrupting(engine, monkeypatch)
        ends.set()
        with pytest.raises(KeyboardInterrupt):
            in_time(lambda: engine.generate(PROMPTS, max_new_tokens=3))
        assert not residency.coming
        assert in_time(lambda: engine.generate(PROMPTS, max_new_tokens=3)).token_ids == expected
        assert residency.used_bytes <= engine.budget_bytes


def test_an_abandoned_stream_leaves_the_engine_fit(layers):
    expected = layers.generate(PROMPTS, max_new_tokens=5).token_ids
    stream = layers.stream(PROMPTS, max_new_tokens=5)
    next(stream)
    stream.close()
    assert layers.generate(PROMPTS, max_new_tokens=5).token_ids == expected


def test_a_policy_that_weighs_costs_measures_the_machine(model):
    """Where no profile is given; within the given pace of the link."""
    seen = []

    class Asking(POLICIES["fiddler"]):
        def init(self, geometry, profile):
            seen.append(profile)
            return super().init(geometry, profile)

    config = OffloadConfig(
        device_budget=9 * model.bank.expert_bytes, policy=Asking(), emulated_link_bandwidth="1MB"
    )
    with Engine(model, config) as engine:
        assert engine.generate(PROMPTS[:2], max_new_tokens=2).token_ids
    (profile,) = seen
    assert isinstance(profile, HardwareProfile)
    assert profile.transfer_ms >= 1e3 * model.bank.expert_bytes / 1e6
    for table in (profile.host_ms, profile.device_ms):
        assert min(table.ms) > 0
        assert list(table.ms) == sorted(table.ms)
