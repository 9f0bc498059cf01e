"""Each request's settings apply to it alone, whatever shares its batch, and whatever happens to its steps."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from arithmetic import WORDS, Scoring, looped, scores
from helpers import VOCABULARY, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.generation.arguments import make_requests
from layerscope_jax.generation.handles import Handle
from layerscope_jax.generation.requests import Request

ENDS = (7, 40)


pytestmark = pytest.mark.usefixtures("quick_compiles")


def submitted(made, request):
    call = made.call([request], [list(request.prompt)], record_plans=False, bound=False)
    handle = Handle(None, made, call)
    made.submit(call)
    return handle


def completed(request, **options):
    made, _ = looped(runner=Scoring(), **options)
    return submitted(made, request).results()


def greedy_of(request):
    """What a greedy request gives, token by token in plain NumPy."""
    tokens, prompt = [], list(request.prompt)
    ends = ENDS if request.stop_token_ids is None else request.stop_token_ids
    ends = () if request.ignore_eos and request.stop_token_ids is None else ends
    while len(tokens) < request.max_new_tokens:
        logits = scores(prompt + tokens).astype(np.float64)
        for token, bias in (request.logit_bias or {}).items():
            logits[token] += bias
        for token in {*prompt, *tokens}:
            penalty = request.repetition_penalty
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        for token in set(tokens):
            logits[token] -= tokens.count(token) * request.frequency_penalty + request.presence_penalty
        if len(tokens) < request.min_new_tokens:
            logits[list(ends)] = -np.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] in ends:
            break
    return tokens


requests = st.builds(
    Request,
    prompt=st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=40),
    max_new_tokens=st.integers(8, 20),
    min_new_tokens=st.sampled_from([0, 0, 6]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.6, 0.6]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.9, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 2.0, -1.5]),
    logit_bias=st.sampled_from([None, None, {7: 4.0}, {3: 5.5, 40: -100}]),
    stop_token_ids=st.sampled_from([None, None, [3], []]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, None, 0, 3]),
    prompt_logprobs=st.sampled_from([None, None, 0, 2]),
)


def fit(before, tokens, told, top):
    """Log-probabilities of tokens that follow others are what the formulas say."""
    begin = len(tokens) - len(told)
    for number, (token, found) in enumerate(zip(tokens[begin:], told, strict=True), begin):
        logits = scores([*before, *tokens[:number]]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        assert found.logprob == pytest.approx(logprobs[token], abs=1e-5)
        assert [token for token, _ in found.top] == np.argsort(-logprobs)[:top].tolist()


@given(
    st.lists(requests, min_size=1, max_size=6),
    st.sampled_from([1, 3]),
    st.sets(st.integers(1, 40), max_size=2),
)
@settings(deadline=None, max_examples=25)
def test_greedy_requests_get_what_the_formulas_say(wanted, most, fails):
    """Also requests that join and leave a batch, and those that are prefilled again after a failed step."""
    made, runner = looped(most, runner=Scoring(), stop_token_ids=ENDS)
    handles, step = [submitted(made, request) for request in wanted], runner.step

    def failing(*inputs):
        runner.fails = int(runner.steps + 1 in fails)
        return step(*inputs)

    runner.step = failing
    for request, handle in zip(wanted, handles, strict=True):
        try:
            result = handle.result()
        except OSError:
            continue  # it drove the step that failed; the others go on
        expected = greedy_of(request)
        assert result.token_ids == expected
        assert result.finish_reason == ("length" if len(expected) == request.max_new_tokens else "stop") or (
            expected[-1] in (request.stop_token_ids or ENDS)
        )
        if request.prompt_logprobs is None:
            assert result.prompt_logprobs is None
        else:
            first, *others = result.prompt_logprobs
            assert first is None
            fit([], list(request.prompt), others, request.prompt_logprobs)
        if request.logprobs is None:
            assert result.logprobs is None
            continue
        fit(list(request.prompt), expected, result.logprobs, request.logprobs)
        assert result.cumulative_logprob == pytest.approx(sum(told.logprob for told in result.logprobs))


SAMPLED = {"prompt": [5, 6], "max_new_tokens": 6, "temperature": 1.5, "top_k": -1}


@pytest.mark.parametrize("extra", [{}, {"logprobs": 1}], ids=str)
def test_samples_are_those_of_consecutive_seeds(extra):
    together = completed(Request(**SAMPLED, seed=2**32 - 2, n=4, **extra), max_num_seqs=4)
    assert [sample.index for sample in together] == [0, 1, 2, 3]
    assert [sample.seed for sample in together] == [2**32 - 2, 2**32 - 1, 0, 1]
    made, _ = looped(4, runner=Scoring())
    each = [submitted(made, Request(**SAMPLED, seed=sample.seed, **extra)) for sample in together]
    assert together.token_ids == [handle.result().token_ids for handle in each]
    assert len({tuple(tokens) for tokens in together.token_ids}) == 4
    assert together.stats.prompts == 1
    assert together.stats.new_tokens == 24


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=3),
    most=st.sampled_from([2, 4]),
    fails=st.sets(st.integers(1, 20), max_size=1),
)
@settings(deadline=None, max_examples=15)
def test_samples_share_a_prefill(sizes, most, fails):
    """And each gets what a request by itself gets, also if a step fails, or the prompt takes several."""
    made, runner = looped(most, runner=Scoring())
    several = [
        Request(**SAMPLED | {"prompt": [size] * size, "max_new_tokens": 3}, seed=size, n=n)
        for size, n in sizes
    ]
    handles, step, prefilled = [submitted(made, request) for request in several], runner.step, []

    def failing(tokens, *others):
        runner.fails = int(runner.steps + 1 in fails)
        prefilled.extend([tokens.shape[0]] * (tokens.shape[1] > 1))
        return step(tokens, *others)

    runner.step = failing
    for request, handle in zip(several, handles, strict=True):
        try:
            together = handle.results()
        except OSError:
            continue  # it drove the step that failed
        for sample in together:
            alone = completed(replace(request, n=1, seed=sample.seed))
            assert sample.token_ids == alone[0].token_ids
    if len(sizes) == 1 and not fails:
        (size, n), chunk = sizes[0], 32
        assert prefilled == [1] * (-(-size // chunk) * -(-n // most))


def test_a_settings_program_draws_as_a_step_does():
    """So what shares a batch with a request that has such settings gets what it would get without."""
    made, _ = looped(runner=Scoring())
    plain, other = Request(**SAMPLED, seed=3), Request(**SAMPLED, min_p=0.5, logprobs=2)
    handles = [submitted(made, request) for request in (plain, other)]
    assert handles[0].result().token_ids == completed(plain)[0].token_ids
    likely = completed(other)[0]
    for token in likely.logprobs:
        assert token.logprob >= token.top[0][1] + 1.5 * np.log(0.5) - 1e-5


def test_a_seed_that_is_drawn_is_reported():
    first, second = completed(Request(**SAMPLED, seed=None)), completed(Request(**SAMPLED, seed=None))
    assert first[0].seed != second[0].seed
    again = completed(Request(**SAMPLED, seed=first[0].seed))
    assert again[0].token_ids == first[0].token_ids


class Spelling(Scoring):
    """Says a text, a byte a token."""

    def __init__(self, text):
        super().__init__()
        self.text, self.fails_at = byte_tokenizer().encode(text).ids, ()

    def step(self, tokens, positions, last, caches, sampling):
        self.fails = int(self.steps + 1 in self.fails_at)
        _, _, caches = super().step(tokens, positions, last, caches, sampling)
        places = positions[np.arange(len(tokens)), last]  # the prompt is a single token
        said = np.array([self.text[min(place, len(self.text) - 1)] for place in places], np.int32)
        return said, jnp.asarray(10 * np.eye(VOCABULARY, dtype=np.float32)[said]), caches


COMMA = byte_tokenizer().encode(",").ids[0]
STORY = "one, two☃, three. four"


@pytest.mark.parametrize(
    ("given", "text", "reason", "tokens"),
    [
        ({"stop": ", t"}, "one", ", t", 6),
        ({"stop": ["four", "☃"]}, "one, two", "☃", 11),
        (
            {"stop": ["two☃, three"], "include_stop_str_in_output": True},
            "one, two☃, three",
            "two☃, three",
            18,
        ),
        ({"stop": ", t", "min_new_tokens": 5}, "one", ", t", 6),
        ({"stop": ", t", "min_new_tokens": 6}, "one, two☃", ", t", 14),
        ({"stop": "x"}, STORY, None, len(STORY.encode())),
        ({"stop": "four!"}, STORY, None, len(STORY.encode())),
        ({"stop": "four"}, STORY[:-4], "four", len(STORY.encode())),
        ({"stop": "ee", "stop_token_ids": [COMMA]}, "one", COMMA, 4),
    ],
    ids=str,
)
def test_a_stop_string_ends_a_request_and_its_text(given, text, reason, tokens):
    """Streamed as well: what was yielded is never taken back, and after a failed step nothing comes twice."""
    request = Request(prompt=[0], max_new_tokens=len(STORY.encode()), **given)
    made, runner = looped(runner=Spelling(STORY), tokenizer=byte_tokenizer())
    runner.fails_at = (4, 9)
    handle, other = submitted(made, request), submitted(made, Request(prompt=[0], max_new_tokens=30))
    for _ in range(2):
        try:
            for _ in other:  # which drives the steps that fail
                pass
        except OSError:
            other = submitted(made, Request(prompt=[0], max_new_tokens=30))
    events = list(handle)
    result = handle.result()
    assert "".join(event.text for event in events) == result.text == text
    assert len(result.token_ids) == tokens
    assert (result.finish_reason, result.stop_reason) == ("length" if reason is None else "stop", reason)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 2}, "n must be 1 at temperature 0, where all samples are the same, got 2"),
        ({"n": 0}, r"n must be a whole number in 1\.\.1024, got 0"),
        ({"min_new_tokens": 65}, "min_new_tokens must be at most max_new_tokens, 64, got 65"),
        ({"min_p": 1.5}, r"min_p must be a number in 0\.\.1, got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number from 1e-6 to 1e6"),
        ({"presence_penalty": float("nan")}, r"presence_penalty must be a number in -2\.\.2, got nan"),
        ({"frequency_penalty": 3}, "frequency_penalty must be"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias must be token ids with numbers in"),
        ({"logit_bias": {5: 101}}, "logit_bias must be"),
        ({"logit_bias": [5]}, "logit_bias must be"),
        ({"stop": ""}, "stop must be a text or a list of texts, none of them empty"),
        ({"stop": ["a", ""]}, "stop must be"),
        ({"stop": ["a", 3]}, "stop must be"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
        ({"logprobs": 21}, r"logprobs must be a whole number in 0\.\.20 or None, got 21"),
        ({"logprobs": True}, "logprobs must be"),
        ({"tools": []}, "tools cannot be given without messages"),
        ({"messages": [{"role": "user"}]}, "either a prompt or messages, got both"),
        ({"prompt": None}, "prompt must be text or a list of token ids, got None"),
        ({"prompt": None, "messages": []}, "messages must be a list of"),
        ({"prompt": None, "messages": [{"content": "a"}]}, "messages must be a list of"),
        ({"min_p": -1, "stop": 3}, "min_p must be.*; stop must be"),
    ],
    ids=str,
)
def test_what_is_no_setting(given, message):
    with pytest.raises(ValueError, match=message):
        Request(**{"prompt": [1]} | given)


def test_a_conversation_is_a_request():
    with pytest.raises(
        ValueError, match=r"got \[{'role': 'user'}\]; put a conversation into a Request\(messages="
    ):
        make_requests([[{"role": "user"}]], {})
