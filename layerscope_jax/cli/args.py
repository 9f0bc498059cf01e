"""Arguments of commands, with defaults shown where they say something."""

from __future__ import annotations

from typing import Any

from tyro import conf


def shown(default: str) -> str:
    """Returns what the help says of a default: nothing where the option is just left out.

    >>> shown("32"), shown("None"), shown("False")
    ('(default: 32)', '', '')
    """
    if "MISSING" in default:  # an option that may be repeated
        return "(required)"
    return "" if default in ("None", "False", "") else f"(default: {default})"


def arg(**facts: Any) -> Any:
    """Returns `tyro.conf.arg` of these facts, whose help names a default only if it is a value."""
    return conf.arg(help_behavior_hint=shown, **facts)
