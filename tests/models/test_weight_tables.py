"""Each family's table of weights: whatever a row does on the way in, it undoes on the way out."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY
from hypothesis import given
from hypothesis import strategies as st

from layerscope_jax.checkpoints.weight_names import Naming
from layerscope_jax.models import FAMILIES, config_from_hf
from layerscope_jax.models.families.gpt_oss import PLAIN
from layerscope_jax.models.weights import (
    GATE_AND_UP,
    IDENTITY,
    KEYS_AND_VALUES,
    ROW,
    Transform,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(file.parent.name for file in GOLDEN.glob("*/golden.npz"))

SIZES = st.integers(1, 4)
"""Transforms, and the shapes of the decoder's arrays that they are of, made of a few sizes."""
TRANSFORMS = {
    IDENTITY: lambda a, b, c: [(a, b)],
    ROW: lambda a, b, c: [(a,)],
    GATE_AND_UP: lambda a, b, c: [(a, b), (a, b)],
    KEYS_AND_VALUES: lambda a, b, c: [(a, 3, b), (a, c, 3)],
    PLAIN: lambda a, b, c: [(a, b), (a, b), (b, a), (2 * a + b,)],
}


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda each: each.name)
@given(a=SIZES, b=SIZES, c=SIZES, seed=st.integers(0, 9))
def test_every_transform_has_an_inverse(transform: Transform, a, b, c, seed):
    shapes = TRANSFORMS[transform](a, b, c)
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    stored = transform.save(arrays)
    assert [tensor.shape for tensor in stored] == list(map(tuple, transform.stored_shapes(shapes)))
    for array, again in zip(arrays, transform.load(stored, shapes), strict=True):
        np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_one_source(case):
    config = config_from_hf(json.loads((GOLDEN / case / "config.json").read_text()))
    naming = Naming.of(config)
    paths = [path for source in naming.dense for path in source.keys]
    assert sorted(paths, key=str) == sorted(naming.parameters, key=str)
    arrays = len(config.expert_shapes())
    assert len(naming.experts) == arrays * config.num_moe_layers * config.num_experts
    assert naming.shapes.keys() == naming.uses.keys()
    names = {name for source in naming.experts.values() for name, _ in source.tensors}
    moe = {name.split(".")[2] for name in names}
    assert moe == {str(layer) for layer in config.moe_layers}  # names go by decoder layers
    assert {expert.layer for expert, _ in naming.experts} == set(range(config.num_moe_layers))


def test_a_family_without_a_name_for_a_parameter_says_which(monkeypatch):
    named = [row for row in FAMILIES["olmoe"].weights if "experts.{layer}.{expert}.down" not in row.places]
    other = replace(FAMILIES["olmoe"], weights=tuple(named))
    monkeypatch.setitem(FAMILIES, "olmoe", other)
    with pytest.raises(ValueError, match=r"OlmoeForCausalLM has no tensors for experts\.\*\.down"):
        Naming.of(replace(TINY, qk_norm="all"))
    monkeypatch.setitem(FAMILIES, "olmoe", replace(other, weights=other.weights[1:]))
    with pytest.raises(ValueError, match="has no tensors for embedding, experts"):
        Naming.of(replace(TINY, qk_norm="all"))
