"""Requests of OpenAI's API translated to `Request`s: bodies, and the lines of its batch files.

A line is `{"custom_id": ..., "method": "POST", "url": ..., "body": {...}}`, with the URL for chats or for
texts. Bodies may have the keys that vLLM adds to the API (`top_k`, `min_p`, `repetition_penalty`, ...).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layerscope_jax.generation.arguments import NO_SETTINGS
from layerscope_jax.generation.requests import Request, are_ids, is_text
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.units import is_integer

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"

LENGTHS = {CHAT_URL: 1024, TEXT_URL: 16}
"""`max_new_tokens` of a body that says none: the API's own for texts. By the API a chat may take all that the
context holds, but the caches of a whole context are too large for a default."""

SAME = (
    "n",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "include_stop_str_in_output",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
)
"""Keys that are settings of `Request`."""

RENAMED = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
}

OF_CHATS = ("messages", "tools", "documents", "add_generation_prompt", "chat_template_kwargs")

WITHOUT_EFFECT = (
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
)
"""Keys that change no token."""

ONLY: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "return_token_ids": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
}
"""Keys with the values that are taken; others ask for what is not implemented."""


@dataclass(frozen=True)
class OpenAICall:
    """What a line of OpenAI's batch API says beside the settings of its request.

    Attributes:
        custom_id: the line's own name; None if it has none, which is refused.
        url: the endpoint.
        model: the model that the body names; None for none.
        refusal: why the line is refused; None if it is not.
        digest: names the line's content and the settings of all lines.
    """

    custom_id: str | None
    url: str
    model: str | None = None
    refusal: str | None = None
    digest: str = field(default="", repr=False)

    def answer_id(self, model: str) -> str:
        """Returns the id of the line's answer: the same for the same line, settings and checkpoint."""
        return f"batch_req_{hashlib.sha256(f'{self.digest} {model}'.encode()).hexdigest()[:24]}"

    @property
    def is_chat(self) -> bool:
        return self.url == CHAT_URL


def is_openai(content: Mapping[str, Any]) -> bool:
    """Returns whether a line of JSON is a request of OpenAI's batch API."""
    return "custom_id" in content or ("url" in content and "body" in content)


def translated(
    content: Mapping[str, Any],
    options: Mapping[str, Any],
    defaults: Mapping[str, Any] = NO_SETTINGS,
) -> tuple[Request, OpenAICall]:
    """Returns the request of a line, and what else the line says; an empty request if the line is refused.

    Args:
        content: the line.
        options: settings of `Request` for all lines.
        defaults: settings that neither the line nor `options` gives, in the place of OpenAI's own.

    Raises:
        ValueError: if a setting of the line differs from the one in `options`.
    """
    custom_id, url, body = (content.get(key) for key in ("custom_id", "url", "body"))
    problems = Problems()
    named = isinstance(custom_id, str) and is_text(custom_id)
    problems.expect(named, "custom_id", "a text", custom_id)
    problems.expect(content.get("method", "POST") == "POST", "method", "POST", content.get("method"))
    known = url if isinstance(url, str) and url in LENGTHS else None
    problems.expect(known is not None, "url", f"{CHAT_URL} or {TEXT_URL}", url)
    problems.expect(isinstance(body, dict), "body", "an object", body)
    unknown = [key for key in content if key not in ("custom_id", "method", "url", "body")]
    problems.add(*[f"unknown key {key[:60]!r}" for key in unknown])
    request = Request(prompt="")
    if known is not None and isinstance(body, dict) and not problems.found:
        request = body_request(body, known, problems, options, defaults) or request
    model = body.get("model") if isinstance(body, dict) else None
    text = json.dumps([content, dict(options), dict(defaults)], sort_keys=True, default=str)
    return request, OpenAICall(
        custom_id=custom_id if named else None,
        url=known or TEXT_URL,
        model=model if isinstance(model, str) else None,
        refusal="; ".join(problems.found) or None,
        digest=hashlib.sha256(text.encode()).hexdigest(),
    )


def body_request(
    body: Mapping[str, Any],
    url: str,
    problems: Problems,
    options: Mapping[str, Any] = NO_SETTINGS,
    defaults: Mapping[str, Any] = NO_SETTINGS,
) -> Request | None:
    """Returns the request of a body; None if it is refused, and `problems` then says why.

    Args:
        body: the body, without `stream` and its options.
        url: `CHAT_URL` or `TEXT_URL`.
        problems: collects what is wrong.
        options, defaults: as of `translated`.

    Raises:
        ValueError: if a setting of the body differs from the one in `options`.
    """
    fields = _fields(body, url, problems)
    for name, value in options.items():
        if fields.get(name, value) != value:
            raise ValueError(
                f"{name} is {fields[name]!r} in the line and {value} for all lines "
                f"(--{name.replace('_', '-')}); set it in only one of the two places"
            )
    if problems.found:
        return None
    of_api = {"temperature": 1.0, "seed": None, "max_new_tokens": LENGTHS[url]}
    try:
        return Request(**{**of_api, **defaults, **options, **fields})
    except ValueError as error:
        said = str(error)
        for name, ours in RENAMED.items():  # the user knows a setting by the name that the body has
            said = said.replace(ours, name) if name in body else said
        problems.add(said)
        return None


