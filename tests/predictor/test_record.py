"""Recording: the rows are what the model did, whichever way it ran and however often it was cut off."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_model, spelling_model

from layerscope_jax import OffloadConfig
from layerscope_jax.checkpoints.identity import ModelIdentity
from layerscope_jax.models.cache import new_caches
from layerscope_jax.models.rotary import PAD_POSITION
from layerscope_jax.prediction.traces import Trace
from predictor import record as module
from predictor.pca import Basis
from predictor.record import RecordConfig, choose, read_domains, record
from predictor.routers import Routers

pytestmark = pytest.mark.usefixtures("quick_compiles")

WORDS = "call me ishmael some years ago never mind how long precisely having little or no money"


def document(seed, words=40):
    return " ".join(np.random.default_rng(seed).choice(WORDS.split(), words))


@pytest.fixture
def text(tmp_path):
    """Two domains, one of them held out."""
    for domain, start in (("verse", 0), ("letters", 100)):
        lines = [json.dumps({"id": f"{domain}/{i}", "text": document(start + i)}) for i in range(8)]
        (tmp_path / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
    return (tmp_path / "verse.jsonl", tmp_path / "letters.jsonl")


def config(text, out, **changes):
    given = {
        "heldout_domains": ("letters",),
        "train_tokens": 600,
        "heldout_tokens": 300,
        "length": 48,
        "pca_tokens": 200,
        "batch_size": 4,
    }
    return RecordConfig(text=text, out=out, **(given | changes))


def arrays(trace):
    names = trace.chunks[0].files
    return {name: np.concatenate([chunk.map(name) for chunk in trace.chunks]) for name in names}


def padded(tokens):
    """[48] tokens and positions, so that all passages compile one program."""
    filled = np.zeros((2, 48), np.int32)
    filled[1] = PAD_POSITION
    filled[:, : len(tokens)] = tokens, np.arange(len(tokens))
    return filled


@functools.partial(jax.jit, static_argnums=0)
def routed(graph, variables, filled):
    _, routings = nnx.merge(graph, variables)(filled[:1], filled[1:])
    return tuple(
        jnp.stack([getattr(routing, name) for routing in routings], 1)
        for name in ("experts", "weights", "logits")
    )


@functools.partial(jax.jit, static_argnums=0)
def stepped(graph, variables, tokens, positions, caches):
    decoder = nnx.merge(graph, variables)
    _, routings, caches = decoder.run(decoder.embed(tokens[None]), positions[None], caches)
    return [routing.experts[-1] for routing in routings], caches


def test_rows_are_what_the_decoder_routes(text, tmp_path):
    model = spelling_model()
    trace = record(model, config(text, tmp_path / "trace"))
    assert trace.complete
    assert trace.header.model == ModelIdentity.of(model)
    domains = read_domains(text)
    basis, (graph, variables) = Basis.load(trace.folder), nnx.split(model.whole())
    for chunk, passage, rows in trace.passages():
        text_of = next(d.text for d in domains[passage.domain] if d.id == passage.document)
        tokens = model.tokenizer.encode(text_of).ids[passage.start :][: passage.tokens]
        assert chunk.map("tokens")[rows].tolist() == tokens
        experts, weights, expected = (x[: len(tokens)] for x in routed(graph, variables, padded(tokens)))
        np.testing.assert_array_equal(chunk.map("experts")[rows], experts)
        np.testing.assert_allclose(chunk.map("weights")[rows], weights, atol=1e-3)
        # Nothing is lost where the PCA keeps the whole width: the routers read the same from it.
        hidden = chunk.map("hidden")[rows].astype(np.float32)
        inputs = np.einsum("nlp,ldp->nld", hidden, basis.components) + basis.mean
        logits = np.einsum("nld,led->nle", inputs, Routers.load(trace.folder).weight)
        np.testing.assert_allclose(logits, expected, atol=0.05)


def test_decode_steps_are_what_decoding_routes(text, tmp_path):
    """Rows past the prompt come from one pass over the passage; a cache, token by token, gives the same."""
    model = spelling_model()
    trace = record(model, config(text, tmp_path / "trace"))
    chunk, passage, rows = next(trace.passages())
    tokens, (graph, variables) = np.asarray(chunk.map("tokens")[rows]), nnx.split(model.whole())
    caches = new_caches(model.config, 1, passage.tokens, model.bank.dtype, model.device)

    def run(start, stop, caches):
        return stepped(graph, variables, tokens[start:stop], np.arange(start, stop), caches)

    assert 0 < passage.prompt < passage.tokens
    _, caches = run(0, passage.prompt, caches)
    for position in range(passage.prompt, passage.tokens):
        found, caches = run(position, position + 1, caches)
        np.testing.assert_array_equal(chunk.map("experts")[rows][position], found)
    assert chunk.decode()[rows].tolist() == [False] * passage.prompt + [True] * (
        passage.tokens - passage.prompt
    )


def test_a_budget_changes_nothing(text, tmp_path):
    model = spelling_model()
    whole = record(model, config(text, tmp_path / "whole"))
    offload = OffloadConfig(device_budget=model.bank.total_bytes // 2, policy="lru")
    tight = record(model, config(text, tmp_path / "tight", offload=offload))
    for name, array in arrays(whole).items():
        np.testing.assert_array_equal(arrays(tight)[name], array)


def test_a_recording_that_was_cut_off_goes_on(text, tmp_path, monkeypatch):
    model = spelling_model()
    monkeypatch.setattr(module, "CHUNK_PASSAGES", 4)
    whole = record(model, config(text, tmp_path / "whole"))
    run, calls = module.Tap.run, []

    def dies(self, passages):
        calls.append(passages)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return run(self, passages)

    with monkeypatch.context() as patch:
        patch.setattr(module.Tap, "run", dies)
        with pytest.raises(KeyboardInterrupt):
            record(model, config(text, tmp_path / "cut"))
    part = Trace.open(tmp_path / "cut")
    assert 0 < len(part.chunks) < len(whole.chunks)
    assert not part.complete
    cut = record(model, config(text, tmp_path / "cut"))
    assert cut.complete
    assert [c.passages for c in cut.chunks] == [c.passages for c in whole.chunks]
    for name, array in arrays(whole).items():
        np.testing.assert_array_equal(arrays(cut)[name], array)
    before = {path: path.stat().st_mtime_ns for path in cut.folder.glob("*.npy")}
    record(model, config(text, tmp_path / "cut"))
    assert {path: path.stat().st_mtime_ns for path in cut.folder.glob("*.npy")} == before


def covariance(basis):
    return np.einsum("ldp,lp,lep->lde", basis.components, basis.variance, basis.components)


def test_the_pca_sees_training_documents_alone(text, tmp_path):
    model = spelling_model()
    first = record(model, config(text, tmp_path / "first", pca_tokens=10_000))
    held_out = {p.document for c in first.chunks for p in c.passages if p.split == "heldout"}
    assert {p.domain for c in first.chunks for p in c.passages if p.split == "train"} == {"verse"}
    assert any(document.startswith("verse") for document in held_out)
    for path in text:  # other words in every document that is kept out
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        changed = [r | {"text": "zzz qqq " * 20} if r["id"] in held_out else r for r in rows]
        path.write_text("\n".join(map(json.dumps, changed)) + "\n")
    second = record(model, config(text, tmp_path / "second", pca_tokens=10_000))
    one, other = Basis.load(first.folder), Basis.load(second.folder)
    np.testing.assert_allclose(one.mean, other.mean, atol=1e-4)
    np.testing.assert_allclose(covariance(one), covariance(other), atol=1e-3)


def test_no_document_is_on_both_sides(text, tmp_path):
    domains = read_domains(text)
    found = choose(domains, spelling_model().tokenizer, 48, config(text, tmp_path))
    sides = {}
    for passage, _ in found:
        sides.setdefault((passage.domain, passage.document), set()).add(passage.split)
    assert all(len(side) == 1 for side in sides.values())
    assert {passage.split for passage, _ in found} == {"train", "heldout"}
    tokens = {
        (domain, split): sum(p.tokens for p, _ in found if (p.domain, p.split) == (domain, split))
        for domain in domains
        for split in ("train", "heldout")
    }
    assert tokens["letters", "train"] == 0
    assert 0 < tokens["verse", "train"] <= 600
    assert 0 < tokens["letters", "heldout"] <= 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout_domains": ("prose",)}, "heldout-domains must be some of letters, verse, got prose"),
        ({"heldout_domains": ("letters", "verse")}, "expected training documents to fit the PCA on"),
    ],
)
def test_what_cannot_be_recorded_is_refused(text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        record(spelling_model(), config(text, tmp_path / "trace", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"length": 3, "prompt": 0.0},
            r"length must be 16 or more, got 3; prompt must be in \(0, 1\], got 0.0",
        ),
        ({"text": ()}, "text must name at least one file"),
    ],
)
def test_settings_out_of_range_are_refused(text, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        RecordConfig(**({"text": text, "out": tmp_path} | changes))


def test_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.txt: expected UTF-8 text"):
        read_domains([tmp_path / "a.txt"])
    with pytest.raises(ValueError, match=r"b\.txt: expected a file of text"):
        read_domains([tmp_path / "b.txt"])


def test_another_text_is_not_mixed_in(text, tmp_path):
    model = spelling_model()
    record(model, config(text, tmp_path / "trace"))
    with pytest.raises(ValueError, match="recorded differently: text"):
        record(model, config(text[:1], tmp_path / "trace", heldout_domains=()))
    other = replace(random_model(seed=9, vocab_size=280, num_layers=2), tokenizer=model.tokenizer)
    with pytest.raises(ValueError, match="belongs to another model"):
        record(other, config(text, tmp_path / "trace"))
