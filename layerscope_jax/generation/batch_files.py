"""Files of completions, with one complete JSON object per line.

A run can continue a file of completions: prompts that are in it are not completed again, and an unfinished
last line, which a killed run may leave, is removed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from layerscope_jax.generation import openai_answers
from layerscope_jax.generation.completions import Output
from layerscope_jax.generation.prompt_files import Row
from layerscope_jax.generation.requests import CHAT, DEFAULTS, Request
from layerscope_jax.support.locks import locked

NO_JSON = (json.JSONDecodeError, UnicodeDecodeError)


def completion(row: Row, outputs: Sequence[Output], model: str) -> bytes:
    """Returns the line for a completed row; `model` names what generated it.

    >>> row = Row(3, Request(prompt="a", seed=5), "")
    >>> output = Output(text="b", token_ids=[7], finish_reason="length", seed=5)
    >>> line = json.loads(completion(row, [output], "1b06093c6a5c"))
    >>> line["text"], line["token_ids"], line["settings"]["seed"], line["model"]
    ('b', [7], 5, '1b06093c6a5c')
    """
    contents = [_content(row.request, output) for output in outputs]
    content = contents[0] if row.request.n == 1 else {"completions": contents}
    return _line(row, model, content | {"settings": _settings(row.request), "model": model})


def openai_line(row: Row, model: str, response: dict[str, Any]) -> bytes:
    """Returns the line of OpenAI's batch API for a row; `response` is its answer."""
    return _line(row, model, {"response": response, "error": None})


def _line(row: Row, model: str, content: dict[str, Any]) -> bytes:
    return _head(row, model) + b", " + json.dumps(content, ensure_ascii=False).encode()[1:] + b"\n"


def _content(request: Request, output: Output) -> dict[str, Any]:
    """Returns what a line says of one continuation."""
    content: dict[str, Any] = {} if request.n == 1 else {"index": output.index}
    content |= {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
    }
    if output.stop_reason is not None:
        content["stop_reason"] = output.stop_reason
    if request.seed is None:
        content["seed"] = output.seed
    if output.logprobs is not None:
        content["logprobs"] = [{"logprob": token.logprob, "top": token.top} for token in output.logprobs]
        content["cumulative_logprob"] = output.cumulative_logprob
    if output.prompt_logprobs is not None:
        content["prompt_logprobs"] = [
            None if token is None else {"logprob": token.logprob, "top": token.top}
            for token in output.prompt_logprobs
        ]
    if output.error is not None:
        content["error"] = output.error
    return content


def _settings(request: Request) -> dict[str, Any]:
    """Returns a request's settings as JSON has them; those of the template only if they were given."""
    names = [name for name in DEFAULTS if name not in CHAT or getattr(request, name) != DEFAULTS[name]]
    return json.loads(json.dumps({name: getattr(request, name) for name in names}, default=_plain))


def _plain(value: Any) -> Any:
    """Returns what JSON has for a mapping, a sequence or a number of another type."""
    if hasattr(value, "items"):
        return dict(value.items())
    return value.item() if hasattr(value, "item") and not getattr(value, "ndim", 0) else list(value)


def _head(row: Row, model: str) -> bytes:
    """Returns the beginning of a row's line."""
    request = row.request
    head: dict[str, Any]
    if row.call is not None:
        head = {"id": row.call.answer_id(model), "custom_id": row.call.custom_id}
    elif request.messages is not None:
        head = {"id": row.id, "messages": request.messages}
    else:
        head = {"id": row.id, "prompt": request.prompt}
    return json.dumps(head, ensure_ascii=False, default=_plain).encode()[:-1]


def digest_of(rows: Iterable[Row], model: str) -> str:
    """Returns hexadecimal digits for prompts with their settings, and for what generates."""
    digest = hashlib.blake2b(model.encode(), digest_size=8)
    for row in rows:
        digest.update(_head(row, model) + json.dumps(_settings(row.request), sort_keys=True).encode())
    return digest.hexdigest()


def shown(line: bytes) -> str:
    """Returns the beginning of a line, for messages."""
    return repr(line[:60].decode(errors="replace"))


