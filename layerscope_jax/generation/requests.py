"""Requests: prompts, and how each is to be continued."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from layerscope_jax.generation.structured import grammar_of, problem_of
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.units import is_integer

MOST_LOGPROBS = 20
"""Most alternatives whose log-probabilities a request may ask for."""

MOST_SAMPLES = 1024
"""Most samples of one prompt."""

MOST_BIAS = 100.0
"""Largest bias of a token, as of OpenAI's API."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how it is to be continued; the settings are those of vLLM's `SamplingParams`.

    Logits are changed in this order: `logit_bias`, `repetition_penalty`, `frequency_penalty`,
    `presence_penalty`, `min_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`.

    Attributes:
        prompt: text, or token ids; None if there are `messages`.
        messages: a conversation `[{"role": ..., "content": ...}, ...]`, which the checkpoint's chat template
            turns into a prompt; None if there is a `prompt`.
        max_new_tokens: maximum number of new tokens; fewer if the model's context ends first.
        min_new_tokens: number of new tokens before a stop token may be chosen or a stop string ends the text.
        n: number of samples of the prompt, which is prefilled once for those that begin together; sample i
            draws with the seed `seed + i`.
        temperature: sampling temperature; 0 takes the likeliest token each time.
        top_k, top_p: restrict which tokens sampling chooses from; 0 or -1, and 1 for all tokens.
        min_p: restricts sampling to tokens at least this many times as likely as the likeliest one.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that are in the
            prompt or among the new ones; 1 for none.
        presence_penalty: subtracted from the logit of each token that is among the new ones.
        frequency_penalty: subtracted from the logit of each token as often as it is among the new ones.
        logit_bias: token id -> what is added to its logit, -100..100.
        seed: seed of the sampling, None for one drawn at random, which the `Completion` reports. The random
            draws depend only on it and the position, not on the other requests of the batch. Rounding does
            depend on the shape of the batch, so two runs in batches of different shapes may give different
            tokens, above all in bfloat16, except with `OffloadConfig(numerics="exact")`.
        stop: texts that end the request as soon as one of them is complete; cut off, unless
            `include_stop_str_in_output`. Special tokens have no text, unless `skip_special_tokens` is
            False.
        stop_token_ids: ids that end the request, kept as its last token; None for the model's own.
        ignore_eos: whether the model's own stop tokens do not end the request.
        skip_special_tokens: False for text that shows special tokens, but not the stop token at its end.
        logprobs: number of likeliest tokens, up to 20, whose log-probabilities are reported with that of each
            new token; of the model's own logits, before any of the settings. None for no log-probabilities.
        prompt_logprobs: the same for each token of the prompt but the first, which nothing comes before.
        json_schema: schema of the JSON text that the request makes, `{"type": "object"}` for any object; None
            for any text. Tokens that would leave it are not chosen, and the request ends with the text. It
            needs the extra `structured`.
        grammar: a grammar of the text in its place, as llguidance reads it (a dialect of Lark).
        add_generation_prompt: whether the template begins the assistant's answer after the `messages`.
        tools, documents: lists of objects that the template is given.
        chat_template_kwargs: further variables of the template, such as `{"enable_thinking": False}`.
    """

    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    max_new_tokens: int = 64
    min_new_tokens: int = 0
    n: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = 0
    stop: str | Sequence[str] | None = None
    include_stop_str_in_output: bool = False
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | None = None
    grammar: str | None = None
    add_generation_prompt: bool = True
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        problems = Problems()

        def check(name: str, fits: bool, expected: str) -> None:
            problems.expect(fits, name, expected, getattr(self, name))

        def check_number(name: str, low: float, high: float, expected: str = "") -> None:
            value = getattr(self, name)
            expected = expected or f"a number in {low:g}..{high:g}"
            check(name, is_number(value) and low <= value <= high, expected)

        def check_whole(name: str, low: int, high: int, none: bool = False, expected: str = "") -> None:
            value = getattr(self, name)
            expected = expected or f"a whole number in {low}..{high}"
            fits = is_integer(value) and low <= value <= high
            check(name, fits or (none and value is None), expected + " or None" * none)

        self._check_prompt(problems)
        check_whole("max_new_tokens", 1, 2**31 - 1, expected="a whole number in 1..2**31-1")
        check_whole("min_new_tokens", 0, 2**31 - 1, expected="a whole number, 0 or more")
        check_whole("n", 1, MOST_SAMPLES)
        check_number("temperature", 0, 1e6, "a number from 0 (greedy) to 1e6")
        check("top_k", is_integer(self.top_k) and self.top_k >= -1, "a whole number, 0 (all) or more, or -1")
        check("top_p", is_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]")
        check_number("min_p", 0, 1)
        check_number("repetition_penalty", 1e-6, 1e6, "a number from 1e-6 to 1e6, 1 for none")
        check_number("presence_penalty", -2, 2)
        check_number("frequency_penalty", -2, 2)
        check("logit_bias", is_bias(self.logit_bias), "token ids with numbers in -100..100, or None")
        check_whole("seed", 0, 2**32 - 1, none=True, expected="a whole number in 0..2**32-1")
        check("stop", are_stops(self.stop), "a text or a list of texts, none of them empty, or None")
        stops = self.stop_token_ids
        check("stop_token_ids", stops is None or are_ids(stops), "a list of token ids or None")
        check_whole("logprobs", 0, MOST_LOGPROBS, none=True)
        check_whole("prompt_logprobs", 0, MOST_LOGPROBS, none=True)
        for name in FLAGS:
            check(name, isinstance(getattr(self, name), bool), "True or False")
        self._check_structure(problems)
        if not problems.found:
            if self.min_new_tokens > self.max_new_tokens:
                problems.add(
                    f"min_new_tokens must be at most max_new_tokens, {self.max_new_tokens}, "
                    f"got {self.min_new_tokens}"
                )
            if self.n > 1 and not self.temperature:
                problems.add(
                    f"n must be 1 at temperature 0, where all samples are the same, got {self.n}; "
                    "set a temperature above 0"
                )
        problems.raise_any()

    def _check_prompt(self, problems: Problems) -> None:
        """Notes what is wrong with the prompt or the conversation."""
        prompt, messages = self.prompt, self.messages
        if messages is None:
            given = [name for name in CHAT if getattr(self, name) != DEFAULTS[name]]
            if given:
                problems.add(f"{', '.join(given)} cannot be given without messages, whose template reads it")
            fits = isinstance(prompt, str) or are_ids(prompt)
            problems.expect(fits, "prompt", "text or a list of token ids", prompt)
        elif prompt is not None:
            problems.add("expected either a prompt or messages, got both; leave one out")
        elif not (are_objects(messages) and messages and all(map(is_message, messages))):
            problems.expect(False, "messages", 'a list of {"role": ..., "content": ...}, not empty', messages)
        for name in ("tools", "documents"):
            value = getattr(self, name)
            problems.expect(value is None or are_objects(value), name, "a list of objects or None", value)
        extra = self.chat_template_kwargs
        fits = extra is None or (isinstance(extra, Mapping) and all(isinstance(name, str) for name in extra))
        problems.expect(fits, "chat_template_kwargs", "an object or None", extra)
        taken = [name for name in TEMPLATE_VARIABLES if fits and extra and name in extra]
        if taken:
            problems.add(f"chat_template_kwargs must not name {', '.join(taken)}, which the request sets")

    def _check_structure(self, problems: Problems) -> None:
        """Notes what is wrong with the schema or the grammar."""
        schema, grammar = self.json_schema, self.grammar
        fits = schema is None or isinstance(schema, Mapping)
        problems.expect(fits, "json_schema", "a JSON schema that is an object, or None", schema)
        fits = fits and (grammar is None or (isinstance(grammar, str) and is_text(grammar)))
        problems.expect(grammar is None or isinstance(grammar, str), "grammar", "a text or None", grammar)
        if schema is not None and grammar is not None:
            problems.add("expected either a json_schema or a grammar, got both; leave one out")
        elif fits and (schema is not None or grammar is not None):
            try:
                wrong = problem_of(self.structure or "")
            except ValueError as error:
                problems.add(str(error))
            else:
                name = "json_schema" if grammar is None else "grammar"
                problems.expect(
                    wrong is None, name, f"one that llguidance takes ({wrong})", schema or grammar
                )

    @property
    def structure(self) -> str | None:
        """The grammar of its text; None for any text."""
        return self.grammar if self.json_schema is None else grammar_of(self.json_schema)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "add_generation_prompt")
"""Settings that are True or False."""

TEMPLATE_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")
"""What a chat template is given of a request."""

CHAT = (*TEMPLATE_VARIABLES[1:], "chat_template_kwargs")
"""Settings of the chat template alone."""

DEFAULTS: dict[str, Any] = {
    setting.name: setting.default for setting in fields(Request) if setting.name not in ("prompt", "messages")
}
"""A request's settings by name, with their defaults."""

