"""The subcommands of `layerscope`: those of this package, and those that other packages add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from inspect import cleandoc
from typing import Annotated, Any, Protocol, Union

from tyro.conf import subcommand

from layerscope_jax.cli.groups import grouped
from layerscope_jax.support.exits import say
from layerscope_jax.support.plugins import entry_points_of, load

GROUP = "layerscope.commands"
"""Entry points of this group add commands: `plans = "my_module:Plans"` adds `layerscope plans`."""


class Command(Protocol):
    """A dataclass whose fields are the options of a command; its docstring is the command's help."""

    def run(self) -> int | None:
        """Does what the command is for; returns the exit code, or None for 0."""


def with_added(built_in: Mapping[str, type], args: list[str]) -> dict[str, type]:
    """Returns the commands that a command line may name.

    Packages are imported only if the command line names no built-in command. A command that cannot be
    used is left out, with a warning on stderr.

    Args:
        built_in: commands of this package by name; no other package can replace them.
        args: the command line.

    Raises:
        ValueError: if the command line names a command that cannot be used.
    """
    commands = dict(built_in)
    if args and args[0] in built_in:
        return commands
    for name, point in entry_points_of(GROUP).items():
        try:
            if name in built_in:
                raise ValueError(f"{name!r} ({point.value}) has the name of a built-in command; rename it")
            commands[name] = _checked(name, load(point))
        except ValueError as error:
            if args and args[0] == name:
                raise ValueError(f"command {error}") from error
            say(f"warning: command {error}")
    return commands


def union(commands: Mapping[str, type], in_full: bool = False) -> Any:
    """Returns the type that tyro parses a command line into, a subcommand for each name.

    Args:
        commands: by name.
        in_full: whether a command's help is its whole docstring, examples included, or the first paragraph.
    """
    named = (
        Annotated[grouped(command), subcommand(name, description=told(command, in_full))]
        for name, command in commands.items()
    )
    return Union[tuple(named)]  # noqa: UP007


def told(command: type, in_full: bool = True) -> str:
    """Returns what a command says of itself, with its examples, which tyro alone would leave out.

    >>> told(Command, in_full=False)
    "A dataclass whose fields are the options of a command; its docstring is the command's help."
    """
    text = cleandoc(command.__doc__ or "")
    if text.startswith(f"{command.__name__}("):  # a dataclass without a docstring has its signature
        return ""
    return text if in_full else text.partition("\n\n")[0].replace("\n", " ")


def _checked(name: str, command: Any) -> type:
    if not (isinstance(command, type) and is_dataclass(command) and callable(getattr(command, "run", None))):
        raise ValueError(f"{name!r} must be a dataclass with a method run(), got {command!r}")
    return command
