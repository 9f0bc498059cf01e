"""Lines of completions, written to a file or to standard output as rows are complete."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from layerscope_jax.checkpoints.fingerprint import fingerprint
from layerscope_jax.formats import format_named
from layerscope_jax.generation import openai_answers
from layerscope_jax.generation.batch_files import completion, openai_line
from layerscope_jax.generation.chat import Chat
from layerscope_jax.generation.completions import Output
from layerscope_jax.generation.openai_requests import OpenAICall
from layerscope_jax.generation.prompt_files import Encoding, Row, encode_row
from layerscope_jax.generation.requests import Request
from layerscope_jax.support.exits import say


def model_name(
    folder: Path,
    dtype: str | None,
    expert_format: str | None,
    dense_format: str | None,
    template: Chat | None,
) -> str:
    """Returns what generates, for lines: a checkpoint's fingerprint, what it is converted to, its template.

    Args:
        folder: the checkpoint.
        dtype, expert_format, dense_format: as of `load`; None for the checkpoint's own.
        template: makes prompts of conversations; None if there are none.
    """
    name = fingerprint(folder) + (f" as {dtype}" if dtype else "")
    if expert_format is not None:
        name += f" with experts in {format_named(expert_format).name}"
    if dense_format is not None:
        name += f" with dense layers in {dense_format}"
    return name if template is None else f"{name} with chat template {template.digest()}"


class Writes(Protocol):
    """What takes lines: a `CompletionFile`, or what brings them there."""

    def write(self, line: bytes) -> None: ...


class Lines:
    """Writes the lines of rows.

    Args:
        model: names what generates, in the lines.
        tokenizer: tells the texts of tokens in answers of OpenAI's batch API.
        file: where the lines go; None for standard output.
        kept: whether lines are kept, and not written.

    Attributes:
        kept: the lines that were kept.
        refused: number of requests of OpenAI's batch API that were refused.
    """

    def __init__(self, model: str, tokenizer: Tokenizer | None, file: Writes | None, kept: bool = False):
        self._model, self._tokenizer, self._file = model, tokenizer, file
        self._keeps, self.kept = kept, list[dict[str, Any]]()
        self._prompt_tokens: dict[str | int, int] = {}
        self.refused = 0

    def encode(self, rows: Sequence[Row], model: Encoding, chat: Chat) -> list[tuple[Row, Request]]:
        """Returns the rows with their requests, whose prompts are token ids.

        A request of OpenAI's batch API that cannot be encoded gets a line that says why, and is left out.

        Raises:
            ValueError: naming the first other row that cannot be encoded.
        """
        found, refusals = [], []
        for row in rows:
            try:
                if row.call is not None and row.call.refusal is not None:
                    raise ValueError(row.call.refusal)
                request = encode_row(row, model, chat)
            except ValueError as error:
                if row.call is None:
                    raise
                refusals.append((row, row.call, str(error).removeprefix(f"{row.where}: ")))
                continue
            found.append((row, request))
            if row.call is not None:
                assert request.prompt is not None
                self._prompt_tokens[row.id] = len(request.prompt)
        for refusal in refusals:
            self._refuse(*refusal)
        return found

    def _refuse(self, row: Row, call: OpenAICall, message: str) -> None:
        say(f"{row.where}: refused: {message}")
        self.refused += 1
        self._write(openai_line(row, self._model, openai_answers.refused(call, self._model, message)))

    def write(self, row: Row, outputs: Sequence[Output]) -> None:
        """Writes the line of a completed row."""
        if row.call is None:
            self._write(completion(row, outputs, self._model))
            return
        tokens = self._prompt_tokens[row.id]
        response = openai_answers.answer(row.call, outputs, self._model, tokens, self._tokenizer)
        self._write(openai_line(row, self._model, response))

    def _write(self, line: bytes) -> None:
        if self._keeps:
            self.kept.append(json.loads(line))
        elif self._file is not None:
            self._file.write(line)
        else:
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
