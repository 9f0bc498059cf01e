"""Answers parted into content and calls of tools, as their text comes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from layerscope_jax.generation.tool_formats import FORMATS, ToolCall, ToolFormat, Types


class Told(NamedTuple):
    """What a part of an answer says."""

    content: str = ""
    calls: Sequence[ToolCall] = ()
    reasoning: str = ""


class Stream(Protocol):
    """Parts the text of an answer into content and calls, as it comes."""

    def add(self, text: str) -> Told: ...

    def end(self) -> Told: ...


def stream_of(form: ToolFormat, types: Types) -> Stream:
    """Returns what parts the text of one answer."""
    return Harmony() if form is FORMATS["harmony"] else Marked(form, types)


class Marked:
    """An answer whose calls stand between marks; what is between but no call stays content.

    Space before a call and behind the last is left out.

    >>> stream = Marked(FORMATS["hermes"], {})
    >>> stream.add("Well.\\n<tool")
    Told(content='Well.', calls=[], reasoning='')
    >>> stream.add('_call>{"name": "f", "arguments": {"x": 1}}</tool_call>').calls
    [ToolCall(name='f', arguments='{"x": 1}', id=None)]
    """

    def __init__(self, form: ToolFormat, types: Types):
        self._form, self._types = form, types
        self._text = self._space = ""
        self._inside = self._called = False

    def add(self, text: str) -> Told:
        """Returns what is certain after more text."""
        self._text += text
        content, calls, form = "", list[ToolCall](), self._form
        while True:
            mark = form.end if self._inside else form.begin
            at = self._text.find(mark) if mark else -1
            if at < 0:
                break
            part, self._text = self._text[:at], self._text[at + len(mark) :]
            if self._inside:
                content += self._read(part, mark, calls)
            else:
                content += part
            self._inside = not self._inside
        if not self._inside:
            kept = begun(self._text, form.begin)
            content, self._text = (
                content + self._text[: len(self._text) - kept],
                self._text[-kept or len(self._text) :],
            )
        return self._without_space(content, calls)

    def end(self) -> Told:
        """Returns what is left at the end of the answer."""
        calls: list[ToolCall] = []
        if not self._inside:
            rest = self._text
        elif self._form.end and not self._form.before:  # not JSON, whose end can be seen: it may be cut off
            rest = self._form.begin + self._text
        else:
            rest = self._read(self._text, "", calls)
        told = self._without_space(rest, calls)
        return told if self._called else told._replace(content=told.content + self._space)

    def _read(self, body: str, end: str, calls: list[ToolCall]) -> str:
        """Adds the calls of a part, and returns the part's text if it is none."""
        found = self._form.calls(body, self._types)
        if found is None:
            return self._form.begin + body + end
        calls += found
        return ""

    def _without_space(self, content: str, calls: list[ToolCall]) -> Told:
        content = self._space + content
        stripped = content.rstrip()
        self._space = content[len(stripped) :]
        self._called = self._called or bool(calls)
        return Told(stripped, calls)


class Harmony:
    """An answer of gpt-oss: messages in channels, some of them calls, others reasoning."""

    ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")

    def __init__(self) -> None:
        self._text, self._head, self._kind = "", "", ""  # kind: of the message that has begun; "" for none
        self._arguments = ""

    def add(self, text: str) -> Told:
        """Returns what is certain after more text."""
        self._text += text
        parts: dict[str, str] = {"content": "", "reasoning": ""}
        calls: list[ToolCall] = []
        while True:
            marks = self.ENDS if self._kind else ("<|message|>",)
            at, mark = min(
                [(self._text.find(mark), mark) for mark in marks if mark in self._text], default=(-1, "")
            )
            kept = max([begun(self._text, mark) for mark in marks])
            part = self._text[:at] if at >= 0 else self._text[: len(self._text) - kept]
            self._text = self._text[at + len(mark) :] if at >= 0 else self._text[len(part) :]
            if not self._kind:
                self._head += part
            elif self._kind == "call":
                self._arguments += part
            else:
                parts[self._kind] += part
            if at < 0:
                return Told(parts["content"], calls, parts["reasoning"])
            if self._kind:
                calls += self._ended()
            else:
                self._kind = "reasoning" if "<|channel|>analysis" in self._head else "content"
                if "to=functions." in self._head:
                    self._kind = "call"

    def end(self) -> Told:
        """Returns what is left at the end of the answer."""
        rest, self._text = self._text, ""
        if not self._kind:
            return Told(self._head.strip() + rest)  # no message has begun
        if self._kind == "call":
            self._arguments += rest
            return Told(calls=self._ended())
        return Told(rest) if self._kind == "content" else Told(reasoning=rest)

    def _ended(self) -> list[ToolCall]:
        """Returns the call that the message which has ended is, if it is one."""
        name = re.search(r"to=functions\.([^\s<]+)", self._head)
        text = self._arguments.strip() if self._kind == "call" else ""
        self._head = self._kind = self._arguments = ""
        return [ToolCall(name[1], text or "{}")] if name else []


def begun(text: str, mark: str) -> int:
    """Returns how many characters at the end of a text may be the beginning of a mark.

    >>> begun("so <to", "<tool>"), begun("so", "<tool>")
    (3, 0)
    """
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
