"""Dense layers in fewer bits: the same bits under every policy and budget, near the plain model's."""

import jax.numpy as jnp
import numpy as np
import pytest
from exact_cases import agree, run
from helpers import PROFILE, random_model

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.checkpoints.dense_weights import named_arrays
from layerscope_jax.models.config import LatentSizes
from layerscope_jax.models.matrices import Int8Matrix

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCHES = [[[5, 20, 7], [17], list(range(30, 44))]]


@pytest.fixture(scope="module")
def plain():
    return random_model(
        num_layers=2, num_experts=4, moe_intermediate_size=32, tie_embeddings=True, dtype=jnp.bfloat16
    )


@pytest.fixture(scope="module")
def model(plain):
    return plain.with_format("int8").with_dense_format("int8")


@pytest.fixture(scope="module")
def resident(model):
    with Engine(model) as engine:
        assert engine.runner.mode == "decode"
        stats = engine.generate([[1]], max_new_tokens=1).stats
        assert (stats.format, stats.dense_format, stats.dense_bytes) == ("int8", "int8", model.dense_bytes)
        return run(engine, BATCHES, 3)


@pytest.mark.parametrize(("policy", "slots"), [("lru", 5), ("host-only", 0), ("presched", 7)])
def test_every_policy_has_the_bits_of_everything_resident(model, resident, policy, slots):
    budget = slots * model.bank.expert_bytes
    with Engine(model, OffloadConfig(device_budget=budget, policy=policy, profile=PROFILE)) as engine:
        agree(run(engine, BATCHES, 3), resident)


def test_logits_are_near_those_of_plain_layers(plain, resident):
    with Engine(plain, OffloadConfig(expert_format="int8")) as engine:
        _, logits = run(engine, BATCHES, 1)
    assert np.corrcoef(resident[1][0].ravel(), logits[0].ravel())[0, 1] > 0.99


def test_an_engine_packs_the_layers_of_a_model(plain, model, resident):
    assert model.with_dense_format("int8") is model
    with Engine(plain, OffloadConfig(expert_format="int8", dense_format="int8")) as engine:
        assert (plain.dense_format, engine.model.dense_format) == (None, "int8")
        agree(run(engine, BATCHES, 3), resident)
    with pytest.raises(ValueError, match="dense_format must be 'int8' or None, got 'int4'"):
        OffloadConfig(dense_format="int4")


LATENT = {
    "family": "deepseek_v2",
    "attention": "latent",
    "latent": LatentSizes(query_rank=None, rank=16, rope=8, nope=8, value=8),
}


@pytest.mark.parametrize("changes", [{"tie_embeddings": True}, LATENT, {"shared_gate": True}])
def test_what_products_read_is_packed_and_what_decides_is_not(changes):
    family = {"family": "qwen2_moe", "shared_intermediate_size": 32, "qk_norm": "none"}
    plain = random_model(**family | changes)
    model = plain.with_dense_format("int8")
    codes = {
        name.removesuffix(".codes") for name, array in named_arrays(model.dense) if array.dtype == "int8"
    }
    rest = {name for name, array in named_arrays(model.dense)} - {f"{name}.codes" for name in codes}
    layer = {"q", "o"} | ({"kv_down"} if "latent" in changes else {"k", "v"})
    expected = {f"layers.0.attention.{name}.weight" for name in layer}
    expected |= {f"layers.0.shared.{name}.weight" for name in ("gate", "up", "down")}
    expected |= {"embedding" if changes.get("tie_embeddings") else "head"}
    assert {name for name in codes if not name.startswith("layers") or "layers.0." in name} == expected
    kept = ["router.weight", "attention_norm.scale"]
    kept += ["shared_gate.weight"] if "shared_gate" in changes else []
    kept += ["attention.key_up", "attention.value_up"] if "latent" in changes else []
    assert {f"layers.0.{name}" for name in kept} <= rest
    parts = sum(array.nbytes for _, array in named_arrays(model.dense))
    assert model.dense_bytes == parts < plain.dense_bytes / 2
    assert isinstance(model.whole().layers[0].attention.q.weight[...], Int8Matrix)
