"""Log-probabilities of the tokens of prompts, collected over the steps that prefill them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from layerscope_jax.generation.calls import RequestState
from layerscope_jax.generation.completions import PromptLogprobs, TokenLogprobs
from layerscope_jax.runtime.scoring import Scores


class PromptScores:
    """Scores of the prompts that a prefill begins with.

    Args:
        prompts: token ids of each row.
        rows: number B of rows; those without a prompt are padding.
        top: most likeliest tokens that a request asks for.

    Attributes:
        top: as given.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], rows: int, top: int):
        self._prompts, self._rows, self.top = prompts, rows, top
        self._parts: list[tuple[np.ndarray, ...]] = []

    @classmethod
    def asked_by(
        cls, group: Sequence[RequestState], prompts: Sequence[Sequence[int]], rows: int
    ) -> PromptScores | None:
        """Returns what collects the scores that requests ask for; None if none of them does.

        A request that already has tokens, as after a failed step, has published them.
        """
        asked = [state.request.prompt_logprobs for state in group if not state.tokens]
        tops = [top for top in asked if top is not None]
        return cls(prompts, rows, max(tops)) if tops else None

    def targets(self, start: int, width: int) -> np.ndarray:
        """Returns the token [B, S] that follows each of a step that begins at position `start`."""
        targets = np.zeros((self._rows, width), np.int32)
        for row, prompt in enumerate(self._prompts):
            part = prompt[start + 1 : start + 1 + width]
            targets[row, : len(part)] = part
        return targets

    def add(self, scores: Scores) -> None:
        """Keeps the scores of the next step."""
        self._parts.append(tuple(map(np.asarray, scores)))

    def of(self, state: RequestState, row: int) -> PromptLogprobs | None:
        """Returns the log-probabilities of a request that is prefilled in a row; None if it asks for none."""
        top = state.request.prompt_logprobs
        if top is None or state.tokens:
            return None
        count = len(self._prompts[row]) - 1
        own, ids, tops = (
            np.concatenate([part[row] for part in parts])[:count].tolist()
            for parts in zip(*self._parts, strict=True)
        )
        told: PromptLogprobs = [None]
        for logprob, likeliest, logprobs in zip(own, ids, tops, strict=True):
            pairs = zip(likeliest[:top], logprobs[:top], strict=True)
            told.append(TokenLogprobs(logprob, tuple([pair for pair in pairs if pair[1] > -np.inf])))
        return told


def holds_nan(told: PromptLogprobs | None) -> bool:
    """Returns whether a log-probability of a prompt is not a number."""
    return told is not None and any(math.isnan(token.logprob) for token in told if token is not None)
