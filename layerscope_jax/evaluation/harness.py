"""What lm-eval asks of a model, answered by an engine; needs no lm-eval (`lm_eval_model` does)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

from layerscope_jax.checkpoints.model import load
from layerscope_jax.checkpoints.tokenizer_settings import TokenizerSettings
from layerscope_jax.config import OffloadConfig
from layerscope_jax.engine import Engine
from layerscope_jax.evaluation.perplexity import prefix_token, windows
from layerscope_jax.evaluation.scoring import most_tokens, score
from layerscope_jax.generation.chat import Chat
from layerscope_jax.generation.requests import Request
from layerscope_jax.support.checks import Problems

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256
"""New tokens of a request that says nothing of their number, as of lm-eval's other models."""

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks have for the number of new tokens; the first one that is given counts."""

PASSED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
"""Settings of tasks that are a request's under the same name."""

OF_LOADING = ("dtype", "format", "dense_format", "experts")
"""Arguments of a model that are those of `layerscope_jax.load`; all others are `OffloadConfig`'s."""


class Instance(Protocol):
    """A request of lm-eval's: its arguments are those of the method that it is given to."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class Harness:
    """Answers lm-eval's requests by an engine.

    Args:
        engine: scores and generates.
        max_length: most tokens that the model reads to score the next one; None for as many as it can.
            Longer contexts are cut on the left.

    Raises:
        ValueError: if the model has no tokenizer, or cannot read as many tokens.
    """

    def __init__(self, engine: Engine, max_length: int | None = None):
        model = engine.model
        if model.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer, which the texts of tasks need; use a checkpoint that has one"
            )
        most = most_tokens(engine) - 1
        if not 1 <= (max_length or most) <= most:
            raise ValueError(f"max_length must be 1 to {most}, the model's context, got {max_length}")
        self._engine, self._tokenizer = engine, model.tokenizer
        self.max_length, self._prefix = max_length or most, prefix_token(model)
        path = model.path
        self._bos = None if path is None else TokenizerSettings.read(path).text("bos_token")

    def loglikelihood(self, requests: Sequence[Instance], *_: Any, **__: Any) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether it is the greedy one.

        Args:
            requests: their arguments are a context and a continuation, both text.
        """
        return self._sums([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Instance], *_: Any, **__: Any) -> list[float]:
        """Returns the log-likelihood of each text, whose windows of `max_length` tokens do not overlap.

        Args:
            requests: their argument is a text.
        """
        pairs, counts = [], []
        for request in requests:
            tokens = self._tokenizer.encode(request.args[0], add_special_tokens=False).ids
            sequence = [self._prefix, *tokens]
            spans = windows(len(sequence), self.max_length, self.max_length)
            pairs += [(sequence[at.start : at.scored], sequence[at.scored : at.end]) for at in spans]
            counts.append(len(spans))
        sums = iter(self._sums(pairs))
        return [sum([next(sums)[0] for _ in range(count)]) for count in counts]

    def generate_until(self, requests: Sequence[Instance], *_: Any, **__: Any) -> list[str]:
        """Returns a text for each prompt, up to the first of its stop strings.

        Args:
            requests: their arguments are a prompt and settings: `until`, a number of new tokens, `do_sample`
                and those of `PASSED`.

        Raises:
            ValueError: for other settings, and for those out of range.
        """
        wanted = [self._request(*request.args) for request in requests]
        return self._engine.generate(wanted).texts if wanted else []

    def _sums(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        scored = score(self._engine, pairs)
        return [(sum(each.logprobs), all(each.greedy)) for each in scored]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the token ids of both, as they are in one text; as lm-eval's other models do."""
        if context:
            spaces = context[len(context.rstrip()) :]
            context, continuation = context[: len(context) - len(spaces)], spaces + continuation
        if context:
            before, whole = self.encode(context), self.encode(context + continuation)
            before, after = before, whole[len(before) :]
        else:
            before, after = [], self._tokenizer.encode(continuation, add_special_tokens=False).ids
        if not before:  # a continuation that begins with the prefix is not given another one
            before, after = (after[:1], after[1:]) if after[:1] == [self._prefix] else ([self._prefix], after)
        if len(after) > self.max_length:
            raise ValueError(
                f"a continuation must have at most {self.max_length} tokens, got {len(after)}; "
                "score long texts with loglikelihood_rolling"
            )
        if len(before) + len(after) > self.max_length + 1:
            logger.warning("a context of %d tokens is cut on the left", len(before))
            before = before[len(before) + len(after) - self.max_length - 1 :]
        return before, after

    def _request(self, prompt: str, settings: Mapping[str, Any]) -> Request:
        given = dict(settings)
        counts = [given.pop(name) for name in LENGTHS if given.get(name) is not None]
        until, samples = given.pop("until", None) or [], given.pop("do_sample", None)
        stops = [until] if isinstance(until, str) else list(until)
        passed = {name: given.pop(name) for name in PASSED if given.get(name) is not None}
        given = {name: value for name, value in given.items() if value is not None and name not in LENGTHS}
        if given:
            known = ", ".join(("until", "do_sample", *LENGTHS, *PASSED))
            raise ValueError(f"a task's settings must be among {known}, got {', '.join(given)}")
        if samples is False or "temperature" not in passed:
            passed["temperature"] = 1.0 if samples else 0.0
        count = int(counts[0]) if counts else MAX_NEW_TOKENS
        room = self._engine.model.config.max_position_embeddings - count
        if room < 1:
            raise ValueError(
                f"a task asks for {count} new tokens, but the model's context holds {room + count}; lower "
                f"its {LENGTHS[0]}"
            )
        tokens = self.encode(prompt) or [self._prefix]
        if len(tokens) > room:
            logger.warning("a prompt of %d tokens is cut on the left, to %d", len(tokens), room)
        return Request(
            prompt=tokens[-room:],
            max_new_tokens=count,
            stop=[stop for stop in stops if stop] or None,
            **passed,
        )

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text to read; a token that begins texts is not put before one itself."""
        again = self._bos is not None and text.startswith(self._bos)
        return self._tokenizer.encode(text, add_special_tokens=not again).ids

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as text, by the checkpoint's template."""
        with closing(Chat(self._engine.model.path)) as chat:
            request = Request(messages=list(chat_history), add_generation_prompt=add_generation_prompt)
            return chat.render(request)

    @property
    def tokenizer_name(self) -> str:
        """Name of the checkpoint, by which lm-eval tells requests apart that it keeps."""
        return str(self._engine.model.path)


def engine_of(pretrained: str, revision: str | None = None, **arguments: Any) -> Engine:
    """Returns an engine, from arguments as a command line has them.

    Args:
        pretrained: a checkpoint's folder or name on the hub.
        revision: branch, tag or commit of a checkpoint on the hub.
        **arguments: those of `OF_LOADING`, and of `OffloadConfig`.

    Raises:
        ValueError: for arguments of other names.
    """
    of_loading = {name: arguments.pop(name) for name in OF_LOADING if name in arguments}
    known, problems = OffloadConfig.__dataclass_fields__, Problems()
    for name in arguments.keys() - known.keys():
        problems.add(f"{name!r} must be one of the arguments of a model: {', '.join((*OF_LOADING, *known))}")
    problems.raise_any()
    config = OffloadConfig(**arguments)
    if config.host_budget is not None:
        of_loading.setdefault("experts", "disk")
    return Engine(load(pretrained, revision=revision, **of_loading), config, generation_config="none")
