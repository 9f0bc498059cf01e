"""Answers of OpenAI's API: what is generated for a request, as the API says it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from layerscope_jax.generation.completions import Output, TokenLogprobs
from layerscope_jax.generation.openai_requests import OpenAICall

OK, REFUSED, FAILED = 200, 400, 500
"""Status codes."""


def refused(call: OpenAICall, model: str, message: str, status: int = REFUSED) -> dict[str, Any]:
    """Returns the response to a request that is not answered.

    >>> refused(OpenAICall("a", "/v1/completions"), "m", "no prompt")["body"]["error"]["message"]
    'no prompt'
    """
    kind = "invalid_request_error" if status == REFUSED else "server_error"
    return _response(call, model, status, error_body(message, kind))


def answer(
    call: OpenAICall, outputs: Sequence[Output], model: str, prompt_tokens: int, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Returns the response to a request.

    Args:
        call: the request.
        outputs: its samples.
        model: names what generated them.
        prompt_tokens: number of tokens of its prompt.
        tokenizer: tells the texts of tokens whose log-probabilities were asked for.
    """
    failed = next((output.error for output in outputs if output.error is not None), None)
    if failed is not None:
        return refused(call, model, failed, FAILED)
    identity = call.answer_id(model).replace("batch_req", "chatcmpl" if call.is_chat else "cmpl")
    choices = [choice_of(output, call.is_chat, tokenizer) for output in outputs]
    body = body_of(identity, call.is_chat, choices, model, int(time.time()))
    body["usage"] = usage(prompt_tokens, sum([len(output.token_ids) for output in outputs]))
    return _response(call, model, OK, body)


def body_of(
    identity: str, chat: bool, choices: Sequence[dict[str, Any]], model: str, created: int
) -> dict[str, Any]:
    """Returns the body of an answer, without its usage.

    Args:
        identity: the answer's id.
        chat: whether it answers a chat.
        choices: from `choice_of`.
        model: names what generated them.
        created: when, in seconds since 1970.
    """
    kind = "chat.completion" if chat else "text_completion"
    return {"id": identity, "object": kind, "created": created, "model": model, "choices": list(choices)}


def usage(prompt_tokens: int, new_tokens: int, cached_tokens: int | None = None) -> dict[str, Any]:
    """Returns the counts of tokens that an answer reports; `cached_tokens` are those of a prefix cache.

    >>> usage(5, 2)["total_tokens"], usage(5, 2, 4)["prompt_tokens_details"]
    (7, {'cached_tokens': 4})
    """
    counts: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }
    if cached_tokens is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return counts


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """Returns the body of an answer that says what is wrong."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _response(call: OpenAICall, model: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    identity = call.answer_id(model).replace("batch_req", "req")
    return {"status_code": status, "request_id": identity, "body": body}


def choice_of(output: Output, chat: bool, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns the choice that a sample makes, numbered as the sample is."""
    choice: dict[str, Any] = {"index": output.index}
    if chat:
        choice["message"] = {"role": "assistant", "content": output.text, "refusal": None}
    else:
        choice["text"] = output.text
    told = output.logprobs
    return choice | {
        "logprobs": None if told is None else logprobs_of(output.token_ids, told, chat, tokenizer),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def logprobs_of(
    ids: Sequence[int],
    told: Sequence[TokenLogprobs | None],
    chat: bool,
    tokenizer: Tokenizer | None,
    offset: int = 0,
) -> dict[str, Any]:
    """Returns the log-probabilities of tokens; `offset` is how many characters of tokens precede them.

    Those of a text may begin with its prompt, whose first token has none.
    """
    if chat:
        return _of_chat(ids, [at for at in told if at is not None], tokenizer)
    return _of_text(ids, told, tokenizer, offset)


def _of_chat(
    ids: Sequence[int], told: Sequence[TokenLogprobs], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Returns the log-probabilities of a chat's answer."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            {**entry(token, at.logprob), "top_logprobs": [entry(*likely) for likely in at.top]}
            for token, at in zip(ids, told, strict=True)
        ]
    }


def _of_text(
    ids: Sequence[int], told: Sequence[TokenLogprobs | None], tokenizer: Tokenizer | None, offset: int
) -> dict[str, Any]:
    """Returns the log-probabilities of a text's continuation."""
    texts = [token_text(tokenizer, token) for token in ids]
    offsets = [offset]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [None if at is None else at.logprob for at in told],
        "top_logprobs": [
            None if at is None else {token_text(tokenizer, token): logprob for token, logprob in at.top}
            for at in told
        ],
        "text_offset": offsets[:-1],
    }


def token_text(tokenizer: Tokenizer | None, token: int) -> str:
    """Returns the text of a token alone; its id as "token_id:7" if there is none, as in vLLM."""
    text = "" if tokenizer is None else tokenizer.decode([token], skip_special_tokens=False)
    return text or f"token_id:{token}"
