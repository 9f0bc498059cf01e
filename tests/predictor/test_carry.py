"""Starting from another model's predictor: what goes over, and what does not."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from synthetic import EXPERTS, LAYERS, MODEL, SMALL, WIDTH, basis, untrained, write_trace

from predictor.carry import carried, nearest
from predictor.llapor import LLaPor
from predictor.network import GroupConfig
from predictor.step import first_params, stacks

SEED, AHEAD = 7, 2


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return untrained(write_trace(tmp_path_factory.mktemp("carry") / "trace"), AHEAD)


def start(source, model=MODEL, look_ahead=AHEAD, groups=SMALL, turn=None):
    """Parameters for a model carried over from `source`, and the random ones that they replace."""
    ours = basis(np.random.default_rng(1).standard_normal((50, LAYERS, WIDTH)).astype(np.float32))
    if turn is not None:
        ours = replace(ours, components=ours.components @ turn)
    ours = replace(ours, variance=source.basis.variance)
    stacked = stacks(model, WIDTH, look_ahead, groups)
    fresh = first_params(model, stacked, look_ahead, SEED)
    return carried(fresh, stacked, ours, look_ahead, source), fresh


def test_the_same_model_starts_as_its_predictor_is(source):
    params, _ = start(source)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, source.network)


def test_components_of_another_pca_mean_the_same(source):
    turn = np.linalg.qr(np.random.default_rng(2).standard_normal((WIDTH, WIDTH)))[0].astype(np.float32)
    params, _ = start(source, turn=turn)
    state = np.random.default_rng(3).standard_normal(WIDTH).astype(np.float32)
    for name, network in params.items():
        theirs = source.network[name]["input"]["weight"][0, :WIDTH]
        ours = network["input"]["weight"][0, :WIDTH]
        np.testing.assert_allclose((state @ turn) @ ours, state @ theirs, atol=1e-5)


def test_with_other_experts_only_what_is_of_none_goes_over(source):
    params, fresh = start(source, model=replace(MODEL, num_experts=EXPERTS + 4))
    for name, network in params.items():
        theirs = source.network[name]
        np.testing.assert_array_equal(network["output"]["weight"], fresh[name]["output"]["weight"])
        np.testing.assert_array_equal(
            network["input"]["weight"][:, WIDTH:], fresh[name]["input"]["weight"][:, WIDTH:]
        )
        np.testing.assert_allclose(
            network["input"]["weight"][:, :WIDTH], theirs["input"]["weight"][:, :WIDTH], atol=1e-6
        )
        assert network["gain"].shape == (len(theirs["gain"]), AHEAD, EXPERTS + 4)
        np.testing.assert_array_equal(network["gain"], fresh[name]["gain"])
        jax.tree.map(np.testing.assert_array_equal, network["blocks"], theirs["blocks"])


def test_horizons_that_the_other_lacks_begin_anew(source):
    params, fresh = start(source, look_ahead=AHEAD + 1)
    for name, network in params.items():
        known = AHEAD * EXPERTS
        np.testing.assert_array_equal(
            network["output"]["bias"][:, :known], source.network[name]["output"]["bias"]
        )
        np.testing.assert_array_equal(
            network["output"]["weight"][..., known:], fresh[name]["output"]["weight"][..., known:]
        )
        np.testing.assert_array_equal(network["gain"][:, AHEAD], fresh[name]["gain"][:, AHEAD])


def test_networks_of_another_shape_are_refused(source):
    wider = {name: GroupConfig(width=32, blocks=1) for name in SMALL}
    with pytest.raises(
        ValueError, match="start_from: expected a predictor whose networks have the same width"
    ):
        start(source, groups=wider)
    assert isinstance(source, LLaPor)


def test_layers_take_after_those_that_lie_as_deep():
    assert [nearest(index, 3, 9) for index in range(3)] == [0, 4, 8]
    assert [nearest(index, 5, 2) for index in range(5)] == [0, 0, 0, 1, 1]
    assert nearest(0, 1, 4) == 0
