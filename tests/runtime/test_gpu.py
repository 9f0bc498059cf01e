"""On an NVIDIA GPU: the tokens are the same, things are where they should be, and nothing is compiled late.

Elsewhere these are skipped: other tests go through the same code on a CPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_programs import compiled
from exact_cases import RandomPolicy, prompts, tap
from helpers import Copies, copying_by, in_time, random_model

from layerscope_jax import Engine, ExpertId, OffloadConfig, TransferError
from layerscope_jax.kernels.grouping import Assignments
from layerscope_jax.offload.bank import device_sharding
from layerscope_jax.offload.executors import DeviceExperts
from layerscope_jax.offload.host_experts import HostExperts
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.runtime.whole import WholeModel
from layerscope_jax.scheduling.registry import FORECASTING
from layerscope_jax.support.machine import cpu_device

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-4
"""Of logits of size 1 to 3 in float32, summed in another order; products of ten bits would be off by more."""

PROMPTS = prompts(np.random.default_rng(5), 61, 1, 6, 3, 14, 2)
STEPS = 12


@pytest.fixture(autouse=True, scope="module")
def gpu():
    """The device. Products keep all bits of float32: by default a GPU takes ten of them."""
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no NVIDIA GPU here")
    jax.config.update("jax_default_matmul_precision", "highest")
    yield jax.devices()[0]
    jax.config.update("jax_default_matmul_precision", None)


@pytest.fixture(scope="module")
def model():
    return random_model(num_experts=12, experts_per_token=3)


@pytest.fixture(scope="module")
def resident(model):
    """Tokens and logits with everything resident, layer by layer."""
    with Engine(model) as engine:
        assert isinstance(engine.runner, LayerByLayer)
        logits = tap(engine)
        tokens = engine.generate(PROMPTS, max_new_tokens=STEPS, stop_token_ids=()).token_ids
    best = np.sort(np.concatenate(logits), axis=-1)[:, -2:]
    assert (best[:, 1] - best[:, 0]).min() > 2 * TOLERANCE  # else tokens might differ for no fault
    return tokens, logits


def agree(engine, resident):
    logits = tap(engine)
    result = in_time(lambda: engine.generate(PROMPTS, max_new_tokens=STEPS, stop_token_ids=()), 300)
    for step, (found, expected) in enumerate(zip(logits, resident[1], strict=True)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE, err_msg=f"logits of step {step}")
    assert result.token_ids == resident[0]
    return result.stats


@pytest.mark.parametrize("slots", [12, 20, 33])
@pytest.mark.parametrize(
    "policy",
    ["on-demand", "lru", "host-only", "fiddler", "bandwidth-split", "hybrimoe", "dali", "presched", "auto"],
)
def test_every_policy_and_budget_gives_the_tokens_of_everything_resident(model, resident, policy, slots):
    config = OffloadConfig(
        device_budget=slots * model.bank.expert_bytes,
        policy=policy,
        predictor="gate" if policy in FORECASTING else None,
    )
    with Engine(model, config) as engine:
        stats = agree(engine, resident)
    assert stats.peak_expert_bytes <= config.device_budget
    if policy in ("on-demand", "lru"):
        assert stats.bytes_moved > 0
        assert stats.host_share == 0
    if policy == "host-only":
        assert stats.bytes_moved == 0 < stats.host_share


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_random_plans_give_them_too_and_so_does_a_link_that_fails(model, resident, seed, rate):
    policy = RandomPolicy(seed, device=0.6)
    config = OffloadConfig(device_budget=17 * model.bank.expert_bytes, policy=policy)
    copies = Copies(rate, seed)
    with copying_by(copies), Engine(model, config) as engine:
        agree(engine, resident)
    assert copies.moved > 0
    assert (copies.failed > 0) == (rate > 0)


def test_everything_resident_in_one_program_gives_them_too(model, resident):
    with Engine(model) as engine:
        assert isinstance(engine.runner, WholeModel)
        agree(engine, resident)


def test_a_copy_that_fails_for_good_is_an_error_and_the_next_call_is_right(model, resident):
    copies = Copies()
    config = OffloadConfig(device_budget=14 * model.bank.expert_bytes, policy="lru")
    with copying_by(copies), Engine(model, config) as engine:
        engine.generate(PROMPTS[:2], max_new_tokens=2)
        copies.broken = True
        with pytest.raises(TransferError, match="to the device failed 3 times: injected"):
            in_time(lambda: engine.generate(PROMPTS, max_new_tokens=STEPS))
        assert not engine.runner.residency.coming
        copies.broken = False
        agree(engine, resident)


def test_experts_lie_where_they_should(gpu, model):
    """The bank in pinned host memory, read there by the host; residents and all else on the device."""
    assert {a.sharding.memory_kind for e in model.bank for a in model.bank.chunks(e)} == {"pinned_host"}
    assert model.bank.arrays_per_expert == 1
    assert {a.sharding.memory_kind for a in jax.tree.leaves(model.dense)} == {"device"}
    config = OffloadConfig(device_budget=15 * model.bank.expert_bytes, policy="lru")
    with Engine(model, config) as engine:
        engine.generate(PROMPTS, max_new_tokens=2)
        residency = engine.runner.residency
        slot_of = {ExpertId(*e): residency.use(e[0], [e[1]])[0] for e in list(residency.resident)}
        assert len(slot_of) == 15
        pool = engine.runner.device_experts._pool
        for array in pool:
            assert array.sharding.memory_kind == "device"
            assert array.devices() == {gpu}
        for expert, slot in slot_of.items():
            for array, view in zip(pool, model.bank.views(expert), strict=True):
                np.testing.assert_array_equal(np.asarray(array[slot]), view)


@pytest.mark.parametrize("tokens", [30, 600])  # few and many rows an expert: loops, and XLA's products
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_the_host_computes_what_the_device_does(gpu, dtype, tolerance, tokens):
    model = random_model(num_experts=8, num_layers=1, dtype=jnp.dtype(dtype))
    config, rng = model.config, np.random.default_rng(3)
    chosen = np.argsort(rng.random((tokens, config.num_experts)), axis=1)[:, :2].astype(np.int32)
    rows, experts = Assignments(chosen), list(range(config.num_experts))
    inputs = jax.device_put(rng.standard_normal((tokens, config.hidden_size)).astype(dtype), gpu)
    device, there = DeviceExperts(gpu), device_sharding(gpu)
    held = [jax.device_put(model.bank[ExpertId(0, expert)], there) for expert in experts]
    outputs = device.take(rows.total, config.hidden_size, inputs.dtype)
    outputs, _ = device.run(outputs, inputs, rows, experts, lambda some: [held[expert] for expert in some])
    written = np.zeros(outputs.shape, outputs.dtype)
    host = HostExperts(model.bank, cpu_device(), threads=2)
    try:
        host.compute(written, 0, inputs, rows, experts)
    finally:
        host.close()
    found, expected = (np.asarray(array, np.float32)[:-1] for array in (written, outputs))
    assert np.abs(expected).mean() > 0.1
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("policy", "width"),  # each of a shape for which nothing is compiled yet
    [("resident", 20), ("host-only", 24), ("lru", 28), ("auto", 36), ("random", 40)],
)
def test_after_a_warm_up_nothing_is_compiled(policy, width):
    model = random_model(num_layers=2, hidden_size=width, num_experts=5, seed=3)
    config = OffloadConfig(
        device_budget=None if policy == "resident" else 6 * model.bank.expert_bytes,
        policy=RandomPolicy() if policy == "random" else policy,
    )
    rng = np.random.default_rng(0)
    with Engine(model, config) as engine:
        assert engine.warmup(max_num_seqs=3, prompt_tokens=20, new_tokens=6).programs > 0
        before = len(compiled)
        for _ in range(3):
            batch = prompts(rng, 61, 20, *rng.integers(1, 20, 2))
            engine.generate(batch, max_new_tokens=6, stop_token_ids=())
        assert len(compiled) == before


def test_the_cache_inside_the_step_gives_the_tokens_of_the_resident_model(model, resident):
    """With slots for a few experts of each layer, filled by a kernel that reads the host's memory."""
    pytest.importorskip("warp")
    layers, experts = model.config.num_moe_layers, model.config.num_experts
    slots = -(-4 * (experts + 3 * layers) // 3)  # a quarter at most is set aside for copies on the way
    config = OffloadConfig(device_budget=slots * model.bank.expert_bytes, policy="in-step")
    with Engine(model, config) as engine:
        result = engine.generate(PROMPTS, max_new_tokens=STEPS, stop_token_ids=())
    assert result.stats.mode == "in-step"
    assert result.token_ids == resident[0]
