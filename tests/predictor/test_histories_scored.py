"""The scorecard's previous-token and popularity say what an engine's say, asked token by token."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from layerscope_jax.prediction import history
from layerscope_jax.prediction.trace_index import Passage
from layerscope_jax.scheduling.geometry import RoutedExperts
from layerscope_jax.scheduling.plan import Observation
from predictor.baselines import Popularity, PreviousToken
from predictor.dataset import Rows

L, E, K = 3, 5, 2
MODEL = RoutedExperts(num_layers=L, num_experts=E, experts_per_token=K)


def rows_of(lengths, seed):
    experts = np.random.default_rng(seed).random((sum(lengths), L, E)).argsort(-1)[..., :K].astype(np.uint8)
    following = np.arange(1, sum(lengths) + 1)
    following[np.cumsum(lengths) - 1] = -1
    passages = tuple(Passage("verse", str(i), "heldout", 0, 1, length) for i, length in enumerate(lengths))
    nothing = np.zeros((sum(lengths), L, 1), np.float16)
    return Rows(passages, nothing, experts, np.zeros(experts.shape, np.float16), following)


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    horizons=st.sampled_from([(1,), (1, 2), (2,)]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_previous_token_is_the_engines_for_each_passage_alone(lengths, horizons, seed):
    rows = rows_of(lengths, seed)
    share = Popularity.count(rows.experts, E)
    popularity = Popularity(share, horizons)
    said = [PreviousToken(popularity).forecast(rows, layer).probabilities for layer in range(L)]
    predictor, row = history.PreviousToken(max(horizons)), 0
    for length in lengths:
        state = predictor.init(MODEL)
        for _ in range(length):
            for layer in range(L):
                expected = np.array(predictor.expected(state, layer, K))[np.array(horizons) - 1]
                known = expected.any(-1)
                np.testing.assert_array_equal(said[layer][row][known], expected[known])
                fallback = popularity.forecast(rows, layer).probabilities[row]
                np.testing.assert_array_equal(said[layer][row][~known], fallback[~known])
                demand = {int(expert): 1 for expert in rows.experts[row, layer]}
                seen = Observation(
                    step=0, layer=layer, phase="decode", demand=demand, resident=(), in_flight=()
                )
                state = predictor.update(state, seen)
            row += 1


def test_popularity_is_the_engines_after_the_training_rows():
    rows = rows_of([4, 3], seed=1)
    predictor = history.Popularity(2, memory=1.0)
    state = predictor.init(MODEL)
    for row in range(len(rows)):
        for layer in range(L):
            demand = {int(expert): 1 for expert in rows.experts[row, layer]}
            seen = Observation(step=0, layer=layer, phase="prefill", demand=demand, resident=(), in_flight=())
            state = predictor.update(state, seen)
    scored = Popularity(Popularity.count(rows.experts, E), (1, 2))
    for layer in range(L):
        np.testing.assert_allclose(
            scored.forecast(rows, layer).probabilities[0], predictor.expected(state, layer, K), rtol=1e-6
        )
