"""JSON records: reads them field by field, reporting all errors at once, and writes them readably."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from layerscope_jax.support.checks import Problems

Record = TypeVar("Record", bound=Any)

MOST = {int: 2**53, float: 1e9}
"""Upper limit of the numbers of a record, of counts as well as of times in ms."""

KINDS = {
    str: "text",
    int: "a whole number over 0, at most 2**53",
    float: "a number over 0, at most 1e9",
    dict: "an object",
}


class Fields(Problems):
    """Reads the fields of a record and collects what is wrong with them.

    >>> fields = Fields({"name": "small", "slots": "many"})
    >>> fields.of("name", str), fields.of("slots", int), fields.of("details", dict)
    ('small', None, None)
    >>> fields.found[0]
    "slots must be a whole number over 0, at most 2**53, got 'many'"
    """

    def __init__(self, record: Mapping[str, Any]):
        super().__init__()
        self.record = record

    def of(
        self,
        name: str,
        kind: type,
        record: Mapping[str, Any] | None = None,
        prefix: str = "",
        optional: bool = False,
    ) -> Any:
        """Returns a field of `record`, by default of the whole record; numbers must be above 0."""
        record = self.record if record is None else record
        value: Any = record.get(name)
        if value is None and optional and name in record:
            return None
        fits = type(value) in (int, float) if kind is float else type(value) is kind
        if fits and kind in MOST:
            fits = 0 < value <= MOST[kind]
        if not fits:
            self.add(
                f"{prefix}{name} must be {KINDS[kind]}{' or null' * optional}, "
                + (f"got {str(value)[:40]!r}" if name in record else "but is missing")
            )
        return value if fits else None

    def only(self, names: Iterable[str], record: Mapping[str, Any] | None = None, prefix: str = "") -> None:
        """Refuses any other field in `record`, by default in the whole record: it may be a misspelt name."""
        record = self.record if record is None else record
        others = sorted(str(name)[:40] for name in record.keys() - set(names))
        if others:
            self.add(", ".join(prefix + name for name in others[:8]) + " not expected")


def of_record(kind: type[Record], record: Any, name: str) -> Record:
    """Makes a dataclass of whole numbers and texts from a JSON object with exactly its fields.

    Args:
        kind: the dataclass.
        record: the object.
        name: name of the object in messages.

    Raises:
        ValueError: naming every field that is missing, unexpected or invalid; or with the reason for which
            the class refuses the values.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{name} must be an object, got {str(record)[:40]!r}")
    given = Fields(record)
    kinds = {field.name: {"int": int, "str": str}[str(field.type)] for field in fields(kind)}
    given.only(kinds, prefix=f"{name}.")
    values = {field: given.of(field, of, prefix=f"{name}.") for field, of in kinds.items()}
    given.raise_any()
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def readable(value: Any, indent: int = 0) -> str:
    """Returns JSON with one line for each key, and lists of plain values on one line.

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
    """Whether a file exists; False for paths that are not valid."""
    try:
        return path.is_file()
    except OSError:
        return False
