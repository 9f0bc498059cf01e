"""Experts with biases are saved and loaded as they are."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import bits, random_model

from layerscope_jax import load, save
from layerscope_jax.formats import PlainFormat
from layerscope_jax.models import FAMILIES
from layerscope_jax.models.experts import ExpertBody
from layerscope_jax.models.weights import EXPERTS, LAYER, Weight

CLAMPED = ExpertBody("clamped", bias=True, limit=0.7)
SMALL = {"num_layers": 2, "num_experts": 3, "qk_norm": "all"}


@pytest.fixture
def family(monkeypatch):
    """OLMoE, but that its experts are clamped and have biases."""
    plain = FAMILIES["olmoe"]
    rows = (*plain.weights, Weight(LAYER + "mlp.experts.{expert}.bias", EXPERTS + "bias"))
    read = lambda config: replace(plain.read_config(config), expert_body=CLAMPED)  # noqa: E731
    monkeypatch.setitem(FAMILIES, "olmoe", replace(plain, weights=rows, read_config=read))


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("format", [None, "bfloat16"])
def test_biases_are_saved_and_loaded(tmp_path, format):
    model = random_model(expert_body=CLAMPED, **SMALL)
    save(model, tmp_path)
    loaded = load(tmp_path, format=format)
    assert loaded.config == model.config
    assert loaded.bank.format == PlainFormat(format or "float32", CLAMPED)
    for expert in model.bank:
        for there, came in zip(model.bank.views(expert), loaded.bank.views(expert), strict=True):
            np.testing.assert_array_equal(bits(there.astype(came.dtype)), bits(came))
    if format is not None:
        again = model.with_format(PlainFormat(format))
        assert again.bank.format == loaded.bank.format
        np.testing.assert_array_equal(*(bank.layers[1][2].bias for bank in (again.bank, loaded.bank)))


def test_a_family_without_a_place_for_biases_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no tensors for experts\.\*\.bias"):
        save(random_model(expert_body=CLAMPED, **SMALL), tmp_path)
