"""The prefix cache: its bookkeeping, and that requests get the tokens that they get without it."""

import numpy as np
import pytest
from arithmetic import CONTEXT, WORDS, Arithmetic, alone, looped
from helpers import random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.generation import prefixes as module
from layerscope_jax.generation.handles import Handle
from layerscope_jax.generation.prefixes import Found, Prefixes, shared
from layerscope_jax.generation.requests import Request
from layerscope_jax.models.config import DeltaSizes, LatentSizes
from layerscope_jax.models.rotary import PAD_POSITION

pytestmark = pytest.mark.usefixtures("quick_compiles")

texts = st.lists(st.integers(0, 2), min_size=1, max_size=9)


def common(one, other):
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


@given(
    st.lists(st.tuples(st.sampled_from(["hold", "drop", "find"]), st.integers(0, 4), texts), max_size=20),
    st.booleans(),
)
def test_what_is_found_is_the_most_that_a_row_shares(acts, whole):
    prefixes, held = Prefixes(least=2), {}
    prefixes.fit(64, whole)
    for act, row, tokens in acts:
        if act == "hold":
            prefixes.hold(row, tokens)
            held[row] = tokens
        elif act == "drop":
            prefixes.drop(row)
            held.pop(row, None)
        else:
            counts = {row: common(said, tokens[:-1]) for row, said in held.items()}
            counts = {row: n for row, n in counts.items() if n >= 2 and (not whole or n == len(held[row]))}
            found = prefixes.find(tokens)
            assert (found is None) == (not counts)
            if found is not None:
                assert found.length == counts[found.row] == max(counts.values())


@given(
    st.lists(st.tuples(texts, st.integers(0, 4)), max_size=8),
    st.lists(texts, min_size=1, max_size=4),
    st.data(),
)
def test_rows_are_taken_once_and_what_was_of_use_last_stays(held, prompts, data):
    prefixes = Prefixes(least=2)
    order = []
    for tokens, row in held:
        prefixes.hold(row, tokens)
        order = [other for other in order if other != row] + [row]
    free = data.draw(
        st.permutations(range(5)).map(lambda rows: rows[: data.draw(st.integers(len(prompts), 5))])
    )
    rows = prefixes.place(prompts, free)
    assert len(set(rows)) == len(prompts)
    assert set(rows) <= set(free)
    if all(prefixes.find(prompt) is None for prompt in prompts):
        oldest = sorted(free, key=lambda row: (order.index(row) + 1 if row in order else 0, row))
        assert rows == oldest[: len(prompts)]


@given(st.lists(texts, min_size=1, max_size=6))
def test_prompts_wait_for_those_that_they_share_with(prompts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WORTH_A_STEP", 1)
        prefixes, left = Prefixes(least=2), list(range(len(prompts)))
        while left:
            now = [left[index] for index in prefixes.first([prompts[number] for number in left])]
            assert now
            for number in now:
                for other in now:
                    if other < number:
                        gain = common(prompts[other], prompts[number][:-1])
                        found = prefixes.find(prompts[number])
                        assert gain < 2 or (found is not None and gain <= found.length)
            for number in now:
                prefixes.hold(number, prompts[number])
                left.remove(number)


def test_a_row_is_used_on_where_it_holds_little_else():
    prefixes = Prefixes(least=2)
    prefixes.hold(1, [1, 2, 3])
    prefixes.hold(2, [4, 5, 6, 7, 8])
    assert prefixes.place([[1, 2, 3, 9]], [0, 1, 2]) == [1]
    assert prefixes.place([[4, 5, 9, 9]], [0, 1, 2]) == [0]  # the rest of what row 2 holds stays
    assert prefixes.find([4, 5, 9, 9]) == Found(2, 2)
    prefixes.hold(1, [4, 5, 6], runs=True)
    assert prefixes.find([4, 5, 6, 9]) == Found(1, 3)
    prefixes.fit(64, whole=True)
    prefixes.hold(1, [4, 5, 6], runs=True)
    assert prefixes.find([4, 5, 6, 9]) is None
    assert shared(np.array([], int), np.array([1])) == 0


def submitted(made, prompt, count, **options):
    request = Request(prompt=prompt, max_new_tokens=count, **options)
    call = made.call([request], [prompt], record_plans=False, bound=False)
    handle = Handle(None, made, call)
    made.submit(call)
    return handle


STEMS = [[number * 7 % WORDS for number in range(40)], [5] * 30, list(range(60, 20, -1))]
prompts = st.builds(
    lambda stem, length, end: stem[:length] + end,
    st.sampled_from(STEMS),
    st.integers(0, 40),
    st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=20),
)
acts = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), prompts, st.integers(1, 20)),
        st.tuples(
            st.sampled_from(["read", "result", "cancel", "again"]), st.integers(0, 20), st.integers(1, 9)
        ),
    ),
    min_size=1,
    max_size=20,
)