def _fields(body: Mapping[str, Any], url: str, problems: Problems) -> dict[str, Any]:
    """Returns the fields of a `Request` that a body sets; a null sets nothing."""
    body = {key: value for key, value in body.items() if value is not None}
    chat = url == CHAT_URL
    fields: dict[str, Any] = {}
    variables: dict[str, Any] = {}
    for key, value in body.items():
        if key in SAME or (chat and key in OF_CHATS):
            fields[key] = value
        elif key in RENAMED:
            fields[RENAMED[key]] = value
        elif key in ONLY:
            expected = " or ".join(map(json.dumps, ONLY[key])) or "left out"
            problems.expect(value in ONLY[key], key, expected, value)
        elif key == "response_format":
            _add_format(value, fields, problems)
        elif key == "reasoning_effort" and chat:
            variables["reasoning_effort"] = value
        elif key not in ("prompt", "logprobs", "top_logprobs", *WITHOUT_EFFECT) or (key == "prompt" and chat):
            problems.add(f"unknown key {key[:60]!r} of the body")
    if variables:
        given = fields.get("chat_template_kwargs", {})
        fields["chat_template_kwargs"] = variables | given if isinstance(given, dict) else given
    if isinstance(fields.get("logit_bias"), dict):
        bias = fields["logit_bias"]
        fields["logit_bias"] = {int(key) if key.isdecimal() else key: value for key, value in bias.items()}
    _add_logprobs(body, chat, fields, problems)
    if isinstance(messages := fields.get("messages"), list):
        fields["messages"] = [_with_objects(_with_text(message, problems)) for message in messages]
    if chat:
        problems.expect("messages" in fields, "messages", "a conversation", None)
        return fields
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not are_ids(prompt):
        prompt = prompt[0]
    if isinstance(prompt, str) and not is_text(prompt):
        problems.add("the prompt holds half a surrogate pair, which is not a character")
    fits = isinstance(prompt, str) or are_ids(prompt)
    problems.expect(fits, "prompt", "text or a list of token ids; one prompt a line", prompt)
    return fields | {"prompt": prompt}


def _add_format(value: Any, fields: dict[str, Any], problems: Problems) -> None:
    """Adds the `json_schema` that a `response_format` asks for."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "json_object":
        fields["json_schema"] = {"type": "object"}
    elif kind == "json_schema":
        named = value.get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else None
        fits = isinstance(schema, dict)
        problems.expect(fits, "response_format.json_schema", '{"name": ..., "schema": {...}}', named)
        fields["json_schema"] = schema
    elif kind != "text":
        expected = 'an object of type "text", "json_object" or "json_schema"'
        problems.expect(False, "response_format", expected, value)


def _with_text(message: Any, problems: Problems) -> Any:
    """Returns a message whose content is text, where it is a list of parts that are texts.

    As in vLLM, each begins a line: most chat templates take no parts.
    """
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list):
        return message
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    fits = len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
    problems.expect(fits, "content", 'text, or a list of {"type": "text", "text": ...}', parts)
    return message | {"content": "\n".join(map(str, texts))}


def _with_objects(message: Any) -> Any:
    """Returns a message whose calls have objects for arguments: the API has JSON text, templates do not."""
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def _add_logprobs(body: Mapping[str, Any], chat: bool, fields: dict[str, Any], problems: Problems) -> None:
    """Adds `logprobs`: a number for texts, a switch and `top_logprobs` for chats."""
    asked, top = body.get("logprobs"), body.get("top_logprobs")
    if not chat:
        problems.expect(top is None, "top_logprobs", "left out for a text, where logprobs is a number", top)
        if asked is not None:
            fields["logprobs"] = asked
        return
    problems.expect(asked is None or isinstance(asked, bool), "logprobs", "true or false", asked)
    problems.expect(top is None or is_integer(top), "top_logprobs", "a whole number", top)
    problems.expect(top is None or asked is True, "logprobs", "true where there are top_logprobs", asked)
    if asked is True:
        fields["logprobs"] = top or 0
