"""What comes back of a request: tokens as they are made, and whole completions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from layerscope_jax.runtime.statistics import RunStats
from layerscope_jax.scheduling.plan import LayerPlan


@dataclass(frozen=True)
class Token:
    """One new token, as `Engine.stream` yields it.

    Attributes:
        request: index of its prompt.
        token_id: -1, which is no token, with an error or where it was cancelled.
        text: what it adds to the text; empty while a later token may still change it, or without a tokenizer.
        finish_reason: None, or why the request ended with it: "stop", "length", "error" where the logits
            held NaN or infinity, or "abort" where it was cancelled.
        error: with an error, a sentence on its cause.
    """

    request: int
    token_id: int
    text: str
    finish_reason: str | None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What one prompt was continued with.

    Attributes:
        text: the continuation, a stop token left out; empty without a tokenizer.
        token_ids: of the continuation, a stop token included.
        finish_reason: "stop", "length", "error" or "abort"; after the last two, text and tokens are those
            before it.
        error: with an error, a sentence on its cause.
        stats: of the call that it was generated in, shared by all its completions; see `RunStats`.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: RunStats = field(repr=False)
    error: str | None = None


class Completions(list[Completion]):
    """What `Engine.generate` returns: a `Completion` for each prompt, in their order.

    Attributes:
        stats: of the whole call.
        plans: every layer's decision, if asked for; none where all is resident and a step is one function.
    """

    def __init__(self, completions: Iterable[Completion], stats: RunStats, plans: list[LayerPlan]):
        super().__init__(completions)
        self.stats = stats
        self.plans = plans

    @property
    def texts(self) -> list[str]:
        """Every continuation's text."""
        return [completion.text for completion in self]

    @property
    def token_ids(self) -> list[list[int]]:
        """Every continuation's token ids."""
        return [completion.token_ids for completion in self]
