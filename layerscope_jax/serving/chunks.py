"""Answers: whole ones, and chunks of streams as server-sent events."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer

from layerscope_jax.generation.completions import Output, Token, TokenLogprobs, output_of
from layerscope_jax.generation.openai_answers import body_of, choice_of, logprobs_of, token_text, usage
from layerscope_jax.runtime.sampling import NO_TOKEN
from layerscope_jax.serving.bodies import Asked
from layerscope_jax.serving.tools import Calls

DONE = b"data: [DONE]\n\n"
"""Ends a stream."""


class Answer:
    """Writes the answer to one HTTP request.

    Args:
        asked: what the request asks for.
        identity: the answer's id.
        model: names what generates, for the answer.
        created: when, in seconds since 1970.
        tokenizer: tells the texts of tokens whose log-probabilities were asked for.
    """

    def __init__(self, asked: Asked, identity: str, model: str, created: int, tokenizer: Tokenizer | None):
        self._asked, self._tokenizer = asked, tokenizer
        self._identity, self._model, self._created = identity, model, created
        self._prompt_of = [number for number, request in enumerate(asked.requests) for _ in range(request.n)]
        self._begun: set[int] = set()  # choices of which something is sent
        self._calls: dict[int, Calls] = {}  # choice -> its calls of tools
        self._offsets: dict[int, int] = {}  # choice -> characters of its tokens so far
        head = body_of(identity, asked.chat, [], model, created)
        head["object"] = "chat.completion.chunk" if asked.chat else "text_completion"
        self._head = head | ({"usage": None} if asked.include_usage else {})

    def whole(self, events: Sequence[tuple[int, Token]], new_tokens: int, cached_tokens: int) -> bytes:
        """Returns the body of an answer that is not streamed.

        Args:
            events: every token of every choice, in order.
            new_tokens: number of tokens.
            cached_tokens: number of tokens of prompts that a prefix cache held.
        """
        requests = [request for request in self._asked.requests for _ in range(request.n)]
        own = by_choice(events)
        choices = []
        for choice, request in enumerate(requests):
            output = Output(**(output_of(own[choice], request) | {"index": choice}))
            ids = {"token_ids": self._new_ids(own[choice])} if self._asked.token_ids else {}
            if self._asked.echoed:
                output = self._with_prompt(output, choice)
            told = choice_of(output, self._asked.chat, self._tokenizer) | ids
            if ids and not self._asked.chat:
                told["prompt_token_ids"] = self._prompt_ids(choice)
            if self._asked.tools is not None:
                calls = Calls(self._asked.tools)
                told["message"] |= calls.message(output.text)
                told["finish_reason"] = calls.finish_reason(told["finish_reason"])
            choices.append(told)
        body = body_of(self._identity, self._asked.chat, choices, self._model, self._created)
        if self._asked.token_ids and self._asked.chat:
            body["prompt_token_ids"] = self._prompt_ids(0)
        counts = self._counts(new_tokens, cached_tokens)
        return json.dumps(body | {"usage": counts}).encode()

    def _prompt_ids(self, choice: int) -> list[int]:
        """Returns the token ids of a choice's prompt."""
        return [int(token) for token in self._asked.requests[self._prompt_of[choice]].prompt or ()]

    def _new_ids(self, tokens: Sequence[Token]) -> list[int]:
        """Returns the ids of tokens; of none if the answer ends after the prompt."""
        if self._asked.without_new:
            return []
        return [token.token_id for token in tokens if token.token_id != NO_TOKEN]

    def _with_prompt(self, output: Output, choice: int) -> Output:
        """Returns the parts of a choice that begins with its prompt."""
        told, new = [*(output.prompt_logprobs or ()), *(output.logprobs or ())], output.token_ids
        text, prompt = self._asked.echoed[self._prompt_of[choice]], self._prompt_ids(choice)
        if self._asked.without_new:
            told, new = told[: len(prompt)], []
        else:
            text += output.text
        logprobs = None if output.logprobs is None else told
        return replace(output, text=text, token_ids=[*prompt, *new], logprobs=logprobs)

    def events(self, news: Sequence[tuple[int, Token]]) -> bytes:
        """Returns the events of new tokens, one for each choice; of none that has nothing to tell."""
        return b"".join([self._event(choice, tokens) for choice, tokens in by_choice(news).items()])

    def usage(self, new_tokens: int, cached_tokens: int) -> bytes:
        """Returns the event with the counts of tokens, empty if the request does not ask for it."""
        if not self._asked.include_usage:
            return b""
        counts = self._counts(new_tokens, cached_tokens)
        return event(self._head | {"usage": counts})

    def _counts(self, new_tokens: int, cached_tokens: int) -> dict[str, Any]:
        new_tokens = 0 if self._asked.without_new else new_tokens
        return usage(self._asked.prompt_tokens, new_tokens, cached_tokens)

    def _event(self, choice: int, tokens: Sequence[Token]) -> bytes:
        text = "".join([token.text for token in tokens])
        last = tokens[-1]
        told: list[tuple[int, TokenLogprobs | None]] = [
            (token.token_id, token.logprobs) for token in tokens if token.logprobs is not None
        ]
        ids = self._new_ids(tokens) if self._asked.token_ids else []
        is_first = choice not in self._begun
        if self._asked.echoed and is_first:
            scored = list(zip(self._prompt_ids(choice), tokens[0].prompt_logprobs or (), strict=False))
            echoed = self._asked.echoed[self._prompt_of[choice]]
            text = echoed + ("" if self._asked.without_new else text)
            told = scored + ([] if self._asked.without_new else told)
        reason, delta = last.finish_reason, {"content": text} if text else {}
        if self._asked.tools is not None:
            calls = self._calls.setdefault(choice, Calls(self._asked.tools))
            delta = calls.delta(text, reason is not None)
            reason = calls.finish_reason(reason)
        if not (delta or told or ids) and reason is None:
            return b""
        content: dict[str, Any] = {"index": choice}
        head = self._head
        if self._asked.token_ids:
            content["token_ids"] = ids
            if is_first and not self._asked.chat:
                content["prompt_token_ids"] = self._prompt_ids(choice)
            elif not self._begun:
                head = head | {"prompt_token_ids": self._prompt_ids(choice)}
        if not self._asked.chat:
            content["text"] = text
        else:
            content["delta"] = ({"role": "assistant", "content": ""} if is_first else {}) | delta
        self._begun.add(choice)
        content["logprobs"] = self._logprobs(choice, told) if told else None
        content["finish_reason"] = reason
        if last.finish_reason is not None:
            content["stop_reason"] = last.stop_reason
        return event(head | {"choices": [content]})

    def _logprobs(self, choice: int, told: Sequence[tuple[int, TokenLogprobs | None]]) -> dict[str, Any]:
        ids = [token for token, _ in told]
        offset = self._offsets.get(choice, 0)
        if not self._asked.chat:
            self._offsets[choice] = offset + sum([len(token_text(self._tokenizer, token)) for token in ids])
        return logprobs_of(ids, [at for _, at in told], self._asked.chat, self._tokenizer, offset)


def by_choice(news: Sequence[tuple[int, Token]]) -> dict[int, list[Token]]:
    """Returns the tokens of each choice, in order."""
    tokens: dict[int, list[Token]] = {}
    for choice, token in news:
        tokens.setdefault(choice, []).append(token)
    return tokens


def event(content: Any) -> bytes:
    r"""Returns a server-sent event.

    >>> event({"a": 1})
    b'data: {"a": 1}\n\n'
    """
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def failure_of(events: Sequence[tuple[int, Token]]) -> str | None:
    """Returns why a sample ended with an error; None if none did."""
    return next((token.error for _, token in events if token.error is not None), None)


def is_aborted(events: Sequence[tuple[int, Token]]) -> bool:
    """Returns whether a sample was aborted."""
    return any(token.finish_reason == "abort" for _, token in events)
