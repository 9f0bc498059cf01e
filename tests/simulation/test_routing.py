"""Recorded routing: what is counted and forecast, against loops; files that are damaged are named."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from layerscope_jax.scheduling.geometry import RoutedExperts
from layerscope_jax.simulation.routing import PROFILES, Routing, StoredForecast

S, R, L, E, K, P, W, M = 3, 4, 5, 7, 2, 6, 3, 4

GEOMETRY = {"num_layers": L, "num_experts": E, "experts_per_token": K}


def distinct(rng, *shape, size):
    return rng.random((*shape, E)).argsort(-1)[..., :size].astype(np.uint8)


@pytest.fixture
def routing():
    rng = np.random.default_rng(0)

    def stored(ahead, kept):
        places = (S, R, L, ahead)
        probabilities = rng.integers(0, 256, (*places, kept)).astype(np.uint8)
        return StoredForecast(distinct(rng, *places, size=kept), probabilities)

    return Routing(
        header={
            "format": 2,
            "geometry": GEOMETRY,
            "domains": ["verse", "prose", "verse", "code"],
        },
        decode_experts=distinct(rng, S, R, L, size=K),
        prefill_experts=distinct(rng, R, P, L, size=K),
        prefill_lengths=np.array([6, 1, 3, 5], np.int32),
        forecasts={"llapor": stored(W, M), "gate": stored(1, M + 1)},
    )


def counted(choices):
    found = np.zeros(E, int)
    for expert in np.ravel(choices):
        found[expert] += 1
    return found


def expected(routing, predictor, step, layer, requests):
    """By loops."""
    found = np.zeros((W, E), np.float32)
    for place in range(W):
        wraps, target = divmod(layer + 1 + place, L)
        for request in requests:
            if predictor in routing.forecasts:
                experts, probabilities = routing.forecasts[predictor]
                if place < experts.shape[3]:
                    at = step, request, layer, place
                    found[place, experts[at]] += probabilities[at] / np.float32(255)
            elif predictor != "none":
                when = step + wraps - (predictor == "previous-token")
                if when < 0:
                    last = routing.prefill_lengths[request] - 1
                    found[place] += counted(routing.prefill_experts[request, last, target])
                elif when < S:
                    found[place] += counted(routing.decode_experts[when, request, target])
    return found


@pytest.mark.parametrize("requests", [[0, 1, 2, 3], [2], [3, 1, 1], []])
def test_counts_and_forecasts_are_those_of_the_requests(routing, requests):
    assert set(routing.predictors) == {"llapor", "gate", "previous-token", "popularity", "oracle", "none"}
    for predictor in routing.predictors:
        counts, forecasts = routing.batch(requests, predictor)
        assert (counts.shape, counts.dtype) == ((S, L, E), np.int32)
        assert (forecasts.shape, forecasts.dtype) == ((S, L, W, E), np.float32)
        for step in range(S):
            for layer in range(L):
                true = counted(routing.decode_experts[step, requests, layer]) if requests else np.zeros(E)
                np.testing.assert_array_equal(counts[step, layer], true)
                if predictor != "popularity":
                    said = expected(routing, predictor, step, layer, requests)
                    np.testing.assert_allclose(forecasts[step, layer], said, rtol=1e-5)


def test_prompts_are_counted_as_far_as_they_go(routing):
    found = routing.prefill([0, 2])
    assert found.shape == (L, E)
    for layer in range(L):
        prompts = [routing.prefill_experts[0, :6, layer], routing.prefill_experts[2, :3, layer]]
        np.testing.assert_array_equal(found[layer], counted(np.concatenate(prompts)))


def test_a_file_gives_back_what_was_saved(routing, tmp_path):
    routing.save(tmp_path / "a.npz")
    routing.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = Routing.load(tmp_path / "a.npz")
    assert found.header == routing.header
    assert found.domains == ("verse", "prose", "verse", "code")
    assert (found.steps, found.requests, found.routed.counts()) == (S, R, GEOMETRY)
    for name, array in routing._arrays().items():
        np.testing.assert_array_equal(found._arrays()[name], array)


def test_what_is_out_of_range_is_said(routing):
    with pytest.raises(ValueError, match=r"requests must be indices in 0\.\.3, got \[4\]"):
        routing.batch([4])
    with pytest.raises(
        ValueError, match="one of llapor, gate, previous-token, popularity, oracle, none, got 'best'"
    ):
        routing.batch([0], "best")
    with pytest.raises(ValueError, match=r"routing must be one of .*, got 'no-such-model'"):
        Routing.shipped("no-such-model")


def damaged(path, **changes):
    """The file with arrays replaced, or left out where they are None."""
    with np.load(path) as opened:
        arrays = dict(opened) | {name.replace("__", "."): array for name, array in changes.items()}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def test_everything_that_is_wrong_with_a_file_is_said_at_once(routing, tmp_path):
    path = tmp_path / "file.npz"
    with pytest.raises(ValueError, match="expected a file of recorded routing, found none"):
        Routing.load(path)
    path.write_bytes(b"PK\3\4 no zip")
    with pytest.raises(ValueError, match=r"expected an \.npz file"):
        Routing.load(path)

    routing.save(path)
    damaged(path, decode_experts=None, forecast__gate__experts=None, other=np.zeros(1))
    with pytest.raises(
        ValueError,
        match=r"decode_experts is missing; forecast\.gate\.experts is missing; other is not expected",
    ):
        Routing.load(path)

    routing.save(path)
    damaged(path, decode_experts=np.zeros((S, R, L), np.uint8), prefill_lengths=np.ones(R))
    with pytest.raises(
        ValueError,
        match=r"decode_experts: expected shape \(any, 4, 5, 2\), got \(3, 4, 5\); .*"
        r"prefill_lengths: expected integers, got float64",
    ):
        Routing.load(path)

    routing.save(path)
    decode, lengths = routing.decode_experts.copy(), routing.prefill_lengths.copy()
    decode[0, 0, 0], lengths[0] = 1, 6
    gate = routing.forecasts["gate"].experts.copy()
    gate[0, 0, 0, 0, 0] = E
    damaged(path, decode_experts=decode, forecast__gate__experts=gate)
    with pytest.raises(
        ValueError,
        match=r"decode_experts: expected different experts for a token, got 1 with one twice; "
        r"forecast\.gate\.experts: expected experts 0\.\.6, got 7",
    ):
        Routing.load(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "header: expected JSON"),
        ("[]", "header: expected format, geometry"),
        (json.dumps({"format": 1, "geometry": GEOMETRY, "domains": ["verse"]}), "format 2, got 1; record it"),
        (
            json.dumps({"format": 2, "geometry": GEOMETRY | {"experts_per_token": E + 1}, "domains": []}),
            r"experts_per_token must be in 1\.\.num_experts \(7\), got 8; domains: expected a list",
        ),
    ],
)
def test_a_header_that_does_not_serve_is_said(routing, tmp_path, header, message):
    routing.save(tmp_path / "file.npz")
    damaged(tmp_path / "file.npz", header=np.array(header))
    with pytest.raises(ValueError, match=message):
        Routing.load(tmp_path / "file.npz")


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.npz")), ids=lambda path: path.stem)
def test_what_is_shipped_is_whole(path: Path):
    routing = Routing.shipped(path.stem)
    every = range(routing.requests)
    counts, true = routing.batch(every, "oracle")
    assert (counts.sum(-1) == routing.requests * routing.routed.experts_per_token).all()
    # Trained predictors know more than the step before does.
    errors = {
        name: np.abs(routing.batch(every, name).forecasts - true)[:-1].mean()
        for name in ("llapor", "previous-token")
    }
    assert errors["llapor"] < errors["previous-token"]


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.npz")), ids=lambda path: path.stem)
def test_shipped_routing_is_found_by_its_numbers(path: Path):
    first = {"moonlight": "deepseek-v2-lite"}.get(path.stem, path.stem)  # the two have the same numbers
    assert Routing.shipped_for(Routing.shipped(path.stem).routed) == first
    assert Routing.shipped_for(RoutedExperts(num_layers=3, num_experts=5, experts_per_token=1)) is None


def test_shortened_routing_is_its_beginning(routing):
    short = routing.shortened(2)
    assert short.steps == 2
    for name in ("oracle", "none", *routing.forecasts):
        whole, part = routing.batch([0, 1], name), short.batch([0, 1], name)
        np.testing.assert_array_equal(part.counts, whole.counts[:2])
        if name in routing.forecasts:
            np.testing.assert_array_equal(part.forecasts, whole.forecasts[:2])
    assert routing.shortened(1000).steps == routing.steps


def header(**changes):
    record = {"format": 2, "geometry": GEOMETRY, "domains": ["verse"] * R}
    return json.dumps(record | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "header: expected JSON, got .*nested"),
        (header(domains="verse"), "domains: expected a list .*, got verse"),
        (header(domains=[1, 2, 3, 4]), "domains"),
        (header(domains=[]), "domains: expected a list of the domain of each request"),
        (header(geometry=GEOMETRY | {"num_experts": 1e400}), "geometry"),
        (header(geometry=GEOMETRY | {"num_layers": str(L)}), r"geometry\.num_layers"),
        (header(geometry=GEOMETRY | {"num_experts": E + 0.5}), r"geometry\.num_experts"),
        (header(geometry=GEOMETRY | {"num_experts": 257}), "geometry: expected at most 256 experts"),
        (header(geometry=GEOMETRY | {"num_layers": 10**6}), r"expected shape \(any, 4, 1000000"),
        (
            header(geometry=GEOMETRY | {"num_layers": -1}),
            r"geometry\.num_layers must be a whole number over 0",
        ),
        (header(geometry=GEOMETRY | {"choices": 2}), r"geometry\.choices not expected"),
        (header(geometry=[1, 2, 3]), "geometry must be an object"),
        (header(format="x" * 999), "expected format 2, got x"),
    ],
    ids=lambda value: value[:40],
)
def test_a_header_of_other_kinds_is_refused(routing, tmp_path, text, message):
    path = tmp_path / "file.npz"
    routing.save(path)
    damaged(path, header=np.array(text))
    with pytest.raises(ValueError, match=message) as refused:
        Routing.load(path)
    assert str(refused.value).startswith(str(path))
    assert len(str(refused.value)) < 900


class Bomb:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("kind", ["pickle", "array", "in the archive", "cut off", "folder", "empty"])
def test_no_archive_of_arrays_is_refused_and_nothing_unpickled(routing, tmp_path, kind):
    path, went_off = tmp_path / "file.npz", tmp_path / "went off"
    routing.save(path)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(went_off)))
    elif kind == "array":
        with path.open("wb") as file:
            np.save(file, routing.decode_experts)
    elif kind == "in the archive":
        damaged(path, decode_experts=np.array([Bomb(went_off)], object))
    elif kind == "cut off":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.unlink()
        path.mkdir() if kind == "folder" else path.touch()
    with pytest.raises(ValueError, match=r"expected (an \.npz file|a file of recorded routing)") as refused:
        Routing.load(path)
    assert str(path) in str(refused.value)
    assert not went_off.exists()


def test_a_name_that_no_file_has_is_refused():
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="expected a file of recorded routing, found none"):
            Routing.load(name)


@pytest.mark.parametrize("lengths", [[-1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 2**62]], ids=str)
def test_lengths_out_of_range_are_refused(routing, tmp_path, lengths):
    path = tmp_path / "file.npz"
    routing.save(path)
    damaged(path, prefill_lengths=np.array(lengths))
    with pytest.raises(ValueError, match=r"prefill_lengths: expected 1\.\."):
        Routing.load(path)


def test_negative_and_wide_experts_are_refused(routing, tmp_path):
    for dtype in (np.int8, np.int64, np.float32, bool):
        path = tmp_path / "file.npz"
        routing.save(path)
        damaged(path, decode_experts=routing.decode_experts.astype(dtype))
        with pytest.raises(ValueError, match="decode_experts: expected uint8"):
            Routing.load(path)


def test_what_is_no_array_is_refused(routing):
    with pytest.raises(ValueError, match="decode_experts: expected an array, got list"):
        replace(routing, decode_experts=[[1]])
