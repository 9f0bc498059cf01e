"""Chat templates: from a conversation to a prompt, by the Jinja template of the checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from layerscope_jax.checkpoints.tokenizer_settings import ADDED, CONFIG, SPECIAL
from layerscope_jax.generation import template_worker
from layerscope_jax.generation.requests import TEMPLATE_VARIABLES, Request, is_text
from layerscope_jax.support.files import is_there, read_json

PATIENCE_S = 10.0
"""How long (seconds) a template may take."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which conversations hold a message's reasoning; templates read the first two."""


class Chat:
    """The chat templates of a checkpoint, rendered in a process of their own that starts with the first one.

    Several threads may use it.

    Args:
        folder: of the checkpoint; None for none.
        template: Jinja text that is used instead of the checkpoint's own templates.
    """

    def __init__(self, folder: Path | None, template: str | None = None):
        self._folder, self._override = folder, template
        self._templates: dict[str, str] | None = None
        self._tokens: dict[str, str] = {}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(self, request: Request) -> str:
        """Returns the prompt for a request's messages.

        Raises:
            ValueError: if there is no template, or it is no template, or it raises, takes longer than 10
                seconds, or needs more memory than a conversation does.
        """
        assert request.messages is not None
        template = self.template(bool(request.tools))
        with self._lock:
            variables = {name: getattr(request, name) for name in TEMPLATE_VARIABLES}
            variables["messages"] = [as_templates_read(message) for message in request.messages]
            variables = {**self._tokens, **variables, **(request.chat_template_kwargs or {})}
            try:
                line = json.dumps({"template": template, "variables": variables})
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"messages must hold only values that JSON can express; {error}") from None
            answer = self._asked(line)
        if "error" in answer:
            raise ValueError(f"the chat template gives no prompt: {answer['error'][:300]}")
        if not is_text(answer["text"]):
            raise ValueError(
                "the conversation holds half a surrogate pair, which is not a character; remove it"
            )
        return answer["text"]

    def template(self, tools: bool) -> str:
        """Returns the template for a request, with or without tools.

        Raises:
            ValueError: if there is none, or it cannot be read.
        """
        with self._lock:
            if self._templates is None:
                self._templates, self._tokens = self._read()
            return chosen(self._templates, tools)

    def digest(self) -> str:
        """Returns eight hexadecimal digits for the templates and the tokens that they are given."""
        content = json.dumps(self._read(), sort_keys=True)
        return hashlib.blake2b(content.encode(errors="replace"), digest_size=4).hexdigest()

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _asked(self, line: str) -> Any:
        """Returns the process's answer to a line; starts the process if there is none."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-P", template_worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for this process, which ends that one
            )
            weakref.finalize(self, _end_if_ours, self._process, os.getpid())
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(PATIENCE_S, process.kill)
        try:
            watch.start()
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
                said = process.stdout.readline()
            except BrokenPipeError:
                said = ""
            if said.endswith("\n"):
                return json.loads(said)
            code = process.wait()
            if self._process is not process:
                raise ValueError("the engine was closed; make a new Engine to generate more")
            self.close()
        except BaseException:
            self.close()  # an answer that nobody has read is no answer to the next line
            raise
        finally:
            watch.cancel()
        late = code == (-signal.SIGKILL if hasattr(signal, "SIGKILL") else 1)  # 1 on Windows
        return {"error": f"it takes longer than {PATIENCE_S:g} s" if late else "it needs too much memory"}

    def _read(self) -> tuple[dict[str, str], dict[str, str]]:
        """Returns the templates by name, and the special tokens that they are given."""
        settings: dict[str, Any] = {}
        if self._folder is not None and is_there(self._folder / CONFIG):
            settings = read_json(self._folder / CONFIG)
        special = settings
        if self._folder is not None and settings.get(ADDED) is None and is_there(self._folder / SPECIAL):
            # As in transformers: the older file counts, and rather, where there is no list of added tokens.
            special = settings | read_json(self._folder / SPECIAL)
        tokens = {name: content_of(token) for name, token in special.items() if name.endswith("_token")}
        known = {name: token for name, token in tokens.items() if token is not None}
        if self._override is not None:
            return {"default": self._override}, known
        found = named(settings.get("chat_template"))
        files = {} if self._folder is None else files_of(self._folder)
        # As in transformers: files replace what the settings hold, all of it.
        return files or found, known


def chosen(templates: Mapping[str, str], tools: bool) -> str:
    """Returns the template for a request: "tool_use" if there are tools, else "default".

    Raises:
        ValueError: if there is none.
    """
    if tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    got = f"only {', '.join(map(repr, sorted(templates)))}" if templates else "none"
    raise ValueError(
        f"expected the checkpoint to have a chat template, found {got}; "
        "give a prompt instead of messages, or a chat template (--chat-template FILE)"
    )


def named(value: Any) -> dict[str, str]:
    """Returns the templates in `tokenizer_config.json`: a text, or a list of named ones.

    >>> named("{{ x }}"), named([{"name": "tool_use", "template": "{{ y }}"}])
    ({'default': '{{ x }}'}, {'tool_use': '{{ y }}'})
    """
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        found = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError, IndexError):
        found = {"": None}
    if not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise ValueError(
            "tokenizer_config.json: expected a chat_template that is a text or a list of "
            f'{{"name": ..., "template": ...}}, got {repr(value)[:60]}'
        )
    return found


def files_of(folder: Path) -> dict[str, str]:
    """Returns the templates of a checkpoint that are files of their own, by name."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if is_there(folder / "chat_template.jinja"):
        files["default"] = folder / "chat_template.jinja"
    return {name: read_template(path) for name, path in files.items()}


def read_template(file: Path) -> str:
    """Returns the text of a template.

    Raises:
        ValueError: if the file cannot be read or is not text.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{file}: expected a chat template, got {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file}: expected a chat template in UTF-8, got other bytes") from None


def content_of(token: Any) -> str | None:
    """Returns the text of a special token in `tokenizer_config.json`, which may be an object that has it."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def as_templates_read(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message without keys that are null, and its reasoning under the names that templates read.

    As transformers does: a template may print "None" for a null.

    >>> as_templates_read({"role": "assistant", "content": None, "reasoning": "so"})
    {'thinking': 'so', 'role': 'assistant', 'reasoning': 'so', 'reasoning_content': 'so'}
    """
    found = {key: value for key, value in message.items() if value is not None}
    reasoning = next((found[name] for name in REASONING if name in found), None)
    if reasoning is None:
        return found
    return {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _end_if_ours(process: subprocess.Popen[str], owner: int) -> None:
    """Ends a process that the process `owner` has started, unless this is a fork of that."""
    if os.getpid() == owner:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process, and closes its pipes; may be called again."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # of what was not written yet
            if pipe is not None:
                pipe.close()
    process.wait()
