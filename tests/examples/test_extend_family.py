"""A family from outside the package, as the example adds one: it loads, runs and saves as the others do."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layerscope_jax import load, save
from layerscope_jax.models import FAMILIES, config_from_hf, kinds, register_family
from layerscope_jax.models.attention import Attention
from layerscope_jax.models.decoder_layers import RoutedLayer

pytestmark = pytest.mark.usefixtures("quick_compiles")

FILE = Path(__file__).parents[2] / "examples" / "extend" / "family.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("extend_family", FILE)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {spec.name: module}):  # dataclasses look themselves up there
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(autouse=True)
def tables():
    """The tables of families and parts are as before, after each test."""
    with (
        mock.patch.dict(FAMILIES),
        mock.patch.dict(kinds.ATTENTIONS),
        mock.patch.dict(kinds.FEED_FORWARDS),
    ):
        yield


def test_a_family_of_one_file_computes_what_transformers_computes(example, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["family.py"])
    example.main()
    assert "as transformers" in capsys.readouterr().out


def test_its_checkpoints_are_saved_as_they_were(example, tmp_path):
    register_family(example.HUNYUAN)
    model = load(example.GOLDEN)
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.config == model.config
    assert isinstance(again.config, example.HunYuanConfig)
    assert again.config.rope_alpha == 50.0
    for part in ("router", "shared", "attention"):
        jax.tree.map(
            np.testing.assert_array_equal, again.dense["layers"][1][part], model.dense["layers"][1][part]
        )


def test_its_routers_stay_in_float32(example):
    register_family(example.HUNYUAN)
    layer = load(example.GOLDEN, dtype="bfloat16").dense["layers"][0]
    assert layer["router"]["weight"].dtype == np.float32
    assert layer["attention"]["q"]["weight"].dtype == layer["shared"]["gate"]["weight"].dtype == jnp.bfloat16


def test_it_is_known_only_when_it_is_registered(example):
    with pytest.raises(
        ValueError, match=r"OlmoeForCausalLM.*got \['HunYuanMoEV1ForCausalLM'\].*register_family"
    ):
        load(example.GOLDEN)
    register_family(example.HUNYUAN)
    register_family(example.HUNYUAN)  # as a module that is imported twice does
    config = {"architectures": ["HunYuanMoEV1ForCausalLM"], "intermediate_size": -1}
    with pytest.raises(
        ValueError, match=r"missing: .*moe_topk \(or num_experts_per_tok\).*intermediate_size: exp"
    ):
        config_from_hf(config)


def test_settings_by_layer_must_be_the_same_for_all(example):
    register_family(example.HUNYUAN)
    config = json.loads((example.GOLDEN / "config.json").read_text())
    published = {
        "moe_topk": [3, 3, 3],
        "moe_intermediate_size": [24, 24, 24],
        "num_shared_expert": [1, 1, 1],
        "rope_theta": 10000.0,
        "rope_parameters": None,
        "rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0, "beta_fast": 32, "mscale": 1.0},
        "use_qk_norm": True,
    }
    assert config_from_hf(config | published) == config_from_hf(config)
    wrong = {"moe_topk": [3, 2, 3], "num_shared_expert": [2, 2, 2], "use_cla": True, "num_experts": [8, 4, 8]}
    with pytest.raises(
        ValueError, match=r"moe_topk: expected the same.*\[3, 2, 3\].*num_experts: exp"
    ) as error:
        config_from_hf(config | wrong)
    assert "num_shared_expert: expected 1, got 2" in str(error.value)
    assert "use_cla: expected False, got True" in str(error.value)


def test_what_cannot_be_registered_is_refused_in_words(example):
    family, before = example.HUNYUAN, (dict(FAMILIES), dict(kinds.ATTENTIONS))
    for other, words in (
        ("hunyuan", "family must be a layerscope_jax.models.Family, got 'hunyuan'"),
        (
            replace(family, model_type="olmoe"),
            "register 'HunYuanMoEV1ForCausalLM': model_type must be different",
        ),
        (replace(family, architecture="OlmoeForCausalLM"), r"the family olmoe \(OlmoeForCausalLM\)"),
        (replace(family, weights=family.weights[1:]), "it lacks embedding"),
        (replace(family, weights=("embedding",)), r"a tuple of Weight, .*it lacks embedding.*experts\."),
        (replace(family, attentions={"grouped": family.attentions["normed last"]}), "attentions .*'grouped'"),
        (replace(family, feed_forwards={"mine": Attention}), "feed_forwards .*'mine'"),
        (replace(family, attentions={"mine": RoutedLayer}), "attentions .*'mine'"),
        (
            replace(family, read_config=None, model_type=3),
            "model_type .* got 3; read_config must be a function, got None",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            register_family(other)
    assert before == (FAMILIES, kinds.ATTENTIONS)
