"""A family from outside the package, as the example adds one: it loads, runs and saves as the others do."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

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
    register_family(example.QWEN2_MOE)
    model = load(example.GOLDEN)
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.config == model.config
    assert isinstance(again.config, example.Qwen2MoeConfig)
    np.testing.assert_array_equal(
        again.dense["layers"][1]["shared_gate"]["weight"], model.dense["layers"][1]["shared_gate"]["weight"]
    )


def test_it_is_known_only_when_it_is_registered(example):
    with pytest.raises(ValueError, match=r"OlmoeForCausalLM.*got \['Qwen2MoeForCausalLM'\].*register_family"):
        load(example.GOLDEN)
    register_family(example.QWEN2_MOE)
    register_family(example.QWEN2_MOE)  # as a module that is imported twice does
    config = {"architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": -1}
    with pytest.raises(ValueError, match=r"missing: .*moe_intermediate_size.*shared_expert_inter"):
        config_from_hf(config)


def test_what_cannot_be_registered_is_refused_in_words(example):
    family, before = example.QWEN2_MOE, (dict(FAMILIES), dict(kinds.ATTENTIONS))
    for other, words in (
        ("qwen2_moe", "family must be a layerscope_jax.models.Family, got 'qwen2_moe'"),
        (
            replace(family, model_type="olmoe"),
            "register 'Qwen2MoeForCausalLM': model_type must be different",
        ),
        (replace(family, architecture="OlmoeForCausalLM"), r"the family olmoe \(OlmoeForCausalLM\)"),
        (replace(family, weights=family.weights[1:]), "it lacks embedding"),
        (replace(family, weights=("embedding",)), r"a tuple of Weight, .*it lacks embedding.*experts\."),
        (replace(family, attentions={"grouped": family.attentions["qkv bias"]}), "attentions .*'grouped'"),
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
