"""What lm-eval asks of a model: the methods themselves, which need no lm-eval."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from exact_cases import SHIPPED
from helpers import EOS
from test_scoring import after, spelling

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.evaluation.harness import Harness, engine_of
from layerscope_jax.evaluation.perplexity import windows

TASK = Path(__file__).parents[2] / "examples" / "evaluation" / "endings.py"

pytestmark = pytest.mark.usefixtures("quick_compiles")


def asked(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.fixture(scope="module")
def engine():
    with Engine(spelling(), OffloadConfig(prefill_chunk_size=128)) as engine:
        yield engine


def encoded(text):
    return spelling().tokenizer.encode(text).ids


def total(before, tokens):
    logprobs = after(spelling(), [*before, *tokens])
    return sum(logprobs[len(before) - 1 + place, token] for place, token in enumerate(tokens))


def test_continuations_are_scored_after_their_contexts_in_order(engine):
    pairs = [("To be", " or not"), ("x", "y"), ("", "abc"), ("To be ", "or not")]
    found = Harness(engine).loglikelihood(asked(*pairs))
    expected = [total(encoded(context) or [EOS], encoded(after)) for context, after in pairs[:3]]
    np.testing.assert_allclose([score for score, _ in found[:3]], expected, atol=1e-4)
    assert found[3][0] == pytest.approx(found[0][0], abs=1e-5)  # a space belongs to what follows it
    assert all(greedy is False for _, greedy in found)


def test_the_greedy_continuation_is_said_to_be(engine):
    [text] = engine.generate(["To be"], max_new_tokens=3, ignore_eos=True).token_ids
    [(_, greedy)] = Harness(engine)._sums([(encoded("To be"), text)])
    [(_, other)] = Harness(engine)._sums([(encoded("To be"), [*text[:2], text[2] ^ 1])])
    assert (greedy, other) == (True, False)


def test_long_contexts_are_cut_on_the_left(engine):
    text = "Now is the winter of our discontent " * 4
    harness = Harness(engine, max_length=30)
    [(found, _)] = harness.loglikelihood(asked((text, "made")))
    cut = encoded(text.rstrip() + " made")[-31:]
    assert found == pytest.approx(total(cut[:-5], cut[-5:]), abs=1e-4)
    with pytest.raises(ValueError, match="a continuation must have at most 30 tokens, got 143"):
        harness.loglikelihood(asked(("a", text.rstrip())))


def test_rolling_windows_do_not_overlap_and_score_everything_once(engine):
    texts = ["It was the best of times, it was the worst of times", "a", ""]
    found = Harness(engine, max_length=20).loglikelihood_rolling(asked(*[(text,) for text in texts]))
    for text, score in zip(texts, found, strict=True):
        sequence = [EOS, *encoded(text)]
        parts = [
            total(sequence[at.start : at.scored], sequence[at.scored : at.end])
            for at in windows(len(sequence), 20, 20)
        ]
        assert score == pytest.approx(sum(parts), abs=1e-4)


def test_texts_end_before_the_first_stop_string(engine):
    [whole] = engine.generate(["To be"], max_new_tokens=12).texts
    stop = whole[4:6]
    until = asked(
        ("To be", {"until": [stop], "max_gen_toks": 12}),
        ("To be", {"until": "\x00\x01", "max_new_tokens": 12, "do_sample": False, "temperature": 0.7}),
        ("To be", {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "seed": 3}),
    )
    found = Harness(engine).generate_until(until)
    assert found[:2] == [whole[: whole.index(stop)], whole]
    [sampled] = engine.generate(["To be"], max_new_tokens=12, temperature=1.5, seed=3).texts
    assert found[2] == sampled
    assert Harness(engine).generate_until([]) == []


def test_prompts_leave_room_for_what_is_generated(engine):
    text = "abcdefghij" * 9
    [found] = Harness(engine).generate_until(asked((text, {"max_gen_toks": 20})))
    assert engine.generate([text[-76:]], max_new_tokens=20).texts == [found]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "a task's settings must be among until, do_sample, .*, got num_beams"),
        ({"max_gen_toks": 96}, "asks for 96 new tokens, but the model's context holds 96"),
        ({"top_p": 3.0, "max_gen_toks": 2}, "top_p must be"),
    ],
)
def test_settings_that_mean_nothing_are_refused(engine, settings, message):
    with pytest.raises(ValueError, match=message):
        Harness(engine).generate_until(asked(("a", settings)))


def test_arguments_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="'batchsize' must be one of the arguments of a model: dtype"):
        engine_of(str(SHIPPED), batchsize=3)


def passages():
    """Of the task in `examples/`, made of shipped text."""
    spec = importlib.util.spec_from_file_location("endings", TASK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.passages()


def test_the_task_has_endings_of_which_one_is_right():
    found = passages()
    assert len(found) == 8
    assert {each["own"] for each in found} == {0, 1, 2, 3}
    for each in found:
        assert each["begin"] + each["endings"][each["own"]] == each["text"]
        assert len(set(each["endings"])) == 4


def test_resident_and_offloaded_runs_have_the_same_scores():
    """To the last bit: a task of shipped text, with all experts resident and under budgets."""
    model, found = spelling(512), []
    chosen = sorted(passages(), key=lambda each: len(each["text"]))[:2]
    pairs = [(each["begin"], ending) for each in chosen for ending in each["endings"]]
    for slots, policy in ((None, "auto"), (9, "lru"), (0, "host-only")):
        budget = None if slots is None else slots * model.bank.expert_bytes
        with Engine(model, OffloadConfig(device_budget=budget, policy=policy)) as engine:
            harness = Harness(engine)
            scores = harness.loglikelihood(asked(*pairs))
            found.append((scores, harness.loglikelihood_rolling(asked((chosen[0]["text"],)))))
    assert len(found[0][0]) == 8
    assert all(each == found[0] for each in found)
