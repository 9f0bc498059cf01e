"""Recorded routing of requests and what predictors said of it: something to schedule by, without the model.

`profiles/README.md` says where the shipped files come from, `simulation.routing_files` what is in one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from layerscope_jax.simulation.routing_files import problems, read, write

DERIVED = ("previous-token", "oracle", "none")
"""Forecasts that need nothing but the routing."""

PROFILES = Path(__file__).parents[1] / "profiles"


class StoredForecast(NamedTuple):
    """What a predictor said of each token; both [S, R, L, W, M] uint8.

    Attributes:
        experts: the M likeliest.
        probabilities: theirs, in 255ths.
    """

    experts: np.ndarray
    probabilities: np.ndarray


class Batch(NamedTuple):
    """What some requests, decoded together, ask for.

    Attributes:
        counts: [S, L, E] int32 tokens routed to each expert.
        forecasts: [S, L, W, E] float32 tokens expected of the W layers after each.
    """

    counts: np.ndarray
    forecasts: np.ndarray


@dataclass(frozen=True, eq=False)
class Routing:
    """Recorded routing of R requests, each a prompt and S decode steps.

    A look-ahead that passes the last layer goes on into the first layers of the next step.

    Attributes:
        header: {"format": 1, "geometry": {"layers", "experts", "choices"}, "domains": [R names]} and more,
            for people to read.
        decode_experts: [S, R, L, K] uint8.
        prefill_experts: [R, P, L, K] uint8.
        prefill_lengths: [R] tokens of each prompt, 1..P.
        forecasts: predictor -> what it said.

    Raises:
        ValueError: naming everything that is wrong.

    >>> routing = Routing(
    ...     header={"format": 1, "geometry": {"layers": 2, "experts": 3, "choices": 1}, "domains": ["verse"]},
    ...     decode_experts=np.array([[[[0], [1]]], [[[2], [1]]]], np.uint8),  # S = 2, R = 1
    ...     prefill_experts=np.array([[[[0], [0]]]], np.uint8),
    ...     prefill_lengths=np.array([1]),
    ...     forecasts={},
    ... )
    >>> routing.counts(1, 0, [0]).tolist()
    [0, 0, 1]
    >>> routing.forecast("oracle", 0, 1, [0]).tolist()  # the next step's first layer
    [[0.0, 0.0, 1.0]]
    """

    header: Mapping[str, Any]
    decode_experts: np.ndarray
    prefill_experts: np.ndarray
    prefill_lengths: np.ndarray
    forecasts: Mapping[str, StoredForecast]

    def __post_init__(self) -> None:
        found = problems(self.header, self._arrays())
        if found:
            raise ValueError("; ".join(found))

    @property
    def layers(self) -> int:
        return self.decode_experts.shape[2]

    @property
    def experts(self) -> int:
        return self.header["geometry"]["experts"]

    @property
    def choices(self) -> int:
        return self.decode_experts.shape[3]

    @property
    def steps(self) -> int:
        return self.decode_experts.shape[0]

    @property
    def requests(self) -> int:
        return self.decode_experts.shape[1]

    @property
    def domains(self) -> tuple[str, ...]:
        """[R] what kind of text each request is of."""
        return tuple(self.header["domains"])

    @property
    def look_ahead(self) -> int:
        """W of every forecast: the farthest that is stored, or 1."""
        return max((stored.experts.shape[3] for stored in self.forecasts.values()), default=1)

    @property
    def predictors(self) -> tuple[str, ...]:
        """Every name that `forecast` and `batch` take."""
        return (*self.forecasts, *DERIVED)

    def counts(self, step: int, layer: int, requests: Sequence[int]) -> np.ndarray:
        """[E] int32: how many of the requests' tokens go to each expert.

        Args:
            step: 0..S-1.
            layer: 0..L-1.
            requests: indices 0..R-1; one that is named twice counts twice.

        Raises:
            ValueError: if one of them is out of range.
        """
        chosen = self._chosen(requests)
        self._check(step, layer)
        return _tally(self.decode_experts[step, chosen, layer][None, :, None], self.experts)[0, 0]

    def forecast(self, predictor: str, step: int, layer: int, requests: Sequence[int]) -> np.ndarray:
        """[W, E] float32 tokens that each expert of the next W layers is expected to get.

        Args:
            predictor: one of `predictors`: a stored one; "previous-token", the newest token known to have
                passed the target layer, which is the prompt's last one at first; "oracle", what came true,
                zeros after the last step; "none", zeros.
            step, layer, requests: as for `counts`.

        Raises:
            ValueError: for an unknown predictor, or what is out of range.
        """
        chosen = self._chosen(requests)
        self._check(step, layer)
        shape = (self.look_ahead, self.experts)
        if predictor in self.forecasts:
            experts, probabilities = (part[step, chosen, layer][None] for part in self.forecasts[predictor])
            found = np.zeros(shape, np.float32)
            found[: experts.shape[2]] = _tally(experts, self.experts, probabilities)[0]
            return found
        first = self._ahead(predictor, step, layer)
        if first is None:
            return np.zeros(shape, np.float32)
        return self._history(chosen)[first : first + self.look_ahead].astype(np.float32)

    def batch(self, requests: Sequence[int], predictor: str = "none") -> Batch:
        """All steps and layers of `counts` and `forecast` at once.

        Raises:
            ValueError: as those.
        """
        chosen = self._chosen(requests)
        counts = _tally(self.decode_experts[:, chosen], self.experts)
        forecasts = np.zeros((self.steps, self.layers, self.look_ahead, self.experts), np.float32)
        if predictor in self.forecasts:
            experts, probabilities = (part[:, chosen] for part in self.forecasts[predictor])
            steps, size, layers, ahead, kept = experts.shape
            flat = (steps, size, layers * ahead, kept)
            sums = _tally(experts.reshape(flat), self.experts, probabilities.reshape(flat))
            forecasts[:, :, :ahead] = sums.reshape(steps, layers, ahead, -1)
        else:
            steps_layers = np.arange(self.steps)[:, None, None], np.arange(self.layers)[None, :, None]
            first = self._ahead(predictor, *steps_layers)
            if first is not None:
                forecasts[:] = self._history(chosen)[first + np.arange(self.look_ahead)]
        return Batch(counts, forecasts)

    def prefill(self, requests: Sequence[int]) -> np.ndarray:
        """[L, E] int32 tokens of all the requests' prompts that are routed to each expert.

        Raises:
            ValueError: if a request is out of range.
        """
        chosen = self._chosen(requests)
        real = np.arange(self.prefill_experts.shape[1])[None] < self.prefill_lengths[chosen][:, None]
        return _tally(self.prefill_experts[chosen][real][None], self.experts)[0]

    @classmethod
    def load(cls, path: str | Path) -> Routing:
        """Reads a file that `save` wrote.

        Raises:
            ValueError: if there is none, or naming everything that is wrong with it.
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
        """One of those that come with the library, by its name in `profiles/`.

        Raises:
            ValueError: with the names there are.
        """
        names = sorted(file.stem for file in PROFILES.glob("*.npz"))
        if name not in names:
            raise ValueError(f"routing must be one of {', '.join(names) or '(none is there)'}, got {name!r}")
        return cls.load(PROFILES / f"{name}.npz")

    def save(self, path: str | Path) -> None:
        """Writes one .npz file, whole or not at all.

        Raises:
            ValueError: if it cannot be written.
        """
        write(Path(path), self.header, self._arrays())

    def _arrays(self) -> dict[str, np.ndarray]:
        """By their names in a file."""
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

    def _check(self, step: int, layer: int) -> None:
        if not (0 <= step < self.steps and 0 <= layer < self.layers):
            raise ValueError(
                f"expected a step in 0..{self.steps - 1} and a layer in 0..{self.layers - 1}, "
                f"got {step} and {layer}"
            )

    def _ahead(self, predictor: str, step: Any, layer: Any) -> Any:
        """Where in `_history` a derived predictor finds the layer after `layer`; None for "none"."""
        here = step * self.layers + layer + 1
        match predictor:
            case "previous-token":
                return here
            case "oracle":
                return here + self.layers  # a step later
            case "none":
                return None
        raise ValueError(f"predictor must be one of {', '.join(self.predictors)}, got {predictor!r}")

    def _history(self, chosen: np.ndarray) -> np.ndarray:
        """[(S + 2) L, E] counts of the prompts' last tokens, of the steps, and zeros past the last one."""
        last = self.prefill_experts[chosen, self.prefill_lengths[chosen] - 1]
        steps = _tally(np.concatenate([last[None], self.decode_experts[:, chosen]]), self.experts)
        return np.concatenate(
            [steps.reshape(-1, self.experts), np.zeros((self.layers, self.experts), np.int32)]
        )


def _tally(experts: np.ndarray, size: int, probabilities: np.ndarray | None = None) -> np.ndarray:
    """Sums over requests, for each expert: [A, R, B, M] -> [A, B, E].

    Args:
        experts: who is counted.
        size: E.
        probabilities: in 255ths, as large as `experts`, to be added up as float32; None to count as int32.
    """
    outer, _, inner, _ = experts.shape
    place = np.arange(outer)[:, None, None, None] * inner + np.arange(inner)[None, None, :, None]
    flat = (place * size + experts).reshape(-1)
    if probabilities is None:
        found = np.bincount(flat, minlength=outer * inner * size).astype(np.int32)
    else:
        sums = np.bincount(flat, probabilities.reshape(-1), minlength=outer * inner * size)
        found = (sums / 255).astype(np.float32)
    return found.reshape(outer, inner, size)
