"""JSON records: read field by field, so that all that is wrong is said at once, and written for readers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

MOST = {int: 2**53, float: 1e9}
"""Numbers of a record are no larger: nothing that is counted, nor a time in ms."""

KINDS = {
    str: "text",
    int: "a whole number over 0, at most 2**53",
    float: "a number over 0, at most 1e9",
    dict: "an object",
}


class Fields:
    """Takes fields out of a record and collects what is wrong with them."""

    def __init__(self, record: Mapping[str, Any]):
        self.record = record
        self.wrong: list[str] = []

    def of(
        self,
        name: str,
        kind: type,
        record: Mapping[str, Any] | None = None,
        prefix: str = "",
        optional: bool = False,
    ) -> Any:
        """A field of `record`, the whole one by default; numbers are over 0."""
        record = self.record if record is None else record
        value: Any = record.get(name)
        if value is None and optional and name in record:
            return None
        fits = type(value) in (int, float) if kind is float else type(value) is kind
        if fits and kind in MOST:
            fits = 0 < value <= MOST[kind]
        if not fits:
            self.wrong.append(
                f"{prefix}{name} must be {KINDS[kind]}{' or null' * optional}, "
                + (f"got {str(value)[:40]!r}" if name in record else "but is missing")
            )
        return value if fits else None

    def only(self, names: Iterable[str], record: Mapping[str, Any] | None = None, prefix: str = "") -> None:
        """Refuses other fields in `record`, the whole one by default: a misspelt one is no default."""
        record = self.record if record is None else record
        others = sorted(str(name)[:40] for name in record.keys() - set(names))
        if others:
            self.wrong.append(", ".join(prefix + name for name in others[:8]) + " not expected")

    def read(self, name: str, read: Callable[[], Any]) -> Any:
        """What `read` gives; a ValueError of its is collected, and None given."""
        try:
            return read()
        except ValueError as error:
            self.wrong.append(f"{name}: {error}")
            return None


def readable(value: Any, indent: int = 0) -> str:
    """JSON with a line a key, and lists of plain values on one line.

    >>> print(readable({"a": [1, 2], "b": {"c": None}}))
    {
      "a": [1, 2],
      "b": {
        "c": null
      }
    }
    """
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner, outer = "  " * (indent + 1), "  " * indent
    lines = [f"{inner}{json.dumps(key)}: {readable(item, indent + 1)}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{outer}}}"


def is_file(path: Path) -> bool:
    """Whether there is such a file; also of names that none can have."""
    try:
        return path.is_file()
    except OSError:
        return False
