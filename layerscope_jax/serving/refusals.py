"""Refusals: requests that are not answered, as OpenAI's API says it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from layerscope_jax.generation.openai_answers import error_body

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Types of errors by status; others below 500 are an "invalid_request_error"."""

JSON = (b"content-type", b"application/json")


class Refusal(Exception):
    """Raised to answer a request with an error.

    Args:
        status: status code of HTTP.
        message: what is wrong, and what to change.
        code: OpenAI's code of the error.
        headers: further headers of the answer.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """Returns the body of the answer.

        >>> json.loads(Refusal(404, "no such page").body())["error"]["type"]
        'not_found_error'
        """
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return json.dumps(error_body(self.message, kind, self.code)).encode()
