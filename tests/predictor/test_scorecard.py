"""The scorecard: full marks for the truth alone, nothing learned from nothing, batches that could run."""

import io
import json
import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from synthetic import EXPERTS, LAYERS, MODEL, SMALL, untrained, write_trace

from predictor import fitted, metrics, scorecard
from predictor.baselines import Gate, Learned, Popularity, PreviousToken, truth
from predictor.batches import Batching
from predictor.dataset import load_rows
from predictor.pca import Basis
from predictor.routers import Routers
from predictor.scorecard import ScoreConfig
from predictor.scorecard_plots import draw
from predictor.scorecard_view import show
from predictor.train import TrainConfig, train

pytestmark = pytest.mark.usefixtures("quick_compiles")


def score(traces, *predictor, **changes):
    return scorecard.scorecard(ScoreConfig(traces=traces, predictor=predictor, **changes), progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trace and an untrained predictor."""
    folder = tmp_path_factory.mktemp("scorecard")
    untrained(write_trace(folder / "trace")).save(folder / "predictor")
    return folder


@pytest.fixture(scope="module")
def card(folder):
    return score(folder / "trace", folder / "predictor")


@pytest.fixture(scope="module")
def rows(folder):
    return load_rows(fitted.Trace.open(folder / "trace"), lambda passage: passage.split == "heldout")


def chosen(card, part="rows", **values):
    return [row for row in card[part] if all(row[name] == value for name, value in values.items())]


def test_the_truth_has_full_marks_everywhere(card):
    found = chosen(card, predictor="oracle")
    assert {(row["domain"], row["phase"], row["horizon"], row["batch"], row["wraps"]) for row in found} == {
        (domain, phase, horizon, batch, wraps)
        for domain in ("verse", "letters")
        for phase in ("decode", "prefill")
        for horizon in (1, 2)
        for batch in (1, 4)
        for wraps in (False, True)
    }
    for row in found:
        full = ("recall", "relaxed_recall", "batch_recall", "presence_precision", "presence_recall")
        assert [row[name] for name in full] == [1.0] * 5
        assert row["count_error"] == row["count_error_relative"] == 0.0
    for row in chosen(card, "layers", predictor="oracle"):
        assert row["recall"] == [1.0] * LAYERS
    for row in chosen(card, "calibration", predictor="oracle"):
        assert row["error"] == 0.0
    for row in chosen(card, "waste", predictor="oracle", batch=1, phase="decode"):
        assert row["wasted"][:2] == [0.0, 0.0]  # a token has two experts
        assert row["wasted"][-1] == pytest.approx(1 - 2 / EXPERTS)
        assert row["covered"] == [0.5] + [1.0] * (EXPERTS - 1)
    for row in chosen(card, "waste", predictor="oracle", batch=4):
        assert row["wasted"][:2] == [0.0, 0.0]


def test_recall_of_a_batch_of_one_token_is_the_exact_recall(card):
    for row in chosen(card, predictor="linear", batch=1, phase="decode", wraps=False):
        assert row["batch_recall"] == pytest.approx(row["recall"], abs=1e-4)


def test_predictors_that_see_more_do_better(card):
    def recall(name, horizon):
        return np.mean([row["recall"] for row in chosen(card, predictor=name, horizon=horizon, wraps=False)])

    for horizon in (1, 2):
        assert recall("linear", horizon) > recall("gate", horizon) > recall("popularity", horizon)
        # Tokens are drawn apart from each other here: the one before says nothing.
        assert recall("popularity", horizon) > recall("previous-token", horizon)


def test_what_is_scored_is_said(card, folder):
    assert card["model"] == MODEL.to_json()
    assert card["unseen"] == ["letters"]
    assert card["heldout_rows"] == 12 * 16
    assert card["fitted_rows"] == sum(
        passage.tokens
        for _, passage, _ in fitted.Trace.open(folder / "trace").passages()
        if fitted.for_training(passage)
    )
    assert {row["domain"] for row in card["rows"] if row["unseen"]} == {"letters"}
    assert {(row["batch"], row["passages"]) for row in card["left_out"]} == {(16, 6), (64, 6)}
    json.dumps(card, allow_nan=False)


def test_shuffled_labels_train_to_no_better_than_popularity(tmp_path):
    """In the same training that learns the labels of one layer well, which are not shuffled."""
    shuffled = (2, 3)
    trace = write_trace(tmp_path / "trace", documents=48, heldout=24, tokens=64, prompt=32, shuffled=shuffled)
    config = TrainConfig(traces=trace.folder, out=tmp_path / "out", look_ahead=1, epochs=4, batch=64, **SMALL)
    llapor = train(config, progress=False)
    fit = load_rows(trace, fitted.for_training)
    rows = load_rows(trace, lambda passage: passage.split == "heldout")
    popularity = Popularity(Popularity.count(fit.experts, EXPERTS), (1,))
    learned = Learned(llapor, Routers.load(trace.folder), Basis.load(trace.folder), (1,))
    for layer in range(LAYERS - 1):
        true = rows.experts[:, layer + 1]
        found, popular = (recall_of(one.forecast(rows, layer).ranking, true) for one in (learned, popularity))
        if layer + 1 in shuffled:
            assert found < popular + 0.01
        else:
            assert found > popular + 0.2


def recall_of(ranking, experts):
    place = metrics.places(jnp.asarray(ranking[:, 0]), jnp.asarray(experts, jnp.int32))
    return metrics.exact_recall(place).mean().item()


def test_targets_and_what_the_previous_token_says(rows):
    horizons = (1, 3)
    share = np.linspace(0.0, 0.5, EXPERTS, dtype=np.float32)  # two in all, as many as a token takes
    popularity = Popularity(np.tile(share, (LAYERS, 1)), horizons)
    layer, starts = 2, np.cumsum([0, *(passage.tokens for passage in rows.passages)])[:-1]
    true, found = truth(rows, layer, horizons), PreviousToken(popularity).forecast(rows, layer)
    for row in range(len(rows)):
        first, last = row in starts, row + 1 in (*starts, len(rows))
        assert true.experts[row, 0].tolist() == rows.experts[row, 3].tolist()
        assert true.known[row].tolist() == [True, not last]
        if not last:  # three after the third of four layers: the second of the next step
            assert true.experts[row, 1].tolist() == rows.experts[row + 1, 1].tolist()
        best_first = np.argsort(-found.ranking[row], -1)[:, :2].tolist()
        assert best_first[1] == rows.experts[row, 1].tolist()
        if first:
            assert found.probabilities[row, 0].tolist() == pytest.approx(share.tolist())
        else:
            assert best_first[0] == rows.experts[row - 1, 3].tolist()
            assert found.probabilities[row, 0].sum() == 2


def test_the_gate_is_the_routers_own_reading(rows, folder):
    """Of the hidden state of a layer, which here is whole: zero layers ahead it would be what was chosen."""
    routers, basis = Routers.load(folder / "trace"), Basis.load(folder / "trace")
    popularity = Popularity(np.full((LAYERS, EXPERTS), 0.25, np.float32), (1, 2))
    found = Gate(routers, basis, popularity, 2).forecast(rows, 2)
    expected = (rows.hidden[:, 2].astype(np.float32) + basis.mean[2]) @ routers.weight[3].T
    np.testing.assert_allclose(found.ranking[:, 0], expected, rtol=1e-4, atol=1e-4)
    assert (found.probabilities[:, 0] <= 1).all()
    assert (found.ranking[:, 1] == 0.25).all()  # past the last layer


def test_batches_are_of_passages_that_could_run_together(rows):
    batching = Batching(rows, (1, 4), seed=3)
    passage = rows.passage_of_row()
    position = np.arange(len(rows)) - 16 * passage
    decode = batching.formed["decode", 4]
    assert len(decode.members) == 2 * 8  # of six passages one batch at each of eight steps, in two domains
    for members, group in zip(*decode, strict=True):
        assert len(set(passage[members])) == 4
        assert len(set(position[members])) == 1
        assert position[members[0]] >= 8
        assert {rows.passages[at].domain for at in passage[members]} == {batching.groups[group].domain}
    prefill = batching.formed["prefill", 4]
    assert len(prefill.members) == 2
    prompts = batching.prompts[prefill.members[0]].ravel()
    assert (position[prompts] < 8).all()
    assert len(set(prompts)) == 4 * 8
    assert batching.formed["decode", 1].members.shape == (2 * 6 * 8, 1)


def test_baselines_are_fitted_once_and_kept_for_what_is_shipped(folder, card, tmp_path, monkeypatch):
    """A trace without training rows."""
    assert (folder / "predictor" / fitted.FILE).exists()
    heldout = write_trace(tmp_path / "predictor" / "heldout", documents=6, seed=1)
    untrained(heldout).save(tmp_path / "predictor")
    with pytest.raises(ValueError, match=r"need training rows, but .* has none and .* is not there"):
        score(heldout.folder, tmp_path / "predictor")
    kept = (folder / "predictor" / fitted.FILE).read_bytes()
    (tmp_path / "predictor" / fitted.FILE).write_bytes(kept)
    with pytest.raises(ValueError, match="is of another pca"):
        score(heldout.folder, tmp_path / "predictor")
    Basis.load(folder / "trace").save(heldout.folder)
    monkeypatch.setattr(scorecard, "SHIPPED", tmp_path / "predictor")
    shipped = scorecard.scorecard(ScoreConfig(shipped=True), progress=False)
    assert shipped["fitted_rows"] == card["fitted_rows"]
    (tmp_path / "predictor" / fitted.FILE).write_bytes(kept[:1000])
    with pytest.raises(ValueError, match="delete it"):
        score(heldout.folder, tmp_path / "predictor")


def test_a_predictor_of_a_turned_pca_reads_the_same(rows, folder):
    trace = fitted.Trace.open(folder / "trace")
    routers, basis, llapor = Routers.load(trace.folder), Basis.load(trace.folder), untrained(trace)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0].astype(np.float32)
    turned = replace(basis, components=basis.components @ turn, mean=basis.mean + 0.5)
    moved = replace(
        rows, hidden=np.einsum("nlp,pq->nlq", rows.hidden.astype(np.float32) - 0.5, turn).astype(np.float32)
    )
    plain = Learned(llapor, routers, basis, (1, 2)).forecast(rows, 1)
    other = Learned(llapor, routers, turned, (1, 2)).forecast(moved, 1)
    np.testing.assert_allclose(plain.probabilities, other.probabilities, atol=1e-4)
    narrow = replace(basis, components=basis.components[:, :, :6], variance=basis.variance[:, :6])
    with pytest.raises(ValueError, match="whose 6 components hold only 0%"):
        Learned(llapor, routers, narrow, (1, 2))


def test_input_that_does_not_serve_is_refused(folder, tmp_path):
    other = write_trace(tmp_path / "other", model=replace(MODEL, routers="fedcba9876543210"))
    with pytest.raises(ValueError, match="belongs to another model: routers"):
        score(other.folder, folder / "predictor")
    bare = write_trace(tmp_path / "bare", hidden=False)
    with pytest.raises(ValueError, match="expected hidden states"):
        score(bare.folder, folder / "predictor")
    none = write_trace(tmp_path / "none", heldout=0)
    with pytest.raises(ValueError, match="expected held-out passages, got none"):
        score(none.folder, folder / "predictor")
    with pytest.raises(ValueError, match="expected traces and predictor, or shipped alone"):
        ScoreConfig(traces=folder)
    with pytest.raises(ValueError, match="leave out traces and predictor"):
        ScoreConfig(shipped=True, traces=folder)


def test_command_line(folder, tmp_path, monkeypatch, capsys):
    arguments = ["--traces", str(folder / "trace"), "--predictor", *[str(folder / "predictor")] * 2]
    monkeypatch.setattr(sys, "argv", ["scorecard", *arguments, "--out", str(tmp_path / "card.json")])
    scorecard.main()
    printed = capsys.readouterr().out
    assert "letters *" in printed
    assert "LLaPor's lead over the gate" in printed
    assert "The recalls of the 2 LLaPors differ by 0.0 points at most" in printed
    assert "Too few passages for batches of 16, 64 in decode: letters (6), verse (6)" in printed
    card = json.loads((tmp_path / "card.json").read_text())
    assert [found["name"] for found in card["predictors"]] == ["llapor", "llapor 2"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(sys, "argv", ["scorecard", *arguments, "--plots", str(tmp_path / "plots")])
    with pytest.raises(SystemExit) as stopped:
        scorecard.main()
    assert stopped.value.code == 2
    assert "pip install 'layerscope-jax[plot]'" in capsys.readouterr().err


def test_the_tables_fit_80_columns(card):
    """Also with all batch sizes and horizons."""
    more = {
        part: [
            row | {"horizon": times * row["horizon"]} | ({"batch": size * row["batch"]} if size else {})
            for row in card[part]
            for times in (1, 4)
            for size in sizes
        ]
        for part, sizes in (("rows", (1, 16)), ("calibration", (0,)))
    }
    printed = io.StringIO()
    show(card | more | {"horizons": [1, 2, 4, 8]}, Console(file=printed, width=80))
    assert all(len(line.rstrip()) <= 80 for line in printed.getvalue().splitlines())
    assert "B=64" in printed.getvalue()
    assert "…" not in printed.getvalue()


def test_plots(card, tmp_path):
    pytest.importorskip("matplotlib")
    draw(card, tmp_path)
    found = {path.name: path.read_bytes()[:4] for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(
        ("recall_by_layer.png", "calibration.png", "recall_by_bytes.png"), b"\x89PNG"
    )
