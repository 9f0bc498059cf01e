"""Tools of a chat: what a body says of them, and the calls in its answers as OpenAI's API has them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from layerscope_jax.generation.chat import Chat
from layerscope_jax.generation.tool_calls import Told, stream_of
from layerscope_jax.generation.tool_formats import (
    ToolFormat,
    Types,
    format_of,
    grammar_of_call,
    has_special,
    parameters,
)
from layerscope_jax.support.checks import Problems


@dataclass(frozen=True)
class Tools:
    """The tools of a chat.

    Attributes:
        form: how the model's calls are written.
        types: the JSON schema of each parameter of each function.
        special: whether marks of calls are special tokens, which have no text otherwise.
        grammar: of an answer that has to be a call; None if it need not be.
    """

    form: ToolFormat
    types: Types
    special: bool = False
    grammar: str | None = None


def tools_of(
    content: Mapping[str, Any], chat: Chat, tokenizer: Tokenizer | None, problems: Problems
) -> Tools | None:
    """Returns the tools of a chat; None if it has none, or calls in its answers are to stay text.

    Args:
        content: the body.
        chat: the model's templates.
        tokenizer: the model's.
        problems: collects what is wrong.
    """
    tools, choice = content.get("tools"), content.get("tool_choice")
    if not tools:
        problems.expect(choice in (None, "none", "auto"), "tool_choice", "left out without tools", choice)
        return None
    if choice == "none" or not isinstance(tools, list):  # which the request itself refuses
        return None
    try:
        template, schemas = chat.template(tools=True), parameters(tools)
    except ValueError as error:
        problems.add(str(error))
        return None
    if "tools" not in template:
        problems.add("tools must be left out: the chat template of this model does not support them")
        return None
    form = format_of(template)
    named, grammar = called(choice), None
    if named is not None and named not in schemas:
        problems.expect(False, "tool_choice", f"the name of one of the tools ({', '.join(schemas)})", named)
    elif named is None and choice not in (None, "auto", "required"):
        expected = '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
        problems.expect(False, "tool_choice", expected, choice)
    elif choice not in (None, "auto"):
        wanted = schemas if named is None else {named: schemas[named]}
        if form is None:
            problems.add(
                'tool_choice must be "auto" or "none": the chat template of this model does not show in '
                "which format it writes calls, so none can be required"
            )
        elif tokenizer is not None:
            try:
                grammar = grammar_of_call(form, wanted, tokenizer)
            except ValueError as error:
                problems.add(str(error))
    if form is None or tokenizer is None:
        return None
    return Tools(form, types_of(schemas), has_special(form, tokenizer), grammar)


def called(choice: Any) -> str | None:
    """Returns the name of the function that a `tool_choice` names; None if it names none."""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def types_of(schemas: Mapping[str, Any]) -> Types:
    """Returns the schema of each parameter of each function."""
    found = {}
    for name, schema in schemas.items():
        properties = schema.get("properties")
        found[name] = properties if isinstance(properties, dict) else {}
    return found


class Calls:
    """Splits one answer into content and calls as its text comes.

    Attributes:
        number: number of calls so far.
    """

    def __init__(self, tools: Tools):
        self._stream, self._nine = stream_of(tools.form, tools.types), "[TOOL_CALLS]" in tools.form.marks
        self.number = 0

    def delta(self, text: str, ended: bool) -> dict[str, Any]:
        """Returns the `delta` of a stream for more text of the answer; empty if nothing can be sent yet.

        Args:
            text: the text.
            ended: whether it is the last.
        """
        told = [self._stream.add(text), *([self._stream.end()] if ended else [])]
        found: dict[str, Any] = {}
        for name in ("content", "reasoning"):
            if joined := "".join([getattr(part, name) for part in told]):
                found["reasoning_content" if name == "reasoning" else name] = joined
        if calls := self._numbered(told):
            found["tool_calls"] = calls
        return found

    def message(self, text: str) -> dict[str, Any]:
        """Returns a whole answer's message, but for its role."""
        found = {"content": None} | self.delta(text, True)
        for call in found.get("tool_calls") or ():
            del call["index"]
        if not self.number and found["content"] is None:
            found["content"] = ""
        return found

    def finish_reason(self, reason: str | None) -> str | None:
        """Returns why an answer ended, as the API says it."""
        return "tool_calls" if reason == "stop" and self.number else reason

    def _numbered(self, told: list[Told]) -> list[dict[str, Any]]:
        calls = []
        for call in (call for part in told for call in part.calls):
            # Mistral's template takes names of nine letters and digits alone.
            own = secrets.token_hex(5)[:9] if self._nine else f"call_{secrets.token_hex(12)}"
            function = {"name": call.name, "arguments": call.arguments}
            entry = {"index": self.number, "id": call.id or own, "type": "function", "function": function}
            calls.append(entry)
            self.number += 1
        return calls
