"""Bodies of HTTP requests: from bytes to requests whose prompts are token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.generation.chat import Chat
from layerscope_jax.generation.encoding import encode_prompts
from layerscope_jax.generation.openai_requests import CHAT_URL, TEXT_URL, body_request
from layerscope_jax.generation.prompt_files import parsed
from layerscope_jax.generation.requests import CHAT, DEFAULTS, Request, are_ids, is_list, with_seed
from layerscope_jax.generation.structured import Structures
from layerscope_jax.serving.refusals import Refusal
from layerscope_jax.serving.tools import Tools, tools_of
from layerscope_jax.support.checks import Problems

STREAM_KEYS = ("stream", "stream_options")


@dataclass(frozen=True)
class Asked:
    """What a body asks for.

    Attributes:
        chat: whether it is a chat's.
        requests: one for each prompt, with token ids for a prompt and a seed.
        stream: whether tokens are to be sent as they come.
        include_usage: whether a stream ends with the counts of tokens.
        tools: how calls of tools in the answers are read; None if they are to stay text.
        echoed: texts of the prompts, with which the answers begin; empty if they do not.
        without_new: whether the answers end after the prompts, so that new tokens are left out.
        token_ids: whether the ids of prompts and new tokens are told.
    """

    chat: bool
    requests: Sequence[Request]
    stream: bool = False
    include_usage: bool = False
    tools: Tools | None = None
    echoed: Sequence[str] = ()
    without_new: bool = False
    token_ids: bool = False

    @property
    def samples(self) -> int:
        """Number of samples of all prompts together."""
        return sum([request.n for request in self.requests])

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of all prompts together."""
        return sum([len(request.prompt or ()) for request in self.requests])


