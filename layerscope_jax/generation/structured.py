"""Structured output: which tokens keep a text within a JSON schema or a grammar, computed by llguidance.

llguidance is optional (the extra `structured`). A grammar is compiled once for all requests that have it;
each sample then has a state of its own, which its tokens advance.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from layerscope_jax.checkpoints.model import Model

KEPT = 256
"""Number of compiled grammars that are kept for later requests."""

MOST_CHARACTERS = 65_536
"""Longest schema. The time to compile one grows with the square of its properties: seconds from there on."""

WHITESPACE = r"[ \n\t]{1,32}"
"""Space between two parts of JSON, where there is any. Without a limit, models may write spaces for ever."""

END = "<|end of what a grammar describes|>"
"""Stands for the end in the vocabulary of a model that has no stop token, which cannot choose it."""


def library() -> ModuleType:
    """Returns llguidance.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import llguidance
    except ModuleNotFoundError:
        raise ValueError(
            "output by a json_schema or a grammar needs llguidance, which is not installed: "
            "pip install 'layerscope-jax[structured]'"
        ) from None
    return llguidance


def grammar_of(schema: Mapping[str, Any]) -> str:
    """Returns the grammar of the JSON texts that a schema describes.

    Raises:
        ValueError: if the schema is too long, holds what JSON cannot express, or llguidance is missing.
    """
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json_schema must hold only values that JSON can express; {error}") from None
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"json_schema must have at most {MOST_CHARACTERS:,} characters, got {len(text):,}; shorten it"
        )
    matcher = library().LLMatcher
    return matcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})


@lru_cache(KEPT)
def problem_of(grammar: str) -> str | None:
    """Returns what is wrong with a grammar; None if nothing is."""
    is_error, said = library().LLMatcher.validate_grammar_with_warnings(grammar)
    return said[0].strip() if is_error else None


class Guide:
    """Where a sample is in its grammar.

    The state follows the sample's tokens. Given tokens that do not continue those before, as after a failed
    step, it starts over from the beginning.

    Args:
        compiled: the compiled grammar, at its beginning.
    """

    def __init__(self, compiled: Any):
        self._compiled = compiled
        self._matcher: Any = None  # None: to be made anew, as after an interrupt
        self._seen: list[int] = []

    def allow(self, tokens: Sequence[int], bits: np.ndarray) -> None:
        """Sets the bits [W] int32 of the tokens that may follow; none if the grammar became too complex."""
        matcher = self._after(tokens)
        size = 4 * len(bits)
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            mask = b""
        bits[:] = np.frombuffer(mask[:size].ljust(size, b"\0"), np.int32)

    def is_complete(self, tokens: Sequence[int]) -> bool:
        """Returns whether nothing but an end may follow."""
        matcher = self._after(tokens)
        return matcher.is_stopped() and not matcher.is_error()

    def error(self) -> str | None:
        """Returns why no token may follow; None if one may."""
        if self._matcher is None or not self._matcher.is_error():
            return None
        return f"the grammar of the output cannot be followed any further: {self._matcher.get_error()[:200]}"

    def _after(self, tokens: Sequence[int]) -> Any:
        """Returns the state after some tokens."""
        count = len(self._seen)
        if self._matcher is None or self._seen != tokens[:count]:
            self._matcher, self._seen, count = self._compiled.deep_copy(), [], 0
        if len(tokens) > count:
            matcher, self._matcher = self._matcher, None
            matcher.consume_tokens(list(tokens[count:]))
            self._seen, self._matcher = list(tokens), matcher
        return self._matcher


class Structures:
    """Compiles the grammars of one model's requests; several threads may use it.

    Args:
        tokenizer: the model's; None for a model without text.
        vocab_size: number V of the model's logits.
        stop_token_ids: ids that may end a text that is complete.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, stop_token_ids: Sequence[int]):
        self._tokenizer, self._ends = tokenizer, list(stop_token_ids)
        self._size = vocab_size
        self._tokens: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()  # the latest last
        self._lock, self._making = threading.Lock(), threading.Lock()

    @classmethod
    def of(cls, model: Model) -> Structures:
        """Returns what compiles the grammars of a model's requests."""
        return cls(model.tokenizer, model.config.vocab_size, model.config.stop_token_ids)

    def guide(self, grammar: str | None) -> Guide | None:
        """Returns the state of a sample before its first token; None for no grammar.

        Raises:
            ValueError: if the grammar cannot be compiled, or the model has no tokenizer.
        """
        if grammar is None:
            return None
        with self._lock:
            compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compile(grammar)  # without the lock: others get what is compiled already
        with self._lock:
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return Guide(compiled)

    def _compile(self, grammar: str) -> Any:
        if self._tokenizer is None:
            raise ValueError("output by a json_schema or a grammar needs a tokenizer, and the model has none")
        with self._making:
            if self._tokens is None:
                self._tokens = self._made(self._tokenizer)
        limits = library().LLParserLimits(verbose_errors=False)
        compiled = library().LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        first = compiled.deep_copy()
        if not first.is_error():  # of a grammar that is too complex, the first choice may show it
            first.consume_tokens(first.compute_ff_tokens())
            first.compute_bitmask()
        if first.is_error():
            raise ValueError(f"the json_schema or grammar cannot be followed: {first.get_error()[:300]}")
        return compiled

    def _made(self, tokenizer: Tokenizer) -> Any:
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ends = [token for token in self._ends if tokenizer.id_to_token(token) is not None]
        if not ends:
            tokenizer.add_special_tokens([END])
            ends = [tokenizer.get_vocab()[END]]
        size = max(self._size, *[token + 1 for token in tokenizer.get_vocab().values()])
        return library().LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=ends)
