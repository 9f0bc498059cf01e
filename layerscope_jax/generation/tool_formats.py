"""Calls of tools in answers: how each family of chat templates has them written.

The format is chosen by what the template contains, because a model is trained on what its template writes.
Where arguments are JSON, a format also says which grammar a call has, so that one can be required.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from layerscope_jax.generation.detokenize import is_special
from layerscope_jax.generation.structured import WHITESPACE


class ToolCall(NamedTuple):
    """A call.

    Attributes:
        name: of the function.
        arguments: JSON text.
        id: the call's own name, where the format has one.
    """

    name: str
    arguments: str
    id: str | None = None


Types = Mapping[str, Mapping[str, Any]]
"""Function -> its parameters, with the JSON schema of each."""


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written.

    Attributes:
        marks: texts that a template with this format contains.
        begin: what one call or several begin with.
        end: what they end with; empty for the end of the answer.
        calls: reads what is between; None if it is no call.
        before, after: what stands around the arguments of one call, if they are JSON; empty if not. NAME
            stands for the name of the function.
    """

    marks: tuple[str, ...]
    begin: str
    end: str
    calls: Callable[[str, Types], list[ToolCall] | None]
    before: str = ""
    after: str = ""


def from_object(value: Any) -> ToolCall | None:
    """Returns the call that an object `{"name", "arguments"}` is; None if it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(value["name"], text, value.get("id") if isinstance(value.get("id"), str) else None)


def as_json(text: str) -> str | None:
    """Returns a JSON object's text without space around it; None if it is no such text."""
    try:
        return text.strip() if isinstance(json.loads(text), dict) else None
    except (ValueError, RecursionError):
        return None


def objects(body: str, types: Types) -> list[ToolCall] | None:
    """Reads `{"name": ..., "arguments": {...}}`, or a list of these."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    found = [from_object(each) for each in (value if isinstance(value, list) else [value])]
    return [call for call in found if call is not None] if found and None not in found else None


def mistral(body: str, types: Types) -> list[ToolCall] | None:
    """Reads a list of objects, or `NAME[ARGS]{...}`, several parted by `[TOOL_CALLS]`."""
    if (calls := objects(body, types)) is not None:
        return calls
    found = []
    for part in body.split("[TOOL_CALLS]"):
        name, arguments = re.fullmatch(r"\s*([^\[{\s]*)(?:\[ARGS\])?\s*(.*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
        text = as_json(arguments)
        if not name or text is None:
            return None
        found.append(ToolCall(name, text))
    return found


def parted(pattern: str, body: str, call: Callable[..., ToolCall | None]) -> list[ToolCall] | None:
    """Reads every part that a pattern matches."""
    found = [call(*groups) for groups in re.findall(pattern, body, re.DOTALL)]
    return [each for each in found if each is not None] if found and None not in found else None


def deepseek(body: str, types: Types) -> list[ToolCall] | None:
    """Reads `function`, a mark, `NAME` and a block of JSON; or `NAME`, a mark, `{...}`."""

    def call(head: str, rest: str) -> ToolCall | None:
        name, fenced, block = rest.partition("\n```json\n")
        text = as_json(block.partition("\n```")[0] if fenced else rest)
        return None if text is None else ToolCall((name if fenced else head).strip(), text)

    begin, middle, end = (wide(f"<|tool_{part}|>") for part in ("call_begin", "sep", "call_end"))
    return parted(f"{begin}(.*?){middle}(.*?){end}", body, call)


def kimi(body: str, types: Types) -> list[ToolCall] | None:
    """Reads `functions.NAME:0<|tool_call_argument_begin|>{...}`."""

    def call(identity: str, arguments: str) -> ToolCall | None:
        text, name = as_json(arguments), identity.strip().removeprefix("functions.").rpartition(":")[0]
        return ToolCall(name, text, identity.strip()) if text is not None and name else None

    pattern = r"<\|tool_call_begin\|>(.*?)<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>"
    return parted(pattern, body, call)


def written_out(name: str, pairs: Sequence[tuple[str, str]], types: Types) -> ToolCall:
    """Returns a call whose arguments are written one by one: those that are no texts as JSON."""
    known, arguments = types.get(name.strip(), {}), {}
    for key, text in pairs:
        schema = known.get(key.strip())
        value: Any = text
        if not (isinstance(schema, dict) and schema.get("type") == "string"):
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                value = text
        arguments[key.strip()] = value
    return ToolCall(name.strip(), json.dumps(arguments, ensure_ascii=False))


def tags(call: str, pair: str) -> Callable[[str, Types], list[ToolCall] | None]:
    """Returns what reads calls by patterns: of a call (name, rest) and of an argument in it (name, value)."""

    def read(body: str, types: Types) -> list[ToolCall] | None:
        def one(name: str, rest: str) -> ToolCall | None:
            return written_out(name, re.findall(pair, rest, re.DOTALL), types) if name.strip() else None

        return parted(call, body, one)

    return read


def wide(marks: str) -> str:
    """Returns marks as DeepSeek writes them, with a wide bar and a low line of their own."""
    return marks.replace("|", "\N{FULLWIDTH VERTICAL LINE}").replace("_", "\N{LOWER ONE EIGHTH BLOCK}")


FORMATS = {
    "minimax": ToolFormat(
        ("<minimax:tool_call>",),
        "<minimax:tool_call>",
        "</minimax:tool_call>",
        tags('<invoke name="(.*?)">(.*?)</invoke>', '<parameter name="(.*?)">(.*?)</parameter>'),
    ),
    "qwen_coder": ToolFormat(
        ("<tool_call>", "<function="),
        "<tool_call>",
        "</tool_call>",
        tags(r"<function=(.*?)>(.*?)</function>", r"<parameter=(.*?)>\n?(.*?)\n?</parameter>"),
    ),
    "glm": ToolFormat(
        ("<tool_call>", "<arg_key>"),
        "<tool_call>",
        "</tool_call>",
        tags(r"^\s*([^\n<]*)(.*)$", r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>"),
    ),
    "hermes": ToolFormat(
        ("<tool_call>", "</tool_call>"),
        "<tool_call>",
        "</tool_call>",
        objects,
        '<tool_call>\n{"name": "NAME", "arguments": ',
        "}\n</tool_call>",
    ),
    "deepseek_v3": ToolFormat(
        (wide("<|tool_calls_begin|>"), "```json"),
        wide("<|tool_calls_begin|>"),
        wide("<|tool_calls_end|>"),
        deepseek,
        wide("<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>NAME\n```json\n"),
        wide("\n```<|tool_call_end|><|tool_calls_end|>"),
    ),
    "deepseek_v31": ToolFormat(
        (wide("<|tool_calls_begin|>"),),
        wide("<|tool_calls_begin|>"),
        wide("<|tool_calls_end|>"),
        deepseek,
        wide("<|tool_calls_begin|><|tool_call_begin|>NAME<|tool_sep|>"),
        wide("<|tool_call_end|><|tool_calls_end|>"),
    ),
    "kimi": ToolFormat(
        ("<|tool_calls_section_begin|>",),
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        kimi,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>",
        "<|tool_call_end|><|tool_calls_section_end|>",
    ),
    "mistral_args": ToolFormat(
        ("[TOOL_CALLS]", "[ARGS]"), "[TOOL_CALLS]", "", mistral, "[TOOL_CALLS]NAME[ARGS]", ""
    ),
    "mistral": ToolFormat(
        ("[TOOL_CALLS]",),
        "[TOOL_CALLS]",
        "",
        mistral,
        '[TOOL_CALLS] [{"name": "NAME", "arguments": ',
        "}]",
    ),
    "harmony": ToolFormat(
        ("<|channel|>", "to=functions."),
        "<|channel|>",
        "",
        objects,
        "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>",
        "",
    ),
}
"""Formats by name; the first whose marks a template contains is the template's."""


