"""Training: by document, resumable to the same weights, and nothing of what it is measured on gets in."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import once
from safetensors.numpy import load_file, save_file
from synthetic import CHOICES, EXPERTS, LAYERS, MODEL, SMALL, WIDTH, untrained, write_trace

from layerscope_jax.prediction.traces import Trace
from predictor import train as module
from predictor.dataset import expert_weights, for_training, for_validation, load_rows
from predictor.llapor import LLaPor
from predictor.recipe import needed
from predictor.step import Batch, targets
from predictor.train import TrainConfig, by_horizon, train, validate
from predictor.verdict import judge

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write_trace(tmp_path_factory.mktemp("train") / "trace", documents=60, tokens=32)


@pytest.fixture(scope="module")
def steps():
    """In place of `make_steps`: all runs with the settings of `config` take the same steps."""
    return once(module.make_steps)


@pytest.fixture(scope="module")
def finished(trace, steps, tmp_path_factory):
    """A finished run: its folder and its predictor."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_steps", steps)
        return folder, train(config(trace, folder), progress=False)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of its folder, to be changed."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def config(trace, out, **changes):
    given = {"look_ahead": 2, "epochs": 4, "batch": 64, "save_every": 20} | SMALL
    return TrainConfig(traces=trace.folder, out=out, **(given | changes))


def log(folder, key):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def leaves(llapor):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(llapor.network)]


def test_it_learns(finished):
    recall = log(finished[0], "this_step")
    share = CHOICES / EXPERTS
    assert recall[-1][0] > recall[0][0] > share + 0.2
    assert log(finished[0], "next_step")[-1][0] < share + 0.3  # the next token is another draw


def test_a_killed_run_goes_on_to_the_same_weights(trace, finished, steps, tmp_path, monkeypatch, capsys):
    """In the middle of an epoch, some steps after its last checkpoint; and once more, by a full disk."""
    batch_of, calls = module.batch_of, []
    monkeypatch.setattr(module, "make_steps", steps)

    def dies(rows, picked):
        if len(picked) == 64:
            calls.append(None)
        if len(calls) == 33:
            raise KeyboardInterrupt
        return batch_of(rows, picked)

    with monkeypatch.context() as patch:
        patch.setattr(module, "batch_of", dies)
        with pytest.raises(KeyboardInterrupt):
            train(config(trace, tmp_path / "cut"), progress=False)
    assert not (tmp_path / "cut" / "predictor.json").exists()

    def full(line, file, flush=False):
        if '"step": 60,' in line:
            raise OSError(errno.ENOSPC, "No space left on device")
        print(line, file=file, flush=flush)

    with monkeypatch.context() as patch:
        patch.setattr(module, "print", full, raising=False)
        patch.setattr(module.tyro, "cli", lambda *_, **__: config(trace, tmp_path / "cut"))
        with pytest.raises(SystemExit) as stopped:
            module.main()
    assert stopped.value.code == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert log(tmp_path / "cut", "step")[-2:] == [40, 50]  # it went on where it was killed

    cut = train(config(trace, tmp_path / "cut"), progress=False)
    for one, other in zip(leaves(finished[1]), leaves(cut), strict=True):
        np.testing.assert_array_equal(one, other)


