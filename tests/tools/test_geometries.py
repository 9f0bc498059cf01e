"""Small models of published families: their shapes, how they begin, what training does to routers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layerscope_jax.checkpoints.saving import hf_config
from layerscope_jax.models.decoder import Decoder
from tools.shipped_model import train as module
from tools.shipped_model.all_experts import run_whole
from tools.shipped_model.baselines import Bigram
from tools.shipped_model.geometries import GEOMETRIES, Geometry
from tools.shipped_model.starts import bigram_ends, started
from tools.shipped_model.train import TrainConfig, move_biases, train

pytestmark = pytest.mark.usefixtures("quick_compiles")

SHAPES = {
    "deepseek-v2-lite": ("deepseek_v2", 26, 64, 6),
    "moonlight": ("deepseek_v3", 26, 64, 6),
    "qwen3-30b-a3b": ("qwen3_moe", 48, 128, 8),
    "mixtral-8x7b": ("mixtral", 32, 8, 2),
    "gpt-oss-20b": ("gpt_oss", 24, 32, 4),
}


# Optax computes with Python scalars and integers, which strict promotion refuses.
@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def small(name, layers=2, vocab_size=32):
    """The first layers of a geometry."""
    config = GEOMETRIES[name].model_config(vocab_size, 16)
    full = tuple(layer for layer in config.full_attention_layers if layer < layers)
    return replace(config, num_layers=layers, full_attention_layers=full)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_each_is_of_its_family_with_the_published_numbers(name):
    config = GEOMETRIES[name].model_config(4096, 128)
    written = hf_config(config, np.dtype("bfloat16"))  # refuses what the family cannot express
    counts = (config.num_moe_layers, config.num_experts, config.experts_per_token)
    assert (written["model_type"], *counts) == SHAPES[name]


@pytest.mark.parametrize("name", ["moonlight", "gpt-oss-20b"])
def test_all_experts_at_once_give_the_same_logits(name):
    model = Decoder(small(name), rngs=nnx.Rngs(0))
    graphdef, variables = nnx.split(model)
    noise = np.random.default_rng(0)  # biases are zero at first
    shaken = jax.tree.map(lambda a: a + 0.1 * jnp.asarray(noise.standard_normal(a.shape), a.dtype), variables)
    model = nnx.merge(graphdef, shaken)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 32, (2, 9)), jnp.int32)
    expected, routings = nnx.jit(Decoder.__call__)(model, tokens)
    found, again = nnx.jit(run_whole)(model, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for ours, theirs in zip(again, routings, strict=True):
        np.testing.assert_array_equal(ours.experts, theirs.experts)


def test_it_begins_as_a_bigram_model():
    text = np.random.default_rng(0).permutation(np.repeat(np.arange(30), 20))
    bigram = Bigram([text], 32)
    np.testing.assert_allclose(np.exp(bigram.log_probabilities()).sum(1), 1.0)
    pairs = bigram.log_probabilities()[text[:-1], text[1:]]
    assert -pairs.mean() == pytest.approx(bigram.loss(text)[1])

    config = small("mixtral-8x7b", layers=1)
    params = nnx.to_pure_dict(nnx.split(Decoder(config, rngs=nnx.Rngs(0)))[1])
    begun = started(params, [text], 1, seed=0)
    embedding, head = bigram_ends(bigram, config.hidden_size)
    np.testing.assert_allclose(begun["embedding"], embedding, rtol=1e-5)
    np.testing.assert_allclose(begun["head"], head, rtol=1e-5)
    assert jax.tree.map(jnp.shape, begun) == jax.tree.map(jnp.shape, params)
    assert float(begun["layers"][0]["router"]["weight"].std()) == pytest.approx(0.2 / 8, rel=0.1)
    # With so many numbers a token as there are tokens, nothing of the bigram model is lost.
    normed = embedding / np.sqrt((embedding**2).mean(1, keepdims=True))
    size = np.sqrt((embedding**2).mean(1, keepdims=True)) / 0.5
    logits = (normed * size) @ head.T
    expected = bigram.log_probabilities()
    np.testing.assert_allclose(
        logits - logits.mean(1, keepdims=True), expected - expected.mean(1, keepdims=True), atol=0.3
    )


def test_biases_move_towards_an_even_load():
    routed = {"router": {"selection_bias": jnp.zeros(3), "weight": jnp.ones((3, 2))}}
    params = {"layers": {0: {"mlp": {}}, 1: routed, 2: routed}, "head": jnp.ones(2)}
    moved = move_biases(params, jnp.array([[6, 0, 3], [3, 3, 3]]), rate=0.5)
    biases = [moved["layers"][layer]["router"]["selection_bias"].tolist() for layer in (1, 2)]
    assert biases == [[-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    assert moved["layers"][0] == {"mlp": {}}
    assert params["layers"][1] is routed


def test_training_moves_them_and_keeps_the_checkpoints_asked_for(tmp_path, monkeypatch):
    tokens = tmp_path / "tokens"
    for split in ("train", "heldout"):
        (tokens / split).mkdir(parents=True)
        for domain in ("counting", "verse"):
            np.save(tokens / split / f"{domain}.npy", (np.arange(600) % 7).astype(np.uint16))
    (tokens / "tokenizer.json").write_text(
        '{"model": {"vocab": {' + ", ".join(f'"{i}": {i}' for i in range(16)) + "}}}"
    )
    tiny = Geometry(
        name="tiny", settings=GEOMETRIES["moonlight"].settings | {"num_layers": 2, "num_experts": 8}
    )
    monkeypatch.setitem(module.GEOMETRIES, "moonlight", tiny)
    config = TrainConfig(
        tokens=tokens,
        out=tmp_path / "run",
        geometry="moonlight",
        without=("verse",),
        steps=4,
        rows=2,
        length=8,
        save_every=2,
        keep=(1,),
        evaluate_every=100,
        bias_rate=0.25,
    )
    params = train(config)
    bias = np.asarray(params["layers"][1]["router"]["selection_bias"])
    assert set(bias * 4) <= {-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0}
    assert bias.any()
    again = train(replace(config, out=tmp_path / "again"))
    assert (np.asarray(again["layers"][1]["router"]["selection_bias"]) == bias).all()
    kept = {path.name for path in (config.out / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {"1", "2", "4"}
    with pytest.raises(ValueError, match=r"expected `without` to name some of the domains .*counting, verse"):
        train(replace(config, out=tmp_path / "other", without=("prose",)))
