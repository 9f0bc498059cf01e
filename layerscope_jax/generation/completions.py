"""Results of requests: tokens as they are generated, and whole completions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from layerscope_jax.runtime.statistics import RunStats
from layerscope_jax.scheduling.plan import LayerPlan


@dataclass(frozen=True)
class Token:
    """One new token, as `Engine.stream` yields it.

    Attributes:
        request: index of its prompt in the call.
        token_id: its id; -1, which is no token, if the request ended with an error or was cancelled.
        text: the text that it adds; empty while a later token may still change it, or without a tokenizer.
        finish_reason: None, or why the request ended with this token: "stop", "length", "error" if the logits
            held NaN or infinity, or "abort" if it was cancelled.
        error: a sentence on the cause if `finish_reason` is "error", otherwise None.
    """

    request: int
    token_id: int
    text: str
    finish_reason: str | None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The continuation of one prompt.

    Attributes:
        text: text of the continuation, without a stop token; empty without a tokenizer.
        token_ids: token ids of the continuation, including a stop token.
        finish_reason: "stop", "length", "error" or "abort"; for the last two, `text` and `token_ids` hold
            what was generated before it.
        error: a sentence on the cause if `finish_reason` is "error", otherwise None.
        stats: statistics of the whole call, shared by all its completions; see `RunStats`.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: RunStats = field(repr=False)
    error: str | None = None


class Completions(list[Completion]):
    """List that `Engine.generate` returns: a `Completion` for each prompt, in the order of the prompts.

    Attributes:
        stats: statistics of the whole call.
        plans: every layer's plan if `record_plans` was set; empty if all experts are resident and each step
            is one jitted function.
    """

    def __init__(self, completions: Iterable[Completion], stats: RunStats, plans: list[LayerPlan]):
        super().__init__(completions)
        self.stats = stats
        self.plans = plans

    @property
    def texts(self) -> list[str]:
        """Text of every completion, in the order of the prompts."""
        return [completion.text for completion in self]

    @property
    def token_ids(self) -> list[list[int]]:
        """Token ids of every completion, in the order of the prompts."""
        return [completion.token_ids for completion in self]
