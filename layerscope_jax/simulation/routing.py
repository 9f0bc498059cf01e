"""Recorded routing of requests, with predictors' forecasts of it: replaces the model in simulations.

`profiles/README.md` describes the origin of the shipped files, `simulation.routing_files` their contents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from layerscope_jax.prediction.history import Popularity, PreviousToken
from layerscope_jax.scheduling.geometry import RoutedExperts
from layerscope_jax.simulation.history_forecasts import foretold, remembered
from layerscope_jax.simulation.routing_files import check, read, write
from layerscope_jax.support.files import parse_json

HISTORIES = {kind.name: kind for kind in (PreviousToken, Popularity)}

DERIVED = (*HISTORIES, "oracle", "none")
"""Forecasts that are computed from the routing: by an engine's predictors of these names, after observing the
prompts' last tokens; perfect ones, zeros after the last step; none."""

PROFILES = Path(__file__).parents[1] / "profiles"


class StoredForecast(NamedTuple):
    """Forecast of a predictor for each token; both arrays are [S, R, L, W, M] uint8.

    Attributes:
        experts: the M likeliest experts.
        probabilities: their probabilities, in 255ths.
    """

    experts: np.ndarray
    probabilities: np.ndarray


class Batch(NamedTuple):
    """Demand of some requests that are decoded together.

    Attributes:
        counts: [S, L, E] int32 tokens routed to each expert.
        forecasts: [S, L, W, E] float32 tokens expected of the W layers after each.
    """

    counts: np.ndarray
    forecasts: np.ndarray


