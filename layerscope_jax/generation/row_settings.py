"""How the rows of a batch pick their tokens, from the settings of the requests that run in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.generation.calls import RequestState
from layerscope_jax.generation.completions import TokenLogprobs
from layerscope_jax.generation.requests import MOST_LOGPROBS, Request, seed_of
from layerscope_jax.runtime.choosing import Changes, choose
from layerscope_jax.runtime.sampling import NO_TOKEN, Sampling

Picked = tuple[int, TokenLogprobs | None]
"""A new token, and its log-probabilities if the request asked for them."""


def changes_logits(request: Request) -> bool:
    """Returns whether a request's logits are changed before a token is picked by them."""
    return bool(
        request.repetition_penalty != 1
        or request.presence_penalty
        or request.frequency_penalty
        or request.logit_bias
        or request.min_new_tokens
    )


class RowSettings:
    """How the rows of a batch pick their tokens, for as long as the same requests run in them.

    Steps pick tokens themselves, greedy or sampled. If a request has settings beyond temperature, `top_k`,
    `top_p` and seed, or a grammar, or rows share logits, the tokens of the batch are picked by `choose` from
    the step's logits.

    Args:
        running: row -> the request that runs in it, with its tokens so far.
        rows: number B of rows; free ones are greedy.
        samples: whether the run has requests that sample: a step that samples is another program.
        stop_token_ids: ids that end a request without stop tokens of its own.
        sources: [B] row of the step's results that each row picks from; None for its own.

    Attributes:
        in_step: what the step picks by; None for greedy.
    """

    def __init__(
        self,
        running: Mapping[int, RequestState],
        rows: int,
        samples: bool,
        stop_token_ids: Sequence[int],
        sources: np.ndarray | None = None,
    ):
        self._running, self._rows, self._ends, self._sources = running, rows, stop_token_ids, sources
        requests = [state.request for state in running.values()]
        self._changes: Changes | None = None
        self._counts: jax.Array | None = None
        self._changed = any(map(changes_logits, requests))
        self._told = any(request.logprobs is not None for request in requests)
        self._extra = self._changed or self._told or any(request.min_p for request in requests)
        self._guided = {row: state for row, state in running.items() if state.guide is not None}
        self._extra = self._extra or bool(self._guided) or sources is not None
        self._sampling = self._sampling_of() if samples else None
        self.in_step = None if self._extra else self._sampling

    def pick(self, found: jax.Array, logits: jax.Array, positions: np.ndarray) -> list[Picked]:
        """Returns what each row gets after a step.

        Args:
            found: int32, the tokens that the step picked for each of its rows.
            logits: [..., V] float32 of the step.
            positions: int32 of the tokens before the new ones.
        """
        if not self._extra:
            return [(token, None) for token in np.asarray(found).tolist()]
        if self._sources is not None:
            found, logits = found[self._sources], logits[self._sources]
            positions = positions[self._sources]
        if self._changed and self._changes is None:
            self._changes, self._counts = self._prepare(logits)
        top = MOST_LOGPROBS if self._told else None
        allowed = self._allowed(logits.shape[-1]) if self._guided else None
        chosen = choose(
            logits, found, positions + 1, self._sampling, self._changes, self._counts, top, allowed
        )
        self._counts = chosen.counts
        new: list[Any] = [[token, None] for token in np.asarray(chosen.tokens).tolist()]
        if chosen.logprob is None or chosen.top_ids is None or chosen.top_logprobs is None:
            return [(token, None) for token, _ in new]
        own, ids, tops = map(np.asarray, (chosen.logprob, chosen.top_ids, chosen.top_logprobs))
        for row, state in self._running.items():
            most = state.request.logprobs
            if most is not None and new[row][0] != NO_TOKEN:
                pairs = zip(ids[row, :most].tolist(), tops[row, :most].tolist(), strict=True)
                likeliest = tuple([pair for pair in pairs if pair[1] > -np.inf])
                new[row][1] = TokenLogprobs(float(own[row]), likeliest)
        return [(token, logprobs) for token, logprobs in new]

    def _allowed(self, vocabulary: int) -> jax.Array:
        """Returns a bit for each token that a row may get: [B, V / 32] int32."""
        bits = np.full((self._rows, -(-vocabulary // 32)), -1, np.int32)
        for row, state in self._guided.items():
            assert state.guide is not None
            state.guide.allow(state.tokens, bits[row])
        return jnp.array(bits)

    def _sampling_of(self) -> Sampling:
        """Returns how each row samples."""
        requests, seeds = [Request(prompt=[0])] * self._rows, [0] * self._rows
        for row, state in self._running.items():
            requests[row], seeds[row] = state.request, seed_of(state.request.seed or 0, state.sample)
        numbers = {
            "seed": jnp.array(seeds, jnp.uint32),
            "temperature": jnp.array([request.temperature for request in requests], jnp.float32),
            "top_k": jnp.array([max(0, min(request.top_k, 2**31 - 1)) for request in requests], jnp.int32),
            "top_p": jnp.array([request.top_p for request in requests], jnp.float32),
        }
        if self._extra:
            numbers["min_p"] = jnp.array([request.min_p for request in requests], jnp.float32)
        return Sampling(**numbers)

    def _prepare(self, logits: jax.Array) -> tuple[Changes, jax.Array]:
        """Returns the changes to the logits, and how often each token is among the row's new ones.

        Both are derived from the requests' tokens, so they are right whatever happened to earlier steps.
        """
        shape, vocabulary = (self._rows, logits.shape[-1]), logits.shape[-1]
        counts, bias = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        ends, in_prompt = np.zeros(shape, bool), np.zeros(shape, bool)
        neutral = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0}
        penalties = {name: np.full(self._rows, value, np.float32) for name, value in neutral.items()}
        first_end = np.zeros(self._rows, np.int32)
        for row, state in self._running.items():
            request = state.request
            if not changes_logits(request):
                continue
            for name in neutral:
                penalties[name][row] = getattr(request, f"{name}_penalty")
            np.add.at(counts[row], state.tokens, 1)
            in_prompt[row, state.prompt] = True
            for token, added in (request.logit_bias or {}).items():
                bias[row, token] = added
            ends[row, [token for token in state.ends(self._ends) if token < vocabulary]] = True
            first_end[row] = len(state.prompt) + request.min_new_tokens
        arrays = [*penalties.values(), first_end, ends, bias, in_prompt]
        # Where the logits are, as what `choose` gives back: for another place it would be compiled again.
        return Changes(*map(jnp.array, arrays)), jax.device_put(jnp.array(counts), logits.sharding)