class Reader:
    """Reads bodies; several threads may use it.

    Args:
        model: the model that answers.
        name: what clients call it.
        chat: makes prompts of conversations.
        defaults: settings for what a body leaves out, used instead of OpenAI's defaults.
        max_model_len: most tokens of a prompt and its answer; None for the model's context.
        most_samples: most samples of a body.
        structures: compiles the grammars of requests, which may take a while.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        chat: Chat,
        defaults: Mapping[str, Any],
        max_model_len: int | None,
        most_samples: int,
        structures: Structures,
    ):
        self._model, self._name, self._chat, self._defaults = model, name, chat, defaults
        context = model.config.max_position_embeddings
        self._length, self._most = min(max_model_len or context, context), most_samples
        self._structures = structures

    def read(self, body: bytes, url: str) -> Asked:
        """Returns what a body asks for.

        Raises:
            ValueError: saying all that is wrong with it.
            Refusal: if it asks for another model.
        """
        content = parsed(body, "a JSON object")
        if not isinstance(content, dict):
            raise ValueError(f"the body must be a JSON object, got {repr(content)[:60]}")
        named = content.get("model")
        if named not in (None, self._name):
            raise unknown_model(named, self._name)
        problems = Problems()
        stream, include_usage = _streaming(content, problems)
        body_of_one = {key: value for key, value in content.items() if key not in STREAM_KEYS}
        token_ids = _switch(body_of_one, "return_token_ids", problems)
        echo = url == TEXT_URL and _switch(body_of_one, "echo", problems)
        without_new = echo and _is_zero(content.get("max_tokens"))
        if without_new:
            body_of_one["max_tokens"] = 1
        tools = None
        if url == CHAT_URL:
            tools = tools_of(content, self._chat, self._model.tokenizer, problems)
            if body_of_one.pop("tool_choice", None) == "none":
                body_of_one.pop("tools", None)
        requests = [
            body_request(body_of_one | prompt, url, problems, defaults=self._defaults)
            for prompt in _prompts(content, url)
        ]
        Problems.raise_any(_without_repeats(problems))
        made = [request for request in requests if request is not None]
        samples = sum([request.n for request in made])
        if samples > self._most:
            raise ValueError(
                f"the prompts' samples must be at most {self._most} in all, which run and wait at once, got "
                f"{samples}; send them in several requests"
            )
        if tools is not None:
            made = [with_tools(request, tools) for request in made]
        if echo:
            made = [replace(request, prompt_logprobs=request.logprobs) for request in made]
        encoded = self._encoded(made)
        texts = [self._text(*pair) for pair in zip(made, encoded, strict=True)] if echo else []
        return Asked(url == CHAT_URL, encoded, stream, include_usage, tools, texts, without_new, token_ids)

    def _text(self, request: Request, encoded: Request) -> str:
        """Returns the text of a prompt."""
        if isinstance(request.prompt, str):
            return request.prompt
        tokenizer = self._model.tokenizer
        return "" if tokenizer is None else tokenizer.decode([int(token) for token in encoded.prompt or ()])

    def _encoded(self, requests: Sequence[Request]) -> list[Request]:
        """Returns requests with token ids for prompts, and room for no more new tokens than fit."""
        vocabulary = self._model.config.vocab_size
        try:
            prompts = encode_prompts(requests, self._model.tokenizer, self._length, vocabulary, self._chat)
        except ValueError as error:
            if len(requests) > 1:
                raise
            raise ValueError(str(error).replace("prompt 0", "the prompt")) from None
        plain = {name: DEFAULTS[name] for name in CHAT}
        found = []
        for request, ids in zip(requests, prompts, strict=True):
            self._structures.guide(request.structure)
            room = min(request.max_new_tokens, self._length - len(ids))
            least = min(request.min_new_tokens, room)
            found.append(
                with_seed(
                    replace(
                        request,
                        prompt=ids,
                        messages=None,
                        max_new_tokens=room,
                        min_new_tokens=least,
                        **plain,
                    )
                )
            )
        return found


def unknown_model(named: object, served: str) -> Refusal:
    """Returns the refusal of a request for another model than the one that is served."""
    return Refusal(404, f"no model {str(named)[:100]!r} is served, only {served!r}", code="model_not_found")


def _streaming(content: Mapping[str, Any], problems: Problems) -> tuple[bool, bool]:
    """Returns whether tokens are to be streamed, and whether with their counts at the end."""
    stream, options = content.get("stream"), content.get("stream_options")
    problems.expect(stream is None or isinstance(stream, bool), "stream", "true or false", stream)
    if options is None:
        return stream is True, False
    if stream is not True:
        problems.add("stream_options must be left out unless stream is true")
    known = isinstance(options, dict) and options.keys() <= {"include_usage"}
    counts = options.get("include_usage", False) if known else False
    fits = known and isinstance(counts, bool)
    problems.expect(fits, "stream_options", '{"include_usage": true or false}', options)
    return stream is True, counts is True


def with_tools(request: Request, tools: Tools) -> Request:
    """Returns a request whose text shows the marks of calls, and is a call if it has to be one.

    Raises:
        ValueError: if it has to be JSON as well, or llguidance is not installed.
    """
    shown = request.skip_special_tokens and not tools.special
    return replace(request, skip_special_tokens=shown, grammar=tools.grammar or request.grammar)


def _switch(body: dict[str, Any], name: str, problems: Problems) -> bool:
    """Removes a key that is true or false from a body, and returns it; False if it is left out or null."""
    value = body.pop(name, None)
    problems.expect(value is None or isinstance(value, bool), name, "true or false", value)
    return value is True


def _is_zero(value: object) -> bool:
    return value == 0 and not isinstance(value, bool)


def _prompts(content: Mapping[str, Any], url: str) -> list[dict[str, Any]]:
    """Returns each prompt of a body as a body has it; a body for texts may have a list of them."""
    prompt: Any = content.get("prompt")
    if url == CHAT_URL or not is_list(prompt) or not len(prompt) or are_ids(prompt):
        return [{}]
    return [{"prompt": part} for part in prompt]


def _without_repeats(problems: Problems) -> Problems:
    """Returns problems once each: a setting that is wrong is so for every prompt."""
    once = Problems()
    once.add(*dict.fromkeys(problems.found))
    return once
