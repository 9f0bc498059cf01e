"""Recorded routing of a model, from its trace: held-out requests, and what predictors say of them.

`Routing` of `layerscope_jax.simulation.routing` reads what is written; it replaces the model in simulations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from layerscope_jax.prediction.predictors import NextGate
from layerscope_jax.prediction.traces import Passage, Trace, positions
from layerscope_jax.simulation.routing import Routing, StoredForecast
from layerscope_jax.simulation.routing_files import FORMAT, MOST_EXPERTS
from layerscope_jax.support import interrupts
from layerscope_jax.support.checks import Problems
from predictor.baselines import Candidate, Gate, Learned, Linear, Popularity, PreviousToken, truth
from predictor.dataset import load_rows
from predictor.documents import HELDOUT_SHARE
from predictor.linear import LinearParams
from predictor.llapor import LLaPor
from predictor.metrics import ranked_recall
from predictor.pca import Basis
from predictor.routers import Routers
from predictor.train import bar, by_horizon
from predictor.verdict import is_heldout

MOST_REQUESTS = 64
FEWEST = 4
"""Requests that are packed where no number is asked for: as many as there are within these limits."""

MOST_ROWS = 131_072
"""Held-out tokens that are read, unless the requests need more; passages are in random order."""

CHARS = 4
"""Characters of English text in a token, about."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How much is kept.

    Attributes:
        requests: R, of all domains in turns; None for as many as there are, 4 to 64.
        decode_steps: S, decode steps that follow each prompt.
        prompt_tokens: fewest and most tokens of a prompt; lengths are drawn evenly between them.
        kept: M, the likeliest experts of a forecast; 0 for two more than K.
        levels: steps that probabilities are rounded to, a divisor of 255: fewer make a smaller file.
        gate_look_ahead: W of the gate's forecast; at most the trained predictor's.
        seed: of the requests and the lengths.
    """

    requests: int | None = None
    decode_steps: int = 64
    prompt_tokens: tuple[int, int] = (16, 64)
    kept: int = 0
    levels: int = 15
    gate_look_ahead: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        problems = Problems()
        problems.at_least(self, decode_steps=1, kept=0, gate_look_ahead=1, seed=0)
        if self.requests is not None:
            problems.at_least(self, requests=1)
        least, most = self.prompt_tokens
        if not 1 <= least <= most:
            problems.add(f"prompt_tokens must be two lengths, the smaller one first, got {least} and {most}")
        if self.levels < 1 or 255 % self.levels:
            problems.add(f"levels must be a divisor of 255, such as 15, 51 or 255, got {self.levels}")
        problems.raise_any()

    @property
    def tokens(self) -> int:
        """Tokens that a passage needs for any request: the longest prompt and the decode steps."""
        return self.prompt_tokens[1] + self.decode_steps


def pack(
    trace: Trace,
    llapor: LLaPor | None,
    packing: Packing,
    *,
    linear: LinearParams | None = None,
    progress: bool = True,
) -> Routing:
    """Held-out routing of a trace with the forecasts of `llapor` and of the next layers' routers.

    Recall is of all tokens of the held-out passages that are long enough, but the first ones, which have no
    token before them.

    Args:
        trace: of the model, with hidden states.
        llapor: a predictor of the same model; None for the routers' forecast alone.
        packing: how much is kept.
        linear: a linear map fitted for all horizons of `llapor`, whose forecast is kept too; None for none.
        progress: whether to show a progress bar on stderr.

    Raises:
        ValueError: if the trace has too few held-out passages that are long enough, with what would help; if
            the predictor is of another model, or the model has more experts than such files can name.
    """
    model = trace.header.model
    layers, experts, choices = model.num_layers, model.num_experts, model.experts_per_token
    if experts > MOST_EXPERTS:
        raise ValueError(
            f"{trace.folder}: expected a model of at most {MOST_EXPERTS} experts a layer, which files of "
            f"recorded routing can name, got {experts}"
        )
    if llapor is not None:
        model.check(llapor.model, "the predictor")
    requests, most = requests_of(trace, packing)
    rows = load_rows(
        trace, lambda passage: is_heldout(passage) and passage.tokens >= packing.tokens, most=most
    )
    picked = choose(rows.passages, requests, packing.seed)
    starts = np.cumsum([0, *(passage.tokens for passage in rows.passages)])[picked]
    random = np.random.default_rng(packing.seed)
    lengths = random.integers(*packing.prompt_tokens, len(picked), endpoint=True)
    decoded = starts[None] + lengths[None] + np.arange(packing.decode_steps)[:, None]  # [S, R]

    look_ahead = min(packing.gate_look_ahead, layers) if llapor is None else llapor.look_ahead
    horizons = tuple(range(1, look_ahead + 1))
    candidates = candidates_of(trace, llapor, horizons)
    if linear is not None:
        candidates.append(Linear(linear))
    kept = min(packing.kept or choices + 2, experts)
    looked = {
        LLaPor.name: look_ahead,
        Linear.name: look_ahead,
        NextGate.name: min(packing.gate_look_ahead, look_ahead),
    }
    stored: dict[str, list[StoredForecast]] = {each.name: [] for each in candidates if each.name in looked}
    recall: dict[str, list[np.ndarray]] = {candidate.name: [] for candidate in candidates}
    counted = positions(rows.passages) > 0
    with bar(layers, progress) as advance:
        for layer in range(layers):
            true = truth(rows, layer, horizons)
            known = true.known & counted[:, None]
            for candidate in candidates:
                interrupts.check()
                advance(layer, f"packing layer {layer}, {candidate.name}")
                found = candidate.forecast(rows, layer)
                right = np.asarray(
                    ranked_recall(jnp.asarray(found.ranking), jnp.asarray(true.experts.astype(np.int32)))
                )
                recall[candidate.name].append((right * known).sum(0) / known.sum(0))
                if candidate.name in stored:
                    ahead = found.probabilities[decoded, : looked[candidate.name]]
                    stored[candidate.name].append(likeliest(ahead, kept, packing.levels))
        advance(layers, "packed")
    chosen = [rows.passages[index] for index in picked]
    longest = packing.prompt_tokens[1]
    prompts = np.minimum(starts[:, None] + np.arange(longest), len(rows) - 1)  # [R, P]
    real = np.arange(longest)[None] < lengths[:, None]
    return Routing(
        header={
            "format": FORMAT,
            "geometry": model.counts(),
            "domains": [passage.domain for passage in chosen],
            "documents": [passage.document for passage in chosen],
            "heldout_domains": trace.header.settings.get("heldout_domains", []),
            "recall": {name: means_of(np.stack(parts), name) for name, parts in recall.items()},
            "recall_tokens": int(counted.sum()),
        },
        decode_experts=rows.experts[decoded],
        prefill_experts=np.where(real[:, :, None, None], rows.experts[prompts], 0).astype(np.uint8),
        prefill_lengths=lengths.astype(np.int32),
        forecasts={
            name: StoredForecast(*(np.stack(parts, 2) for parts in zip(*found, strict=True)))
            for name, found in stored.items()
        },
    )


def requests_of(trace: Trace, packing: Packing) -> tuple[int, int]:
    """Returns how many requests a trace gives, and the most held-out tokens to read for them.

    Raises:
        ValueError: if it gives too few; says what would give enough.
    """
    lengths = [passage.tokens for _, passage, _ in trace.passages() if is_heldout(passage)]
    lengths.sort(reverse=True)
    there = sum(tokens >= packing.tokens for tokens in lengths)
    needed = packing.requests or FEWEST
    if there < needed:
        raise ValueError(
            f"{trace.folder}: expected {needed} held-out passages of {packing.tokens} tokens or more (the "
            f"longest prompt and the decode steps), got {there} of {len(lengths)}; "
            f"{remedy(trace, packing, needed - there)}{shorter(lengths, needed)}"
        )
    requests = packing.requests or min(there, MOST_REQUESTS)
    return requests, max(MOST_ROWS, requests * lengths[0])


def remedy(trace: Trace, packing: Packing, missing: int) -> str:
    """Says what to record so that a trace has some more held-out passages that are long enough."""
    settings = trace.header.settings
    longest = settings.get("length", packing.tokens)
    if longest < packing.tokens:
        return f"record it anew in passages of that length, with --length (it was {longest})"
    tokens = missing * packing.tokens
    limit = settings.get("heldout_tokens")
    within = "" if limit is None else f"within --heldout-tokens, which was {limit:,}, "
    return (
        f"record about {tokens:,} held-out tokens more, some {CHARS * tokens / 1e3:,.0f} kB of English text "
        f"in documents of that length: {within}all of a domain in --heldout-domains are held out, and of "
        f"others about one document in {1 / HELDOUT_SHARE:.0f}"
    )


def shorter(lengths: Sequence[int], needed: int) -> str:
    """Says which shorter requests there are enough of, by the lengths of passages, longest first; or nothing.

    >>> shorter([90, 40, 30], 2)
    '; or ask for shorter requests (prompt_tokens, decode_steps): 2 passages have 40 tokens or more'
    """
    if len(lengths) < needed:
        return ""
    return (
        "; or ask for shorter requests (prompt_tokens, decode_steps): "
        f"{needed} passages have {lengths[needed - 1]} tokens or more"
    )


def candidates_of(trace: Trace, llapor: LLaPor | None, horizons: tuple[int, ...]) -> list[Candidate]:
    """Returns the predictors whose recall is told: `llapor`, where there is one, the gate, the last token."""
    model = trace.header.model
    routers, basis = Routers.load(trace.folder), Basis.load(trace.folder)
    nothing = Popularity(np.zeros((model.num_layers, model.num_experts), np.float32), horizons)
    learned = [] if llapor is None else [Learned(llapor, routers, basis, horizons)]
    return [*learned, Gate(routers, basis, nothing, model.experts_per_token), PreviousToken(nothing)]


def choose(passages: Sequence[Passage], requests: int, seed: int) -> list[int]:
    """Indices of the requests' passages: domains in turns, within one in random order; different ones."""
    of_domain: dict[str, list[int]] = {}
    for index in np.random.default_rng(seed).permutation(len(passages)):
        of_domain.setdefault(passages[index].domain, []).append(int(index))
    turns = sorted(
        (turn, domain, index) for domain, indices in of_domain.items() for turn, index in enumerate(indices)
    )
    return [index for _, _, index in turns[:requests]]


def likeliest(probabilities: np.ndarray, kept: int, levels: int = 255) -> StoredForecast:
    """The `kept` likeliest experts of [..., E], best first, and their probabilities in 255ths.

    >>> [part.tolist() for part in likeliest(np.array([0.1, 0.0, 1.0, 0.45]), 2, levels=15)]
    [[2, 3], [255, 119]]
    """
    order = np.argsort(-probabilities, -1, kind="stable")[..., :kept]
    found = np.rint(levels * np.take_along_axis(probabilities, order, -1)) * (255 // levels)
    return StoredForecast(order.astype(np.uint8), found.astype(np.uint8))


def means_of(recall: np.ndarray, name: str) -> dict[str, list[float]]:
    """Means over layers of a predictor's recall [L, W]; the gate knows nothing of the next step."""
    means = by_horizon(recall)
    return {"this_step": means["this_step"]} if name == NextGate.name else means