@given(acts=acts, most=st.integers(1, 4), fails=st.sets(st.integers(1, 60), max_size=2))
@settings(deadline=None, max_examples=60)
def test_each_gets_the_tokens_that_it_gets_without(acts, most, fails):
    """Also conversations that go on, and where steps fail or requests are cancelled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WORTH_A_STEP", 20)
        made, runner = looped(most, prefix_cache=True)
        handles, step = [], runner.step

        def failing(*inputs):
            runner.fails = int(runner.steps + 1 in fails)
            return step(*inputs)

        runner.step = failing
        for act, what, count in [*acts, *[("result", index, 0) for index in range(len(acts))]]:
            if act == "submit":
                handles.append((submitted(made, what, count), what, count))
            elif handles:
                handle, prompt, most_tokens = handles[what % len(handles)]
                try:
                    if act == "read":
                        next(iter(handle), None)
                    elif act == "cancel":
                        handle.cancel()
                    else:
                        result = handle.result()
                        expected = alone(prompt, most_tokens)[: CONTEXT - len(prompt)]
                        if result.finish_reason != "abort":
                            assert result.token_ids == expected
                        assert handle.cached_tokens < len(prompt)
                        longer = [*prompt, *result.token_ids, 3]
                        if act == "again" and len(longer) < CONTEXT:
                            handles.append((submitted(made, longer, count), longer, count))
                except OSError:
                    pass  # it drove the step that failed


class Counting(Arithmetic):
    """Counts the tokens that are prefilled."""

    def __init__(self):
        super().__init__()
        self.prefilled = []

    def step(self, tokens, positions, *others):
        if tokens.shape[1] > 1:
            self.prefilled.append(int((positions != PAD_POSITION).sum()))
        return super().step(tokens, positions, *others)


def test_a_conversation_computes_only_what_is_new():
    """Also when nothing ran meanwhile; the tokens that were not computed are counted."""
    made, runner = looped(2, runner=Counting(), prefix_cache=True, chunk=4096)
    first = submitted(made, STEMS[0], 6).results()
    longer = [*STEMS[0], *first[0].token_ids, 1, 2, 3]
    handle = submitted(made, longer, 4)
    assert handle.results().token_ids == [alone(longer, 4)]
    assert runner.prefilled == [40, 4]  # the last new token was in no step
    assert handle.cached_tokens == handle.results().stats.cached_tokens == 45
    assert (first.stats.cached_tokens, first.stats.prompt_tokens) == (0, 40)


def test_requests_at_once_compute_what_they_share_once():
    made, runner = looped(16, runner=Counting(), prefix_cache=True, chunk=4096)
    several = [[*STEMS[0], number] for number in range(9)]
    call = made.call(
        [Request(prompt=p, max_new_tokens=2) for p in several], several, record_plans=False, bound=False
    )
    assert made.complete(call).token_ids == [alone(prompt, 2) for prompt in several]
    assert runner.prefilled == [41, 8]
    assert call.cached_tokens == 8 * 40


def test_slots_are_taken_from_what_was_not_of_use_for_longest():
    made, runner = looped(2, runner=Counting(), prefix_cache=True, chunk=4096)
    for stem in (STEMS[0], STEMS[1], STEMS[0], STEMS[2], STEMS[0], STEMS[1]):
        submitted(made, [*stem, 1], 1).result()
    assert runner.prefilled == [41, 31, 1, 41, 1, 31]


def test_an_idle_loop_keeps_few_slots_those_of_use_last():
    """Steps with many are slower; what they hold is still found."""
    made, runner = looped(16, runner=Counting(), prefix_cache=True, chunk=4096)
    stems = [[number] * 20 for number in range(9)]
    handles = [submitted(made, stem, 2) for stem in stems]
    assert [handle.result().token_ids for handle in handles] == [alone(stem, 2) for stem in stems]
    assert made._slots.rows == 16
    runner.prefilled.clear()
    for stem in (stems[8], stems[0]):
        prompt = [*stem, 50]
        assert submitted(made, prompt, 2).result().token_ids == alone(prompt, 2)
    assert made._slots.rows == 4
    assert runner.prefilled == [1, 21]


def test_a_closed_loop_holds_no_caches():
    made, _ = looped(2, prefix_cache=True)
    submitted(made, STEMS[0], 2).result()
    assert made._slots.caches is not None
    made.close()
    assert made._slots is None
    without, _ = looped(2)
    submitted(without, STEMS[0], 2).result()
    assert without._slots is None


KINDS = {
    "window": {"sliding_window": 24, "num_layers": 1},
    "latent": {
        "latent": LatentSizes(query_rank=None, rank=32, rope=32, nope=32, value=32),
        "attention": "latent",
    },
    "states": {
        "delta": DeltaSizes(key_heads=2, value_heads=4, key=8, value=8, taps=4),
        "full_attention_layers": (1,),
        "num_layers": 2,
    },
}


@pytest.mark.parametrize(("kind", "numerics"), [("window", "exact"), ("latent", "exact"), ("states", "auto")])
def test_a_model_says_the_same(kind, numerics):
    """With positions in every layer, or states of all tokens together, which must be gone on with whole.

    With exact numerics, to the last bit; then only what was prefilled is used again.
    """
    model = random_model(seed=3, qk_norm="none", **{"num_layers": 1} | KINDS[kind])
    first = np.random.default_rng(0).integers(0, 61, 40).tolist()
    settings = {"max_new_tokens": 5, "logprobs": 3 if numerics == "exact" else None}
    with Engine(model, OffloadConfig(max_num_seqs=1, numerics=numerics)) as plain:
        [answer] = plain.generate([first], **settings).token_ids
        prompts = [first, [*first, *answer, 1, 2], [*first[:30], 7, 8, 9]]
        expected = [plain.generate([prompt], **settings)[0] for prompt in prompts]
    config = OffloadConfig(max_num_seqs=1, numerics=numerics, prefix_cache=True)
    with Engine(model, config) as engine:
        results = [engine.generate([prompt], **settings)[0] for prompt in prompts]
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    assert [result.logprobs for result in results] == [result.logprobs for result in expected]
    cached = [result.stats.cached_tokens for result in results]
    assert cached == ([0, 44, 0] if kind == "states" else [0, 40, 30])
