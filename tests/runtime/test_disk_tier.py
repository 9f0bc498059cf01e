"""Experts on the disk: the same bits as in memory, whatever the budget, the policy and the disk do."""

import os
from pathlib import Path

import pytest
from disk_models import on_disk
from exact_cases import RandomPolicy, agree, case, oracle, run
from helpers import in_time, one_jit, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import layerscope_jax as ls
from layerscope_jax import POLICIES, Engine, LayerPlan, OffloadConfig, ReadError, Replay
from layerscope_jax.offload import disk
from layerscope_jax.offload.disk import DiskBank
from layerscope_jax.offload.slotted import SlottedExperts
from layerscope_jax.runtime import device_side
from layerscope_jax.scheduling.costs import HardwareProfile, TimeTable

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROFILE = HardwareProfile(
    host_ms=TimeTable((1, 8), (1.0, 3.0)),
    device_ms=TimeTable((1, 8), (0.2, 0.4)),
    transfer_ms=2.0,
    source="made up",
)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    models = {}

    def of(name):
        if name not in models:
            models[name] = on_disk(case(name).model, tmp_path_factory.mktemp(name))
        return models[name]

    return of


@given(data=st.data())
@settings(deadline=None, max_examples=6)
def test_any_plan_and_budget_give_the_same_bits(stored, data):
    _, batches, steps = case("bfloat16")
    model = stored("bfloat16")
    total, size = len(list(model.bank)), model.bank.expert_bytes
    host, device = data.draw(st.integers(1, total)), data.draw(st.integers(0, total - 1))
    config = OffloadConfig(
        device_budget=device * size,
        host_budget=host * size + data.draw(st.integers(0, size - 1)),
        policy=RandomPolicy(data.draw(st.integers(0, 99))),
    )
    with Engine(model, config) as engine:
        agree(in_time(lambda: run(engine, batches, steps)), oracle("bfloat16"))
        assert engine.runner.pool.slots == host
        assert len(engine.runner.pool._made) <= host


def test_beside_an_accelerator_the_bits_are_those_of_experts_in_memory(stored, monkeypatch):
    """There the host computes on a thread of its own, and rows of the device are XLA's."""
    memory, batches, _ = case("bfloat16")
    monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device))
    size, found = memory.bank.expert_bytes, []
    for model, host in ((memory, None), (stored("bfloat16"), size), (stored("bfloat16"), 7 * size)):
        config = OffloadConfig(
            device_budget=9 * size, host_budget=host, policy=RandomPolicy(3), numerics="auto", host_threads=2
        )
        with Engine(model, config) as engine:
            found.append(in_time(lambda: run(engine, batches[:1], 4)))
    agree(found[1], found[0])
    agree(found[2], found[0])


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_runs_unchanged_over_the_disk(stored, policy):
    _, batches, steps = case("bfloat16")
    model = stored("bfloat16")
    size = model.bank.expert_bytes
    budget = None if policy == "resident" else 9 * size
    config = OffloadConfig(device_budget=budget, host_budget=5 * size, policy=policy, profile=PROFILE)
    with Engine(model, config) as engine:
        assert engine.runner.mode == "layers"
        agree(in_time(lambda: run(engine, batches, steps)), oracle("bfloat16"))
        stats = engine.generate(batches[0], max_new_tokens=2).stats
        assert stats.bytes_read > 0


def test_experts_that_all_fit_an_accelerator_are_read_once(stored, monkeypatch):
    """They go from the disk to the device one by one, and the host holds few."""
    model = stored("float32")
    _, batches, steps = case("float32")
    expected, _ = oracle("float32")  # before anything is replaced: other tests use it too
    monkeypatch.setattr(device_side, "device_experts", lambda device, cpu: SlottedExperts(device))
    with one_jit(), Engine(model, OffloadConfig(host_budget=model.bank.expert_bytes)) as engine:
        assert engine.policy.name == "resident"
        tokens, _ = run(engine, batches, steps)
        assert len(engine.runner.residency.resident) == len(list(model.bank))
    assert tokens == expected


def test_without_an_accelerator_the_pool_alone_holds_experts(stored):
    model = stored("bfloat16")
    _, batches, steps = case("bfloat16")
    with Engine(model) as engine:
        assert (engine.policy.name, engine.runner.mode, engine.budget_bytes) == ("host-only", "layers", 0)
        agree(run(engine, batches, steps), oracle("bfloat16"))
        pool = engine.runner.pool
        assert pool.slots == len(list(model.bank))
        before = pool.stats.demand_bytes + pool.stats.ahead_bytes
        assert before <= model.bank.total_bytes
        stats = engine.generate(batches[0], max_new_tokens=3).stats
    assert stats.host_hit_rate == 1.0
    assert stats.bytes_read == 0


def test_the_plan_says_what_is_read(stored):
    model = stored("bfloat16")
    _, batches, _ = case("bfloat16")
    config = OffloadConfig(policy="host-only", host_budget=15 * model.bank.expert_bytes)
    with Engine(model, config) as engine:
        result = engine.generate(batches[0], max_new_tokens=4, record_plans=True)
    plans, stats = result.plans, result.stats
    assert any(plan.read for plan in plans)
    assert any(plan.read_ahead for plan in plans)
    for plan in plans:
        assert {expert.expert for expert in plan.read} <= set(plan.host)
        assert all(expert.layer != plan.layer for expert in plan.read_ahead)
        assert LayerPlan.from_json(plan.to_json()) == plan
    assert stats.bytes_read >= stats.bytes_read_wasted
    assert 0 < stats.host_hit_rate < 1
    assert 0 < stats.disk_share <= 1
    assert stats.disk_wait_s > 0


