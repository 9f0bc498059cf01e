"""What is shipped: a predictor of the shipped model, better than the free ones on rows that come along."""

from pathlib import Path

import numpy as np
import pytest

import layerscope_jax
import predictor
from layerscope_jax import Engine, OffloadConfig, load
from layerscope_jax.checkpoints.identity import ModelIdentity
from layerscope_jax.cli.demo import read_demo_prompts
from layerscope_jax.prediction.traces import Trace
from tools.shipped_model.excerpt import ExcerptConfig, excerpt

pytestmark = pytest.mark.usefixtures("quick_compiles")

SHIPPED = Path(layerscope_jax.__file__).parent / "shipped"


@pytest.fixture(scope="module")
def model():
    return load(SHIPPED)


def test_the_held_out_rows_are_of_the_model_and_of_no_training_document(model):
    trace = Trace.open(predictor.SHIPPED / "heldout")
    assert trace.header.model == ModelIdentity.of(model)
    for chunk in trace.chunks:
        chunk.verify()
        assert {passage.split for passage in chunk.passages} == {"heldout"}
    assert "instructions" in {passage.domain for chunk in trace.chunks for passage in chunk.passages}


def test_in_the_engine_it_foresees_more_than_the_routers(model):
    prompts = [row["prompt"] for row in read_demo_prompts()][:2]
    recall, tokens = {}, {}
    for name, which in (("gate", "gate"), ("llapor", predictor.shipped())):
        budget = model.bank.total_bytes * 2 // 3
        config = OffloadConfig(device_budget=budget, policy="fate", predictor=which)
        with Engine(model, config) as engine:
            result = engine.generate(prompts, max_new_tokens=6)
        recall[name], tokens[name] = result.stats.forecast_recall, result.token_ids
    assert recall["llapor"] > recall["gate"] + 0.05
    assert tokens["llapor"] == tokens["gate"]


def test_an_excerpt_is_the_beginning_of_passages(tmp_path):
    whole = Trace.open(predictor.SHIPPED / "heldout")
    cut = excerpt(ExcerptConfig(traces=whole.folder, out=tmp_path / "cut", passages=2, tokens=8))
    places = {passage.document + str(passage.start): (c, rows) for c, passage, rows in whole.passages()}
    for chunk, passage, rows in cut.passages():
        assert (passage.tokens, passage.prompt) == (8, 4)
        there, other = places[passage.document + str(passage.start)]
        for name in chunk.files:
            np.testing.assert_array_equal(
                chunk.map(name)[rows], there.map(name)[other.start : other.start + 8]
            )
    with pytest.raises(ValueError, match="holds a trace already"):
        excerpt(ExcerptConfig(traces=whole.folder, out=tmp_path / "cut", passages=2, tokens=8))
    with pytest.raises(ValueError, match="expected 99 held-out passages"):
        excerpt(ExcerptConfig(traces=whole.folder, out=tmp_path / "more", passages=99, tokens=8))
