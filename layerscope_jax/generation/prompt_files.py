"""Files of prompts, with one complete JSON object per line: plain ones, or requests of OpenAI's batch API."""

from __future__ import annotations

import codecs
import difflib
import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from layerscope_jax.generation.arguments import NO_SETTINGS
from layerscope_jax.generation.chat import Chat
from layerscope_jax.generation.encoding import encode_prompts
from layerscope_jax.generation.openai_requests import OpenAICall, is_openai, translated
from layerscope_jax.generation.requests import CHAT, DEFAULTS, SETTINGS, Request, is_text
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.support.units import is_integer

NOTES = "metadata"
"""Key of the user's own notes in a row, which are not read."""

KEYS = ("id", "prompt", "messages", *SETTINGS, NOTES)


@dataclass(frozen=True)
class Row:
    """One prompt of a file of prompts.

    Attributes:
        id: identifies the prompt; unique in the file.
        request: the prompt and its settings.
        where: file and line that it comes from, for messages.
        call: what a line of OpenAI's batch API says beside; None for other lines.
    """

    id: str | int
    request: Request
    where: str
    call: OpenAICall | None = None


def read_prompts(
    file: Path,
    options: dict[str, Any],
    chat: bool = False,
    defaults: Mapping[str, Any] = NO_SETTINGS,
) -> list[Row]:
    """Reads prompts from a file of lines `{"prompt": text or [token ids], "id": ..., "temperature": ...}`.

    Instead of a prompt a line may have "messages", or be a request of OpenAI's batch API
    (`layerscope_jax.generation.openai_requests`). The id of a row defaults to the row's number, counted from
    0. "metadata" may hold anything and is ignored. Other keys than these and the settings of `Request` are
    refused.

    Args:
        file: the file; blank lines are skipped.
        options: settings of `Request` that apply to all rows.
        chat: whether a prompt that is text is a conversation of one message, by the user.
        defaults: settings of rows that neither a row nor `options` gives.

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

    def records() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{file}:{number}"
                try:
                    yield where, parsed(line)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None

    rows = rows_of(records(), options, chat, defaults)
    if not rows:
        raise ValueError(f'{file}: expected lines {{"prompt": ...}}, got none; add a prompt')
    return rows


def rows_of(
    records: Iterable[tuple[str, Any]],
    options: dict[str, Any],
    chat: bool = False,
    defaults: Mapping[str, Any] = NO_SETTINGS,
) -> list[Row]:
    """Returns the rows of some records, each with where it comes from, for messages.

    Args:
        records: JSON objects as lines of a file of prompts hold them.
        options, chat, defaults: as of `read_prompts`.

    Raises:
        ValueError: as `read_prompts`.

    >>> rows_of([("a.jsonl:1", {"prompt": "Call me"}), ("a.jsonl:2", {"prompt": "x", "id": 0})], {})
    Traceback (most recent call last):
    ValueError: a.jsonl:2: id 0 is used by a.jsonl:1 already; make the ids differ
    """
    rows: list[Row] = []
    seen: dict[str | int, str] = {}
    for where, content in records:
        try:
            row = _row(content, len(rows), options, where, chat, defaults)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if row.id in seen:
            raise ValueError(f"{where}: id {row.id!r} is used by {seen[row.id]} already; make the ids differ")
        seen[row.id] = where
        rows.append(row)
    return rows


def _row(
    content: Any,
    number: int,
    options: dict[str, Any],
    where: str,
    chat: bool,
    defaults: Mapping[str, Any],
) -> Row:
    if not isinstance(content, dict):
        raise ValueError(f'expected a JSON object {{"prompt": ...}}, got {json.dumps(content)[:60]}')
    if is_openai(content):
        request, call = translated(content, options, defaults)
        return Row(number if call.custom_id is None else call.custom_id, request, where, call)
    name = content.get("id", number)
    if not (isinstance(name, str) or is_integer(name)):
        raise ValueError(f"expected an id that is a string or an integer, got {json.dumps(name)[:60]}")
    if "prompt" not in content and "messages" not in content:
        raise ValueError("expected a prompt that is text or a list of token ids, got none")
    for key, value in (("id", name), ("prompt", content.get("prompt"))):
        if isinstance(value, str) and not is_text(value):
            raise ValueError(
                f"the {key} holds half a surrogate pair (\\ud800 to \\udfff), which is not a character; "
                "remove it"
            )
    settings = {**defaults, **options}
    for key, value in content.items():
        if key in options and options[key] != value:
            raise ValueError(
                f"{key} is {shortened(value)} in the row and {options[key]} for all rows "
                f"(--{key.replace('_', '-')}); set it in only one of the two places"
            )
        if key in SETTINGS:
            settings[key] = with_ids(value) if key == "logit_bias" else value
        elif key not in KEYS:
            begun = [known for known in KEYS if len(key) > 2 and known.startswith(key)]
            near = begun or difflib.get_close_matches(key, KEYS, 1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(KEYS)}."
            raise ValueError(f"unknown key {shortened(key)}; {hint} Put notes of your own under {NOTES!r}")
    given = {key: content[key] for key in ("prompt", "messages") if key in content}
    if given.get("prompt", "") is None:
        raise ValueError("prompt must be text or a list of token ids, got None")
    if chat and "messages" not in given:
        given = {"messages": said_by_user(given["prompt"])}
    return Row(name, Request(**given, **settings), where)


def with_ids(bias: Any) -> Any:
    """Returns the `logit_bias` of a JSON object, whose keys are texts, with token ids as keys.

    >>> with_ids({"5": 1.5})
    {5: 1.5}
    """
    if not isinstance(bias, dict):
        return bias
    return {int(key) if key.isascii() and key.isdecimal() else key: value for key, value in bias.items()}


def said_by_user(prompt: Any) -> list[dict[str, str]]:
    """Returns the conversation of one message that a prompt makes.

    Raises:
        ValueError: if the prompt is not text.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be text with --chat, got {shortened(prompt)}; or give messages")
    return [{"role": "user", "content": prompt}]


def parsed(line: bytes, expected: str = 'a JSON object {"prompt": ...}') -> Any:
    """Returns the value of a line of JSON, or of another text; `expected` is for messages.

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
        raise ValueError(f"expected {expected}, got {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected text in UTF-8, got byte 0x{line[error.start]:02x} at {error.start}"
        ) from None
    except RecursionError:
        raise ValueError(f"expected {expected}, got one nested too deeply") from None


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


class Encoding(Protocol):
    """What a model's prompts are encoded by: a `Model` has it, and so has a checkpoint that is not loaded."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...


def encode_row(row: Row, model: Encoding, chat: Chat) -> Request:
    """Returns a row's request with the token ids of its prompt.

    Raises:
        ValueError: naming the line, if its prompt is empty, too long or outside the vocabulary, or `chat`
            makes no prompt of its messages.
    """
    config = model.config
    try:
        [ids] = encode_prompts(
            [row.request], model.tokenizer, config.max_position_embeddings, config.vocab_size, chat
        )
    except ValueError as error:
        raise ValueError(f"{row.where}: {str(error).replace('prompt 0', 'the prompt')}") from None
    plain = {name: DEFAULTS[name] for name in CHAT}
    return replace(row.request, prompt=ids, messages=None, **plain)