SETTINGS = tuple(DEFAULTS)
"""Names of a request's settings."""


def with_seed(request: Request) -> Request:
    """Returns a request that has a seed: its own, or one drawn at random."""
    return request if request.seed is not None else replace(request, seed=secrets.randbits(32))


def seed_of(seed: int, sample: int) -> int:
    """Returns the seed of one sample of a request; as of vLLM's samples.

    >>> seed_of(7, 0), seed_of(2**32 - 1, 2)
    (7, 1)
    """
    return (seed + sample) % 2**32


def is_number(value: Any) -> bool:
    return is_integer(value) or isinstance(value, float | np.floating)


def is_bias(value: Any) -> bool:
    """Returns whether a value is a bias for tokens, or None."""
    return value is None or (
        isinstance(value, Mapping)
        and all(is_integer(token) for token in value)
        and all(is_number(bias) and -MOST_BIAS <= bias <= MOST_BIAS for bias in value.values())
    )


def are_stops(value: Any) -> bool:
    """Returns whether a value is a stop string, several of them, or None."""
    if isinstance(value, str):
        return bool(value)
    return value is None or (is_list(value) and all(isinstance(text, str) and text for text in value))


def is_message(message: Mapping[str, Any]) -> bool:
    """Whether an object is a message: it has a role, and content or calls of tools.

    >>> is_message({"role": "user", "content": "Call me"}), is_message({"role": "user"})
    (True, False)
    """
    return "role" in message and ("content" in message or bool(message.get("tool_calls")))


def are_objects(value: Any) -> bool:
    """Returns whether a value is a list of mappings."""
    return is_list(value) and all(isinstance(item, Mapping) for item in value)


def are_ids(value: Any) -> bool:
    """Returns whether a value is a sequence of whole numbers that can be read more than once."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and (value.dtype.kind in "iu" or not value.size)
    if not is_list(value):
        return False
    try:
        return all(not isinstance(token, bool) and operator.index(token) is not None for token in value)
    except TypeError:  # a value is not a whole number
        return False


def is_list(value: Any) -> bool:
    """Returns whether a value is an ordered collection that can be read more than once; a text is not."""
    if isinstance(value, str | bytes | bytearray | Mapping | Set):
        return False
    return isinstance(value, Sized) and isinstance(value, Iterable)  # an array of JAX 0.9 is no Collection


def is_text(value: str) -> bool:
    """Returns whether a text holds only characters, and no half of a surrogate pair (as of a wrong byte)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