def test_recorded_plans_are_replayed_over_the_disk(stored):
    """Where experts are computed is repeated; what that needs from the disk follows from what is there."""
    model = stored("bfloat16")
    _, batches, _ = case("bfloat16")
    size = model.bank.expert_bytes
    config = OffloadConfig(device_budget=9 * size, host_budget=4 * size, policy=RandomPolicy(1))
    with Engine(model, config) as engine:
        recorded = engine.generate(batches[0], max_new_tokens=4, record_plans=True)
    replay = OffloadConfig(device_budget=9 * size, host_budget=6 * size, policy=Replay(recorded.plans))
    with Engine(model, replay) as engine:
        again = engine.generate(batches[0], max_new_tokens=4, record_plans=True)
    assert again.token_ids == recorded.token_ids
    for ours, theirs in zip(again.plans, recorded.plans, strict=True):
        assert (ours.host, ours.device) == (theirs.host, theirs.device)


def test_warming_up_reads_an_expert_and_changes_nothing(stored):
    model = stored("bfloat16")
    config = OffloadConfig(host_budget=3 * model.bank.expert_bytes, policy="host-only")
    with Engine(model, config) as engine:
        engine.warmup(prompt_tokens=3, max_num_seqs=1, new_tokens=2)
        assert not engine.runner.pool._where
        assert engine.runner.pool.stats.misses == 0


def test_a_saved_model_runs_from_its_folder(tmp_path):
    model = random_model(family="qwen3_moe", num_layers=2)
    ls.save(model, tmp_path)
    prompts = [[5, 20, 7], [17]]
    with Engine(model) as engine:
        expected = run(engine, [prompts], 4)
    from_disk = ls.load(tmp_path, experts="disk")
    assert isinstance(from_disk.bank, DiskBank)
    with Engine(from_disk, OffloadConfig(host_budget=4 * from_disk.bank.expert_bytes)) as engine:
        agree(run(engine, [prompts], 4), expected)


def test_what_cannot_run_from_the_disk_is_refused_in_words(tmp_path):
    model = random_model(family="qwen3_moe", num_layers=2)
    ls.save(model, tmp_path)
    size = model.bank.expert_bytes
    with pytest.raises(ValueError, match=r"experts must be 'memory' or 'disk', got 'tape'"):
        ls.load(tmp_path, experts="tape")
    with pytest.raises(
        ValueError, match=r"expected bfloat16, as experts='disk' converts nothing, got float32"
    ):
        ls.load(tmp_path, experts="disk", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"cannot have the format 'float32'"):
        ls.load(tmp_path, experts="disk", format="float32")
    with pytest.raises(ValueError, match=r"host_budget='1GiB' bounds .* experts='disk'"):
        Engine(model, OffloadConfig(host_budget="1GiB"))
    from_disk = ls.load(tmp_path, experts="disk")
    with pytest.raises(
        ValueError, match=rf"host_budget must hold one expert of {size:,} bytes, got {size - 1:,}"
    ):
        Engine(from_disk, OffloadConfig(host_budget=size - 1))
    with pytest.raises(ValueError, match="host_budget"):
        OffloadConfig(host_budget="much")


@pytest.mark.parametrize("policy", ["host-only", "lru"])
def test_a_read_that_fails_in_a_step_raises_and_the_next_call_is_right(stored, policy, monkeypatch):
    """Before host compute, and before the link."""
    model = stored("bfloat16")
    _, batches, steps = case("bfloat16")
    size, reads = model.bank.expert_bytes, []
    config = OffloadConfig(
        device_budget=9 * size if policy == "lru" else 0, host_budget=3 * size, policy=policy, profile=PROFILE
    )

    def failing(number, memories, offset):
        reads.append(offset)
        if len(reads) > 20:
            raise OSError(5, os.strerror(5))
        return os.preadv(number, memories, offset)

    with Engine(model, config) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(disk, "preadv", failing)
            with pytest.raises(ReadError, match=r"experts_\d\.bin: Input/output error"):
                in_time(lambda: engine.generate(batches[0], max_new_tokens=steps))
        assert engine.runner._settled
        assert engine.runner.pool._reading == 0
        agree(in_time(lambda: run(engine, batches, steps)), oracle("bfloat16"))


def test_a_shard_that_is_cut_or_changed_under_a_running_engine_gives_no_wrong_token(tmp_path):
    original, batches, steps = case("bfloat16")
    model = on_disk(original, tmp_path)
    config = OffloadConfig(host_budget=3 * model.bank.expert_bytes, policy="host-only")
    shard = Path(tmp_path / "experts_1.bin")
    with Engine(model, config) as engine:
        agree(run(engine, batches, steps), oracle("bfloat16"))
        content = shard.read_bytes()
        os.truncate(shard, 10)
        with pytest.raises(ReadError, match=r"experts_1\.bin was cut off"):
            in_time(lambda: engine.generate(batches[0], max_new_tokens=steps))
        shard.write_bytes(content)
        with pytest.raises(ReadError, match=r"experts_1\.bin was changed"):
            in_time(lambda: engine.generate(batches[0], max_new_tokens=steps))
    with pytest.raises(ReadError, match=r"experts_1\.bin was changed"), Engine(model, config) as engine:
        engine.generate(batches[0], max_new_tokens=steps)
