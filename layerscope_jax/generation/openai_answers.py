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
    error = {"message": message, "type": kind, "param": None, "code": None}
    return _response(call, model, status, {"error": error})


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
    new = sum([len(output.token_ids) for output in outputs])
    body = {
        "id": call.answer_id(model).replace("batch_req", "chatcmpl" if call.is_chat else "cmpl"),
        "object": "chat.completion" if call.is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(call, output, tokenizer) for output in outputs],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new,
            "total_tokens": prompt_tokens + new,
        },
    }
    return _response(call, model, OK, body)


def _response(call: OpenAICall, model: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    identity = call.answer_id(model).replace("batch_req", "req")
    return {"status_code": status, "request_id": identity, "body": body}


def _choice(call: OpenAICall, output: Output, tokenizer: Tokenizer | None) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": output.index}
    if call.is_chat:
        choice["message"] = {"role": "assistant", "content": output.text, "refusal": None}
    else:
        choice["text"] = output.text
    told = output.logprobs
    logprobs = None
    if told is not None:
        logprobs = (_of_chat if call.is_chat else _of_text)(output.token_ids, told, tokenizer)
    return choice | {
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


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
    ids: Sequence[int], told: Sequence[TokenLogprobs], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Returns the log-probabilities of a text's continuation."""
    texts = [token_text(tokenizer, token) for token in ids]
    offsets = [0]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [at.logprob for at in told],
        "top_logprobs": [{token_text(tokenizer, token): logprob for token, logprob in at.top} for at in told],
        "text_offset": offsets[:-1],
    }


def token_text(tokenizer: Tokenizer | None, token: int) -> str:
    """Returns the text of a token alone; its id as "token_id:7" if there is none, as in vLLM."""
    text = "" if tokenizer is None else tokenizer.decode([token], skip_special_tokens=False)
    return text or f"token_id:{token}"
