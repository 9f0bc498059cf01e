"""Files of prompts and of completions, with one complete JSON object per line.

A run can continue a file of completions: prompts that are in it are not completed again, and an unfinished
last line, which a killed run may leave, is removed.
"""

from __future__ import annotations

import codecs
import difflib
import errno
import json
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.generation.encoding import encode_prompts
from layerscope_jax.generation.requests import SETTINGS, Request, is_integer, is_text
from layerscope_jax.support.locks import locked

NOTES = "metadata"
"""Key of the user's own notes in a row, which are not read."""

KEYS = ("id", "prompt", *SETTINGS, NOTES)


@dataclass(frozen=True)
class Row:
    """One prompt of a file of prompts.

    Attributes:
        id: identifies the prompt; unique in the file.
        request: the prompt and its settings.
        where: file and line that it comes from, for messages.
    """

    id: str | int
    request: Request
    where: str


def read_prompts(file: Path, options: dict[str, Any]) -> list[Row]:
    """Reads prompts from a file of lines `{"prompt": text or [token ids], "id": ..., "temperature": ...}`.

    The id of a row defaults to the row's number, counted from 0. "metadata" may hold anything and is ignored.
    Other keys than "id", "prompt", "metadata" and the settings of `Request` are refused.

    Args:
        file: the file; blank lines are skipped.
        options: settings of `Request` that apply to all rows.

    Raises:
        ValueError: naming the wrong line and what was expected; also if a setting of a row differs from the
            one in `options`.
    """
    try:
        content = read_whole(file).removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ValueError(f"{file}: expected a file of prompts, got {error.strerror}") from None
    lines = content.split(b"\n")  # not splitlines(): a text may hold U+2028 and its like
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in lines[0]:
        raise ValueError(f"{file}:1: expected text in UTF-8, got UTF-16 or binary; save the file as UTF-8")
    rows: list[Row] = []
    seen: dict[str | int, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = _row(parsed(line), len(rows), options, where)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if row.id in seen:
            raise ValueError(f"{where}: id {row.id!r} is used by {seen[row.id]} already; make the ids differ")
        seen[row.id] = where
        rows.append(row)
    if not rows:
        raise ValueError(f'{file}: expected lines {{"prompt": ...}}, got none; add a prompt')
    return rows


def _row(content: Any, number: int, options: dict[str, Any], where: str) -> Row:
    if not isinstance(content, dict):
        raise ValueError(f'expected a JSON object {{"prompt": ...}}, got {json.dumps(content)[:60]}')
    name = content.get("id", number)
    if not (isinstance(name, str) or is_integer(name)):
        raise ValueError(f"expected an id that is a string or an integer, got {json.dumps(name)[:60]}")
    if "prompt" not in content:
        raise ValueError("expected a prompt that is text or a list of token ids, got none")
    prompt: Any = content["prompt"]
    for key, value in (("id", name), ("prompt", prompt)):
        if isinstance(value, str) and not is_text(value):
            raise ValueError(
                f"the {key} holds half a surrogate pair (\\ud800 to \\udfff), which is not a character; "
                "remove it"
            )
    settings = dict(options)
    for key, value in content.items():
        if key in options and options[key] != value:
            raise ValueError(
                f"{key} is {shortened(value)} in the row and {options[key]} for all rows "
                f"(--{key.replace('_', '-')}); set it in only one of the two places"
            )
        if key in SETTINGS:
            settings[key] = value
        elif key not in KEYS:
            begun = [known for known in KEYS if len(key) > 2 and known.startswith(key)]
            near = begun or difflib.get_close_matches(key, KEYS, 1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(KEYS)}."
            raise ValueError(f"unknown key {shortened(key)}; {hint} Put notes of your own under {NOTES!r}")
    return Row(name, Request(prompt=prompt, **settings), where)


def parsed(line: bytes) -> Any:
    """Returns the value of a line of JSON.

    Raises:
        ValueError: if the line is not standard JSON in UTF-8; NaN, infinity and repeated keys are refused.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"expected JSON, which has no {name}; leave the key out, or give a number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            raise ValueError(f"expected each key once, got {shortened(twice)} twice; remove one")
        return found

    try:
        return json.loads(line.decode(), parse_constant=refuse, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f'expected a JSON object {{"prompt": ...}}, got {error}') from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected text in UTF-8, got byte 0x{line[error.start]:02x} at {error.start}"
        ) from None
    except RecursionError:
        raise ValueError('expected a JSON object {"prompt": ...}, got one nested too deeply') from None


def read_whole(file: Path) -> bytes:
    """Returns the content of a file, or of a pipe that a process writes to.

    Raises:
        OSError: if it cannot be read, or is a pipe without a writer, on which reading would block forever.
    """
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(file, os.O_RDONLY | flags), "rb") as opened:
        if stat.S_ISDIR(os.fstat(opened.fileno()).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISFIFO(os.fstat(opened.fileno()).st_mode):
            return opened.read()
        os.set_blocking(opened.fileno(), True)
        if content := opened.read():
            return content
    raise OSError(errno.EPIPE, "a pipe without a writer")


def shortened(value: Any) -> str:
    """Returns the beginning of a value's repr, for messages."""
    return repr(value)[:60]


def check_prompts(rows: Iterable[Row], model: Model) -> None:
    """Refuses prompts that `model` cannot take.

    Raises:
        ValueError: naming the first line whose prompt is empty, too long or outside the vocabulary.
    """
    config = model.config
    for row in rows:
        try:
            encode_prompts([row.request], model.tokenizer, config.max_position_embeddings, config.vocab_size)
        except ValueError as error:
            raise ValueError(f"{row.where}: {str(error).replace('prompt 0', 'the prompt')}") from None


def completion(
    row: Row, text: str, tokens: Sequence[int], finish: str, model: str, error: str | None = None
) -> bytes:
    """Returns the line for a completed row; `model` names what generated it, `error` what went wrong, if any.

    >>> row = Row(3, Request(prompt="a", seed=5), "")
    >>> line = json.loads(completion(row, "b", [7], "length", "1b06093c6a5c"))
    >>> line["text"], line["token_ids"], line["settings"]["seed"], line["model"]
    ('b', [7], 5, '1b06093c6a5c')
    """
    content = {
        "text": text,
        "token_ids": list(tokens),
        "finish_reason": finish,
        "settings": _settings(row.request),
        "model": model,
    }
    content |= {} if error is None else {"error": error}
    return _head(row) + b", " + json.dumps(content, ensure_ascii=False).encode()[1:] + b"\n"


def _settings(request: Request) -> dict[str, Any]:
    found = {name: getattr(request, name) for name in SETTINGS}
    return found | {
        "stop_token_ids": None if request.stop_token_ids is None else list(request.stop_token_ids)
    }


def _head(row: Row) -> bytes:
    """Returns the beginning of a row's line."""
    prompt = row.request.prompt if isinstance(row.request.prompt, str) else list(row.request.prompt)
    return json.dumps({"id": row.id, "prompt": prompt}, ensure_ascii=False).encode()[:-1]


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
            if file.is_file():  # otherwise a device, which holds no earlier lines
                self._resume({row.id: row for row in rows})
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

    def _drop_if_unused(self) -> None:
        if self._made and not os.fstat(self._file.fileno()).st_size:
            with suppress(OSError):  # Windows removes no open file
                self.path.unlink()

    def _resume(self, rows: dict[str | int, Row]) -> None:
        *lines, torn = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                found = json.loads(line)
                known = rows[found["id"]]
                prompt = known.request.prompt
                same = found["prompt"] == (prompt if isinstance(prompt, str) else list(prompt))
                if not same or {"text", "token_ids", "finish_reason"} - found.keys():
                    raise ValueError
                was = {**found["settings"], "model": found["model"]}
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(
                    f"{self.path}:{number}: expected a completion of one of these prompts, got "
                    f"{shown(line)}; the file belongs to other prompts: choose another file"
                ) from None
            now = {**_settings(known.request), "model": self.model}
            changed = [f"{key} {was.get(key)} (now {now[key]})" for key in now if was.get(key) != now[key]]
            if changed:
                raise ValueError(
                    f"{self.path}:{number}: expected a completion by this checkpoint with these settings, "
                    f"got {', '.join(changed)}; use those of the file, or choose another file"
                )
            self.done.add(known.id)
            if found["finish_reason"] == "error":
                self.failed.add(known.id)
        if not torn:
            return
        # The last line is removed only if it may be the beginning of one of these prompts' lines: otherwise
        # the file may be something else.
        heads = [_head(row) for row in rows.values()]
        if not any(head.startswith(torn) or torn.startswith(head) for head in heads):
            raise ValueError(
                f"{self.path}:{len(lines) + 1}: expected the beginning of a completion of one of these "
                f"prompts, got {shown(torn)}; the file belongs to other prompts: choose another file"
            )
        self._file.truncate(self._file.seek(0, os.SEEK_END) - len(torn))