class CompletionFile:
    """File to which completions are appended; a context manager.

    Opening it fails at once if it cannot be written, and removes an unfinished last line. No other run can
    open it before the context is left. A file that was created but never written to is removed. A row that
    ended with an error counts as done: the same checkpoint and settings would give the same error again.

    Args:
        file: the file; created if it does not exist, but its folder must exist.
        rows: the prompts that it must belong to, with their settings.
        model: name of what generates, as `completion` takes it.

    Attributes:
        done: ids of the rows that the file holds already.
        failed: those of them that ended with an error.

    Raises:
        ValueError: if the file cannot be written, another run is writing it, or it holds anything but
            completions of `rows` by `model`.
    """

    def __init__(self, file: Path, rows: Iterable[Row], model: str):
        self.path, self.model = file, model
        self.done: set[str | int] = set()
        self.failed: set[str | int] = set()
        with ExitStack() as stack:
            if not file.is_dir():
                stack.enter_context(locked(file))
            self._made = not file.exists()
            try:
                self._file = stack.enter_context(file.open("ab", buffering=0))
            except OSError as error:
                raise ValueError(
                    f"cannot write to {file}: {error.strerror}; choose a file in an existing folder that you "
                    "may write to"
                ) from None
            stack.callback(self._drop_if_unused)
            self._rows = {row.id: row for row in rows}
            if file.is_file():  # otherwise a device, which holds no earlier lines
                self._resume(self._rows)
            self._open = stack.pop_all()

    def __enter__(self) -> CompletionFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, line: bytes) -> None:
        """Appends one line, completely or not at all.

        Raises:
            OSError: if writing fails, for example because the disk is full.
        """
        before = os.fstat(self._file.fileno()).st_size
        left = line
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            with suppress(OSError):  # a device cannot be cut; the next run cuts off what is left of a line
                self._file.truncate(before)
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def in_order(self) -> Iterator[bytes]:
        """Yields the lines in the order of the rows; those of rows that are not complete are left out."""
        spans: dict[str | int, tuple[int, int]] = {}
        with self.path.open("rb") as lines:
            start = 0
            for line in lines:
                spans[self._known(json.loads(line), self._rows)[0].id] = start, len(line)
                start += len(line)
            for name in self._rows:
                if name in spans:
                    lines.seek(spans[name][0])
                    yield lines.read(spans[name][1])

    def _drop_if_unused(self) -> None:
        if self._made and not os.fstat(self._file.fileno()).st_size:
            with suppress(OSError):  # Windows removes no open file
                self.path.unlink()

    def _resume(self, rows: dict[str | int, Row]) -> None:
        number, torn = 0, b""
        with self.path.open("rb") as lines:  # one at a time: of a large job they are more than memory
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    torn = line
                    break
                self._note(number, line.removesuffix(b"\n"), rows)
        if not torn:
            return
        # The last line is removed only if it may be the beginning of one of these prompts' lines: otherwise
        # the file may be something else.
        heads = [_head(row, self.model) for row in rows.values()]
        if not any(head.startswith(torn) or torn.startswith(head) for head in heads):
            raise ValueError(
                f"{self.path}:{number}: expected the beginning of a completion of one of these "
                f"prompts, got {shown(torn)}; the file belongs to other prompts: choose another file"
            )
        self._file.truncate(self._file.seek(0, os.SEEK_END) - len(torn))

    def _note(self, number: int, line: bytes, rows: dict[str | int, Row]) -> None:
        """Notes the row that a complete line is of.

        Raises:
            ValueError: if it is of none, naming the line.
        """
        try:
            known, failed = self._known(json.loads(line), rows)
        except (LookupError, TypeError, AttributeError, RecursionError, *NO_JSON):
            raise ValueError(
                f"{self.path}:{number}: expected a completion of one of these prompts, got {shown(line)}; "
                "the file belongs to other prompts: choose another file"
            ) from None
        except ValueError as error:
            raise ValueError(
                f"{self.path}:{number}: expected a completion by this checkpoint with these settings, got "
                f"{error}; use those of the file, or choose another file"
            ) from None
        self.done.add(known.id)
        if failed:
            self.failed.add(known.id)

    def _known(self, found: dict[str, Any], rows: dict[str | int, Row]) -> tuple[Row, bool]:
        """Returns the row that a line completes, and whether it ended with an error.

        Raises:
            LookupError, TypeError: if it is a line of no row.
            ValueError: naming what has changed since.
        """
        if "response" in found:
            answered = rows.get(found["custom_id"]) or self._nameless(found["id"], rows)
            if answered is None or answered.call is None:
                raise LookupError
            if found["id"] != answered.call.answer_id(self.model):
                raise ValueError("an answer to another request, or by another checkpoint")
            return answered, found["response"]["status_code"] != openai_answers.OK
        known = rows[found["id"]]
        head = json.loads(_head(known, self.model) + b"}")
        outputs = found.get("completions", [found])
        if any(found[key] != value for key, value in head.items()) or not outputs:
            raise LookupError
        for output in outputs:
            if {"text", "token_ids", "finish_reason"} - output.keys():
                raise LookupError
        now = {**_settings(known.request), "model": self.model}
        was = {**{name: DEFAULTS[name] for name in now if name in DEFAULTS}, **found["settings"]}
        was["model"] = found["model"]
        names = {**now, **was}
        changed = [
            f"{key} {was.get(key)} (now {now.get(key)})" for key in names if was.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(", ".join(changed))
        return known, any(output["finish_reason"] == "error" for output in outputs)

    def _nameless(self, answer_id: str, rows: dict[str | int, Row]) -> Row | None:
        """Returns the row without a `custom_id` that has this answer; None for none."""
        rest = (row for row in rows.values() if row.call is not None and row.call.custom_id is None)
        return next((row for row in rest if row.call and row.call.answer_id(self.model) == answer_id), None)