@dataclass(frozen=True, eq=False)
class Routing:
    """Recorded routing of R requests, each a prompt and S decode steps.

    A look-ahead past the last layer continues with the first layers of the next step.

    Attributes:
        header: {"format": 2, "geometry": `RoutedExperts`, "domains": [R names]} and more, for human readers.
        decode_experts: [S, R, L, K] uint8.
        prefill_experts: [R, P, L, K] uint8.
        prefill_lengths: [R] tokens of each prompt, 1..P.
        forecasts: predictor -> its forecast.

    Raises:
        ValueError: naming everything that is wrong.

    >>> routing = Routing(
    ...     header={
    ...         "format": 2,
    ...         "geometry": {"num_layers": 2, "num_experts": 3, "experts_per_token": 1},
    ...         "domains": ["verse"],
    ...     },
    ...     decode_experts=np.array([[[[0], [1]]], [[[2], [1]]]], np.uint8),  # S = 2, R = 1
    ...     prefill_experts=np.array([[[[0], [0]]]], np.uint8),
    ...     prefill_lengths=np.array([1]),
    ...     forecasts={},
    ... )
    >>> counts, forecasts = routing.batch([0], "oracle")
    >>> counts[1, 0].tolist(), forecasts[0, 1].tolist()  # the last layer looks into the next step
    ([0, 0, 1], [[0.0, 0.0, 1.0]])
    """

    header: Mapping[str, Any]
    decode_experts: np.ndarray
    prefill_experts: np.ndarray
    prefill_lengths: np.ndarray
    forecasts: Mapping[str, StoredForecast]

    def __post_init__(self) -> None:
        check(self.header, self._arrays())

    @cached_property
    def routed(self) -> RoutedExperts:
        """Numbers of the model's routed experts: L, E, K."""
        return RoutedExperts(**self.header["geometry"])

    @property
    def steps(self) -> int:
        return self.decode_experts.shape[0]

    @property
    def requests(self) -> int:
        return self.decode_experts.shape[1]

    def shortened(self, steps: int) -> Routing:
        """Returns the routing with at most so many decode steps of each request."""
        cut = {
            name: StoredForecast(*(array[:steps] for array in part)) for name, part in self.forecasts.items()
        }
        return replace(self, decode_experts=self.decode_experts[:steps], forecasts=cut)

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain (kind of text) of each request [R]."""
        return tuple(self.header["domains"])

    @property
    def look_ahead(self) -> int:
        """W of every forecast: the largest that is stored, or 1."""
        return max((stored.experts.shape[3] for stored in self.forecasts.values()), default=1)

    @property
    def predictors(self) -> tuple[str, ...]:
        """Names of the predictors that `batch` takes."""
        return (*self.forecasts, *DERIVED)

    def batch(self, requests: Sequence[int], predictor: str = "none") -> Batch:
        """Returns the demand of some requests that are decoded together, with a predictor's forecast.

        Args:
            requests: indices 0..R-1; repeated ones count repeatedly.
            predictor: one of `predictors`.

        Raises:
            ValueError: for an unknown predictor, or a request out of range.
        """
        chosen, model = self._chosen(requests), self.routed
        if predictor not in self.predictors:
            raise ValueError(f"predictor must be one of {', '.join(self.predictors)}, got {predictor!r}")
        counts = _tally(self.decode_experts[:, chosen], model.num_experts)
        if predictor in self.forecasts:
            return Batch(counts, self._stored(predictor, chosen))
        if predictor == "oracle":
            return Batch(counts, foretold(counts, self.look_ahead))
        if predictor == "none":
            shape = (self.steps, model.num_layers, self.look_ahead, model.num_experts)
            return Batch(counts, np.zeros(shape, np.float32))
        last = self.prefill_experts[chosen, self.prefill_lengths[chosen] - 1]
        before = _tally(last[None], model.num_experts)[0]
        return Batch(counts, remembered(HISTORIES[predictor](self.look_ahead), model, before, counts))

    def prefill(self, requests: Sequence[int]) -> np.ndarray:
        """Returns the tokens [L, E] int32 of the requests' prompts that are routed to each expert.

        Raises:
            ValueError: if a request is out of range.
        """
        chosen = self._chosen(requests)
        real = np.arange(self.prefill_experts.shape[1])[None] < self.prefill_lengths[chosen][:, None]
        return _tally(self.prefill_experts[chosen][real][None], self.routed.num_experts)[0]

    @classmethod
    def load(cls, path: str | Path) -> Routing:
        """Reads a file that `save` wrote.

        Raises:
            ValueError: if there is no such file, or naming everything that is wrong with it.
        """
        header, arrays = read(Path(path))
        parts = ("decode_experts", "prefill_experts", "prefill_lengths")
        names = dict.fromkeys(name.split(".")[1] for name in arrays if name.startswith("forecast."))
        stored = {
            name: StoredForecast(arrays[f"forecast.{name}.experts"], arrays[f"forecast.{name}.probabilities"])
            for name in names
        }
        try:
            decoded, prefilled, lengths = (arrays[name] for name in parts)
            return cls(header, decoded, prefilled, lengths, stored)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; copy it again, or record it anew") from None

    @classmethod
    def shipped(cls, name: str) -> Routing:
        """Returns the shipped routing of a name in `profiles/`.

        Raises:
            ValueError: if there is none of that name; lists all names.
        """
        names = sorted(file.stem for file in PROFILES.glob("*.npz"))
        if name not in names:
            raise ValueError(f"routing must be one of {', '.join(names) or '(none is there)'}, got {name!r}")
        return cls.load(PROFILES / f"{name}.npz")

    @staticmethod
    def shipped_for(model: RoutedExperts) -> str | None:
        """Returns the name of shipped routing with a model's numbers of layers, experts and choices, if any.

        >>> Routing.shipped_for(
        ...     RoutedExperts(num_layers=24, num_experts=32, experts_per_token=4)
        ... )
        'gpt-oss-20b'
        """
        for file in sorted(PROFILES.glob("*.npz")):
            with np.load(file, allow_pickle=False) as opened:
                header = parse_json(str(opened["header"]).encode())
            if header["geometry"] == model.routed.counts():
                return file.stem
        return None

    def save(self, path: str | Path) -> None:
        """Writes one .npz file, completely or not at all.

        Raises:
            ValueError: if it cannot be written.
        """
        write(Path(path), self.header, self._arrays())

    def _arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays by their names in a file."""
        arrays = {
            "decode_experts": self.decode_experts,
            "prefill_experts": self.prefill_experts,
            "prefill_lengths": self.prefill_lengths,
        }
        for name, stored in self.forecasts.items():
            arrays |= {f"forecast.{name}.{part}": array for part, array in stored._asdict().items()}
        return arrays

    def _chosen(self, requests: Sequence[int]) -> np.ndarray:
        chosen = np.asarray(requests, np.int64)
        if chosen.ndim != 1 or ((chosen < 0) | (chosen >= self.requests)).any():
            raise ValueError(f"requests must be indices in 0..{self.requests - 1}, got {requests!r}")
        return chosen

    def _stored(self, predictor: str, chosen: np.ndarray) -> np.ndarray:
        """Returns a predictor's probabilities [S, L, W, E] summed over tokens; zeros past its look-ahead."""
        model = self.routed
        experts, probabilities = (part[:, chosen] for part in self.forecasts[predictor])
        steps, size, layers, ahead, kept = experts.shape
        flat = (steps, size, layers * ahead, kept)
        sums = _tally(experts.reshape(flat), model.num_experts, probabilities.reshape(flat))
        forecasts = np.zeros((steps, layers, self.look_ahead, model.num_experts), np.float32)
        forecasts[:, :, :ahead] = sums.reshape(steps, layers, ahead, -1)
        return forecasts


def _tally(experts: np.ndarray, size: int, probabilities: np.ndarray | None = None) -> np.ndarray:
    """Returns sums over requests for each expert: [A, R, B, M] -> [A, B, E].

    Args:
        experts: experts to count.
        size: E.
        probabilities: probabilities in 255ths of the same shape, summed as float32; None to count as int32.
    """
    outer, _, inner, _ = experts.shape
    place = np.arange(outer)[:, None, None, None] * inner + np.arange(inner)[None, None, :, None]
    flat = (place * size + experts).reshape(-1)
    if probabilities is None:
        tally = np.bincount(flat, minlength=outer * inner * size).astype(np.int32)
    else:
        sums = np.bincount(flat, probabilities.reshape(-1), minlength=outer * inner * size)
        tally = (sums / 255).astype(np.float32)
    return tally.reshape(outer, inner, size)
