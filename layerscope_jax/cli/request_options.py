"""Options of `layerscope generate` that are settings of its requests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import UseAppendAction

from layerscope_jax.cli.args import arg
from layerscope_jax.generation.prompt_files import said_by_user
from layerscope_jax.generation.requests import SETTINGS, Request
from layerscope_jax.support.files import read_json
from layerscope_jax.support.option_errors import option


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """Settings that apply to all prompts; a prompt of a file may have its own instead."""

    chat: Annotated[
        bool, arg(help="Each prompt is what a user says, and the model's chat template makes a prompt of it.")
    ] = False
    chat_template_kwargs: Annotated[
        str | None,
        arg(metavar="JSON", help="Variables of the chat template, such as '{\"enable_thinking\": false}'."),
    ] = None
    max_new_tokens: Annotated[
        int | None, arg(metavar="INT", help="Maximum new tokens for each prompt; 64 by default.")
    ] = None
    min_new_tokens: Annotated[
        int | None, arg(metavar="INT", help="New tokens before anything may stop the text; 0 by default.")
    ] = None
    n: Annotated[
        int | None, arg(metavar="INT", help="Samples of each prompt; 1 by default. More need a temperature.")
    ] = None
    temperature: Annotated[
        float | None,
        arg(metavar="FLOAT", help="Temperature of sampling; 0, the default, takes the likeliest token."),
    ] = None
    top_k: Annotated[
        int | None,
        arg(metavar="INT", help="Sample from this many of the likeliest tokens; 0, the default, for all."),
    ] = None
    top_p: Annotated[
        float | None,
        arg(
            metavar="FLOAT",
            help="Sample from the smallest set of likeliest tokens whose probabilities add up to this; 1 by "
            "default.",
        ),
    ] = None
    min_p: Annotated[
        float | None,
        arg(
            metavar="FLOAT",
            help="Sample from tokens at least this many times as likely as the likeliest; 0 by default.",
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        arg(
            metavar="FLOAT",
            help="Divides (or, if negative, multiplies) the logits of tokens that have occurred, in the "
            "prompt too; 1 by default.",
        ),
    ] = None
    presence_penalty: Annotated[
        float | None,
        arg(
            metavar="FLOAT", help="Subtracted from the logits of new tokens that have occurred; 0 by default."
        ),
    ] = None
    frequency_penalty: Annotated[
        float | None,
        arg(metavar="FLOAT", help="The same for each time that the token has occurred; 0 by default."),
    ] = None
    logit_bias: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="ID=BIAS", help="Added to the logit of a token; can be given several times."),
    ] = ()
    seed: Annotated[int | None, arg(metavar="INT", help="Seed of sampling; 0 by default.")] = None
    stop: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(
            metavar="TEXT", help="Text that ends a continuation, and is cut off; can be given several times."
        ),
    ] = ()
    include_stop_str_in_output: Annotated[bool, arg(help="Keep the text that ended a continuation.")] = False
    ignore_eos: Annotated[bool, arg(help="Go on after the model's own stop tokens.")] = False
    logprobs: Annotated[
        int | None,
        arg(
            metavar="INT",
            help="Write the log-probability of each new token, and those of this many of the likeliest, "
            "0 to 20, into the lines of completions.",
        ),
    ] = None
    prompt_logprobs: Annotated[
        int | None, arg(metavar="INT", help="The same for each token of the prompt but the first.")
    ] = None

    json_schema: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="A JSON schema: each continuation is JSON that it describes. Needs the extra `structured`.",
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Returns the settings that were given.

        Raises:
            ValueError: naming those that are out of range.
        """
        given = {name: getattr(self, name) for name in SETTINGS if hasattr(self, name)}
        given["ignore_eos"] = self.ignore_eos or None
        given["include_stop_str_in_output"] = self.include_stop_str_in_output or None
        given["stop"] = list(self.stop) or None
        given["logit_bias"] = dict(map(bias_of, self.logit_bias)) or None
        given["chat_template_kwargs"] = None
        with option("--json-schema"):
            given["json_schema"] = (
                None if self.json_schema is None else read_json(self.json_schema, "correct it")
            )
        found = {name: value for name, value in given.items() if value is not None}
        # `n` and `min_new_tokens` are checked with the temperature and the `max_new_tokens` of each row.
        alone = {"max_new_tokens": 2**31 - 1} | {name: found[name] for name in found if name != "n"}
        Request(prompt="", **alone)
        if self.chat_template_kwargs is not None:
            with option("--chat-template-kwargs"):
                found["chat_template_kwargs"] = variables_of(self.chat_template_kwargs)
        return found

    def request(self, prompt: str, settings: dict[str, Any]) -> Request:
        """Returns the request of a prompt that was given as an option."""
        if self.chat:
            return Request(messages=said_by_user(prompt), **settings)
        return Request(prompt=prompt, **settings)


def variables_of(text: str) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
        ValueError: if the text is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"expected a JSON object such as '{{\"enable_thinking\": false}}', got {text[:60]!r}"
        )
    return value


def bias_of(text: str) -> tuple[int, float]:
    """Returns a token id and its bias.

    >>> bias_of("50256=-100")
    (50256, -100.0)
    """
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise ValueError(f"--logit-bias must be ID=BIAS, such as 50256=-100, got {text[:60]!r}") from None