def format_of(template: str) -> ToolFormat | None:
    """Returns the format of the calls that a template writes; None if it is none of these.

    >>> format_of("{% for tool in tools %}<tool_call>{{ call | tojson }}</tool_call>") is FORMATS["hermes"]
    True
    """
    return next((form for form in FORMATS.values() if all(mark in template for mark in form.marks)), None)


def parameters(tools: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Returns the JSON schema of each function's arguments, by its name.

    Raises:
        ValueError: if a tool is not a function with a name.
    """
    found = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,128}", name):
            raise ValueError(
                'tools must be {"type": "function", "function": {"name": letters, digits, _ . and -, '
                f'"parameters": {{...}}}}}}, got {repr(tool)[:80]}'
            )
        schema = function.get("parameters") if isinstance(function, Mapping) else None
        found[name] = dict(schema) if isinstance(schema, Mapping) else {"type": "object"}
    return found


MARK = r"(<[^<>\n]+>|\[[A-Z_]+\])"
"""What may be a token of its own."""


def special_token(tokenizer: Tokenizer, mark: str) -> int | None:
    """Returns the id of the special token that a mark is; None if it is none."""
    token = tokenizer.token_to_id(mark)
    return token if token is not None and is_special(tokenizer, token) else None


def has_special(form: ToolFormat, tokenizer: Tokenizer) -> bool:
    """Returns whether marks of a format are special tokens."""
    marks = re.findall(MARK, form.begin + form.end + form.before + form.after)
    return any(special_token(tokenizer, mark) is not None for mark in marks)


def grammar_of_call(form: ToolFormat, schemas: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """Returns the grammar of an answer that is a call of one of some functions.

    Args:
        form: the template's format.
        schemas: JSON schema of each function's arguments, by name.
        tokenizer: the model's: marks may be tokens of its own.

    Raises:
        ValueError: if the format writes arguments otherwise than as JSON.
    """
    if not form.before:
        raise ValueError(
            "the chat template of this model writes the arguments of calls one by one and not as JSON, so no "
            'call can be required; leave tool_choice at "auto"'
        )

    def quoted(text: str) -> str:
        parts = []
        for part in filter(None, re.split(MARK, text)):
            token = special_token(tokenizer, part)
            parts.append(json.dumps(part, ensure_ascii=False) if token is None else f"<[{token}]>")
        return " ".join(parts)

    options = {"x-guidance": {"whitespace_pattern": WHITESPACE}}
    rules = ["start: " + " | ".join([f"call_{number}" for number in range(len(schemas))])]
    for number, (name, schema) in enumerate(schemas.items()):
        before, after = (quoted(part.replace("NAME", name)) for part in (form.before, form.after))
        rules += [f"call_{number}: {before} arguments_{number} {after}"]
        rules += [f"arguments_{number}: %json {json.dumps(options | dict(schema))}"]
    return "\n".join(rules)
