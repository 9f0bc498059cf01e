"""Draws follow the distribution that was asked for, and depend on seed and position alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.runtime.sampling import Sampling, sample

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROWS, VOCABULARY = 4000, 6
LOGITS = np.log(np.array([0.05, 0.3, 0.1, 0.25, 0.2, 0.1])).astype(np.float32)
run = jax.jit(sample)


def draw(logits, positions=0, *, seed=None, temperature=1.0, top_k=0, top_p=1.0):
    """One token a row; settings and positions are the same for all rows, or one a row."""
    rows = len(logits)
    seed = np.arange(rows) if seed is None else seed
    full = partial(np.broadcast_to, shape=(rows,))
    sampling = Sampling(
        jnp.asarray(full(np.asarray(seed, np.uint32))),
        jnp.asarray(full(np.float32(temperature))),
        jnp.asarray(full(np.int32(top_k))),
        jnp.asarray(full(np.float32(top_p))),
    )
    tokens = run(np.asarray(logits, np.float32), full(np.asarray(positions, np.int32)), sampling)
    assert tokens.shape == (rows,)
    assert tokens.dtype == jnp.int32
    return np.asarray(tokens)


def same(rows=ROWS):
    return np.broadcast_to(LOGITS, (rows, VOCABULARY))


def expected_shares(temperature=1.0, top_k=0, top_p=1.0):
    shares = np.exp(LOGITS.astype(np.float64) / temperature)
    order = np.argsort(-shares, kind="stable")
    kept = order[: top_k or VOCABULARY]
    before = np.cumsum(shares[kept]) - shares[kept]
    kept = kept[before < top_p * shares[kept].sum()]
    result = np.zeros(VOCABULARY)
    result[kept] = shares[kept] / shares[kept].sum()
    return result


def surprise(tokens, shares):
    """Chi-square by its degrees of freedom; infinite if something impossible was drawn."""
    counts = np.bincount(tokens, minlength=VOCABULARY)
    possible = shares > 0
    if counts[~possible].any():
        return np.inf
    wanted = shares[possible] * len(tokens)
    return ((counts[possible] - wanted) ** 2 / wanted).sum() / max(1, possible.sum() - 1)


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_k": VOCABULARY + 5},
    {"top_p": 0.5},
    {"top_p": 0.76},
    {"top_k": 4, "top_p": 0.8, "temperature": 1.5},
]


@pytest.mark.parametrize("asked", SETTINGS, ids=str)
@pytest.mark.parametrize("by", ["seed", "position"])
def test_frequencies_are_those_asked_for(asked, by):
    """Over seeds and over positions alike. Were the shares right, one run in millions would pass 8."""
    rows = np.arange(ROWS)
    tokens = draw(same(), rows, seed=9, **asked) if by == "position" else draw(same(), 9, seed=rows, **asked)
    assert surprise(tokens, expected_shares(**asked)) < 8
    if not np.allclose(expected_shares(**asked), expected_shares()):
        assert surprise(tokens, expected_shares()) > 8


def test_neighbouring_seeds_and_positions_are_independent():
    first, second = draw(same(), 3), draw(same(), 4)
    joint = np.outer(expected_shares(), expected_shares()).ravel()
    counts = np.bincount(first * VOCABULARY + second, minlength=VOCABULARY**2)
    assert ((counts - joint * ROWS) ** 2 / (joint * ROWS)).sum() / (VOCABULARY**2 - 1) < 3


@given(st.integers(0, 2**32 - 1), st.permutations(range(8)))
@settings(deadline=None, max_examples=12)
def test_a_row_is_drawn_alike_wherever_it_stands(number, order):
    rng = np.random.default_rng(number)
    logits = rng.standard_normal((8, 17))
    each = {
        "positions": rng.integers(0, 50, 8),
        "seed": rng.integers(0, 2**32, 8),
        "temperature": rng.choice([0.0, 0.7, 2.0], 8),
        "top_k": rng.choice([0, 3, 40], 8),
        "top_p": rng.choice([0.3, 0.9, 1.0], 8),
    }
    tokens = draw(logits, **each)
    moved = draw(logits[order], **{name: values[list(order)] for name, values in each.items()})
    assert moved.tolist() == tokens[list(order)].tolist()
    others = rng.standard_normal((8, 17))
    others[2] = logits[2]
    assert draw(others, **each)[2] == tokens[2]


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=12)
def test_noise_belongs_to_the_token(number):
    """So a filter changes a draw only if it takes that very token away."""
    logits = np.random.default_rng(number).standard_normal((8, 17))
    free = draw(logits, seed=number)
    for asked in ({"top_k": 5}, {"top_p": 0.6}):
        limited = draw(logits, seed=number, **asked)
        rank = np.argsort(np.argsort(-logits, axis=1), axis=1)
        if "top_k" in asked:
            assert (rank[np.arange(8), limited] < 5).all()
            stays = rank[np.arange(8), free] < 5
            assert (limited == free)[stays].all()
        changed = limited != free
        assert (rank[np.arange(8), limited] < rank[np.arange(8), free])[changed].all()


def test_rounding_that_swaps_two_ranks_swaps_no_draws():
    """As another batch size may round them; noise laid out by rank would give each the other's."""
    one, other = (np.tile(np.array(row, np.float32), (ROWS, 1)) for row in ([0, 1e-6], [1e-6, 0]))
    assert (draw(one) != draw(other)).sum() <= 1
    assert 0.4 < draw(one).mean() < 0.6


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
        {"top_k": 1},
        {"top_k": 1, "temperature": 100.0},
        {"top_p": 1e-6},
        {"top_p": 1e-6, "temperature": 50.0},
        {"temperature": 1e-6},
        {"temperature": 1.5e-38},
        {"temperature": 1e-45},
    ],
    ids=str,
)
def test_what_leaves_one_choice_is_greedy(asked):
    logits = np.random.default_rng(0).standard_normal((50, 17)) * 3 - 20
    assert draw(logits, **asked).tolist() == logits.argmax(1).tolist()


def test_equals_go_to_the_lowest_id():
    logits = np.zeros((2, 5), np.float32)
    logits[:, 3:] = 1
    assert sample(jnp.asarray(logits), jnp.zeros(2, jnp.int32), None).tolist() == [3, 3]
    assert draw(logits, temperature=0.0).tolist() == [3, 3]
    assert draw(logits, top_k=1).tolist() == [3, 3]


def test_great_heat_leaves_no_preference():
    counts = np.bincount(draw(same(), temperature=1e30), minlength=VOCABULARY)
    assert counts.min() > 0.8 * ROWS / VOCABULARY


def test_the_largest_seed_and_position():
    assert draw(same(2), 2**30 + 1, seed=2**32 - 1).shape == (2,)
    assert (draw(same(), 5, seed=2**32 - 1 - np.arange(ROWS)) != draw(same(), 5)).any()


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_a_row_that_has_the_vocabulary_sorted_changes_no_other(number):
    """Where nothing is filtered nothing is sorted, and the draws are the same."""
    rng = np.random.default_rng(number)
    logits, seed = rng.standard_normal((8, 17)), rng.integers(0, 2**32, 8)
    temperature = rng.choice([0.7, 1.0, 2.0], 8)
    unsorted = draw(logits, seed=seed, temperature=temperature)
    top_k = np.array([0] * 7 + [3])
    assert draw(logits, seed=seed, temperature=temperature, top_k=top_k)[:7].tolist() == unsorted[:7].tolist()
