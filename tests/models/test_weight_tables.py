"""Each family's table of weights: whatever a row does on the way in, it undoes on the way out."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import TINY
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from layerscope_jax.checkpoints.weight_names import Naming
from layerscope_jax.models import FAMILIES
from layerscope_jax.models.weights import IDENTITY, TRANSPOSE, mapped


@pytest.mark.parametrize("transform", [IDENTITY, TRANSPOSE], ids=lambda each: each.name)
@given(
    array=arrays.arrays(np.float32, arrays.array_shapes(max_dims=3, max_side=4), elements=st.floats(width=32))
)
def test_every_transform_has_an_inverse(transform, array):
    stored = transform.save(array)
    assert stored.shape == transform.stored_shape(array.shape)
    np.testing.assert_array_equal(transform.load(stored), array)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_one_tensor(family):
    qk_norm = {"olmoe": "all", "mixtral": "none", "qwen3_moe": "head"}[family]
    config = replace(TINY, family=family, qk_norm=qk_norm)
    if family == "qwen3_moe":
        config = replace(config, dense_layers=(0,), intermediate_size=24)
    naming = Naming.of(config)
    assert sorted(naming.dense.values(), key=str) == sorted(naming.parameters, key=str)
    assert len(naming.experts) == len(set(naming.experts.values())) == 3 * config.num_moe_layers * 8
    assert naming.shapes.keys() == naming.dense.keys() | naming.experts.keys() == naming.transforms.keys()
    moe = {name.split(".")[2] for name in naming.experts}
    assert moe == {str(layer) for layer in config.moe_layers}  # names go by decoder layers
    assert {expert.layer for expert, _ in naming.experts.values()} == set(range(config.num_moe_layers))


def test_a_family_without_a_name_for_a_parameter_says_which(monkeypatch):
    other = replace(FAMILIES["olmoe"], weights=FAMILIES["olmoe"].weights[:-1])
    monkeypatch.setitem(FAMILIES, "olmoe", other)
    with pytest.raises(ValueError, match=r"OlmoeForCausalLM has no tensors for experts\.\*\.down"):
        Naming.of(replace(TINY, qk_norm="all"))
    monkeypatch.setitem(FAMILIES, "olmoe", replace(other, weights=mapped("", "", *other.weights[1:])))
    with pytest.raises(ValueError, match="has no tensors for embedding, experts"):
        Naming.of(replace(TINY, qk_norm="all"))