def test_domains_can_be_left_out(trace, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(module, "load_rows", lambda trace, keep, **_: given.append(keep) or [])
    with pytest.raises(ValueError, match=r"one batch\), got 0"):
        train(config(trace, tmp_path / "run", leave_out=("verse",)), progress=False)
    passages = [passage for chunk in trace.chunks for passage in chunk.passages]
    assert len(given) == 2
    assert not any(keep(passage) for keep in given for passage in passages)
    with pytest.raises(ValueError, match=r"holds another run \(leave_out: \['verse'\] then, None now\)"):
        train(config(trace, tmp_path / "run"), progress=False)
    with pytest.raises(ValueError, match=r"leave_out must name domains .* \(letters, verse\), got prose"):
        train(config(trace, tmp_path / "other", leave_out=("verse", "prose")), progress=False)


def test_another_run_is_refused(trace, run):
    with pytest.raises(ValueError, match=r"holds another run \(seed: 0 then, 1 now\)"):
        train(config(trace, run, seed=1), progress=False)


def test_a_finished_run_is_read_again_past_an_interrupted_checkpoint(trace, finished, run):
    partial = run / "checkpoints" / "99999.orbax-checkpoint-tmp"
    partial.mkdir()
    (partial / "half").write_bytes(b"half")
    again = train(config(trace, run), progress=False)
    for one, other in zip(leaves(finished[1]), leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_no_document_is_on_two_sides(trace):
    """Training, validation and what is measured on share no document, and so no row."""
    sides = {
        "train": load_rows(trace, for_training),
        "validation": load_rows(trace, for_validation),
        "heldout": load_rows(trace, lambda passage: passage.split == "heldout"),
    }
    names = {side: {(p.domain, p.document) for p in rows.passages} for side, rows in sides.items()}
    assert not names["train"] & names["validation"]
    assert not names["train"] & names["heldout"]
    assert not names["validation"] & names["heldout"]
    assert sum(map(len, sides.values())) == trace.rows
    assert {domain for domain, _ in names["train"] | names["validation"]} == {"verse"}


def test_class_weights_are_of_the_training_rows_alone(trace, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(module, "expert_weights", lambda experts, count: given.append(experts) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config(trace, tmp_path / "run", balanced=True), progress=False)
    np.testing.assert_array_equal(given[0], load_rows(trace, for_training).experts)
    rare = np.zeros((8, 1, 1), int)
    rare[0] = 1
    assert expert_weights(rare, 3).tolist() == [[pytest.approx(8 / 3 / 7), pytest.approx(8 / 3), 4.0]]


def test_targets_reach_into_the_next_step(trace):
    rows = load_rows(trace, for_training)
    picked = np.array([0, 31])  # the first and the last token of a passage
    batch = module.batch_of(rows, picked)
    wanted, known = targets(batch, 2, EXPERTS)
    wanted, known = np.asarray(wanted), np.asarray(known)
    assert wanted.shape == (LAYERS, 2, 2, EXPERTS)
    for layer in range(LAYERS):
        for step in range(2):
            ahead = layer + 1 + step
            row = picked[0] + ahead // LAYERS
            found = np.flatnonzero(wanted[layer, 0, step])
            assert found.tolist() == sorted(rows.experts[row, ahead % LAYERS])
            assert known[layer, 0, step]
            assert known[layer, 1, step] == (ahead < LAYERS)


def test_recall_of_a_perfect_and_of_no_forecast(trace):
    rows = load_rows(trace, for_training, most=64)

    def evaluate(params, batch: Batch):
        wanted, known = targets(batch, 2, EXPERTS)
        from predictor.step import top_recall

        recall = top_recall(params * wanted, wanted, CHOICES)
        return np.where(known, recall, 0.0).sum(1), known.sum(1)

    np.testing.assert_array_equal(validate(evaluate, 1.0, rows), np.ones((LAYERS, 2)))
    assert by_horizon(np.ones((LAYERS, 2))) == {"this_step": [1.0, 1.0], "next_step": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"look_ahead": 5}, "look-ahead must be at most the model's 4 layers, got 5"),
        ({"batch": 4096}, "expected 4096 training rows or more"),
        ({"tokens": 8}, "expected passages to train on, got none"),
    ],
)
def test_what_cannot_be_trained_is_refused(trace, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(config(trace, tmp_path / "run", **changes), progress=False)
    assert not (tmp_path / "run" / "predictor.json").exists()


def test_traces_that_do_not_serve_are_refused(tmp_path):
    bare = write_trace(tmp_path / "bare", hidden=False)
    with pytest.raises(ValueError, match="expected hidden states"):
        load_rows(bare, for_training)
    held = write_trace(tmp_path / "held", documents=6, heldout=6)
    with pytest.raises(ValueError, match="expected passages to train on, got none"):
        train(config(held, tmp_path / "run"), progress=False)
    broken = write_trace(tmp_path / "broken")
    path = broken.folder / "00000.hidden.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"00000\.hidden\.npy: expected .* bytes"):
        load_rows(Trace.open(broken.folder), for_training)


def test_a_predictor_is_kept_and_read(finished):
    folder, trained = finished
    read = LLaPor.load(folder)
    assert (read.model, read.look_ahead) == (MODEL, 2)
    for one, other in zip(leaves(trained), leaves(read), strict=True):
        one = np.asarray(one)
        # Matrices are kept in 127 steps to either side of zero, by column.
        step = np.abs(one).max(1, keepdims=True) / 127 if one.ndim == 3 else 2e-3 * np.abs(one) + 1e-4
        assert (np.abs(one - other) <= 0.51 * step).all()
    content = (folder / "predictor.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert len(content) - 8 - header == trained.size_bytes


def test_a_damaged_predictor_is_refused(finished, run, tmp_path):
    folder, trained = run, finished[1]
    wider = {"input": replace(SMALL["input"], width=WIDTH), **{k: SMALL[k] for k in ("middle", "output")}}
    settings = json.loads((folder / "predictor.json").read_text())
    settings["groups"]["input"]["width"] = wider["input"].width
    (folder / "predictor.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"input\.input\.weight has shape .* expected"):
        LLaPor.load(folder)
    (folder / "predictor.json").write_text(json.dumps(settings | {"format": 1}))
    with pytest.raises(ValueError, match="expected format 3, got 1; train it again"):
        LLaPor.load(folder)
    trained.save(folder)
    kept = load_file(folder / "predictor.safetensors")
    del kept["input.input.weight.scale"]
    save_file(kept, folder / "predictor.safetensors")
    with pytest.raises(ValueError, match=r"checksums differ\): input\.input\.weight\.scale; copy it again"):
        LLaPor.load(folder)
    (folder / "predictor.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match="expected safetensors"):
        LLaPor.load(folder)
    with pytest.raises(ValueError, match="expected a trained predictor"):
        LLaPor.load(tmp_path / "nowhere")
    broken = jax.tree.map(lambda leaf: leaf * np.nan, trained.network)
    with pytest.raises(ValueError, match="not finite in float16"):
        replace(trained, network=broken).save(tmp_path / "nan")
    assert not (tmp_path / "nan").exists()


def test_a_trained_predictor_is_chosen_and_an_untrained_one_told_what_it_lacks(trace, finished, tmp_path):
    assert judge(trace, finished[1], 512).forecast == "llapor"
    behind = judge(trace, untrained(trace), 512)
    assert behind.forecast == "gate"
    assert behind.recall["llapor"] == pytest.approx(behind.recall["gate"], abs=0.05)
    settings = config(trace, tmp_path / "run", tokens=1024)
    ahead = replace(behind, recall={"llapor": [0.9, 0.9], "gate": [0.95, 0.95]})
    assert (needed(trace, settings, ahead, False) or 1) > 0
    assert not list(settings.out.iterdir())
