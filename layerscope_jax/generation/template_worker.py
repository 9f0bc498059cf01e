"""Renders chat templates, one per line of standard input, in a process of its own.

A template is a program that came with a checkpoint. Here it can reach no file, no network and no module, has
little memory, and is ended by whoever started the process if it takes too long: nothing within one could
stop `9**9**9`. The process imports only jinja2, so that it starts at once. The environment is that of
transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 1 << 30
"""Address space of the process."""

MOST_CHARACTERS = 16_000_000
"""Longest text that a template may make."""


class Generation(Extension):
    """The tag `{% generation %}`, which marks what the assistant said; it changes no text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Returns what is between the tags, as a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Returns JSON in which, unlike in that of jinja2's filter, no HTML characters are escaped."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)  # local time, as in transformers


@lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)


def render(template: str, variables: dict[str, Any]) -> str:
    """Returns the text that a template makes.

    Raises:
        ValueError: if it makes too long a text.
    """

    def pieces() -> Iterator[str]:
        length = 0
        for piece in compiled(template).generate(variables):
            length += len(piece)
            if length > MOST_CHARACTERS:
                raise ValueError(f"it makes more than {MOST_CHARACTERS:,} characters")
            yield piece

    return "".join(pieces())


def answer(line: str) -> dict[str, str]:
    """Returns the text for a request, or why there is none."""
    try:
        request = json.loads(line)
        return {"text": render(request["template"], request["variables"])}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB"}
    except RecursionError:
        return {"error": "it calls itself too deeply"}
    except Exception as error:  # whatever a template does, such as adding a number to a text
        return {"error": str(error) or type(error).__name__}


def main() -> None:
    try:
        import resource
    except ImportError:  # on Windows
        pass
    else:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        print(json.dumps(answer(line)), flush=True)


if __name__ == "__main__":
    main()
