"""Formats of experts by their names: the plain ones, and those that `register_format` adds."""

from __future__ import annotations

from layerscope_jax.formats.base import Buffer, ExpertFormat
from layerscope_jax.formats.plain import BFLOAT16, FLOAT16, FLOAT32, PlainFormat
from layerscope_jax.models.experts import ExpertWeights

__all__ = ["Buffer", "ExpertFormat", "PlainFormat", "format_named", "plain_of", "register_format"]

_formats: dict[str, ExpertFormat] = {known.name: known for known in (FLOAT32, BFLOAT16, FLOAT16)}


def register_format(added: ExpertFormat) -> ExpertFormat:
    """Makes a format known by its name, so that `load(format=)`, profiles and files may call it by that.

    Args:
        added: of a name that no other format has. Adding an equal one again changes nothing.

    Returns:
        The format that is known by the name from now on.

    Raises:
        ValueError: if it is not a format, or another one has its name.
    """
    if not isinstance(added, ExpertFormat):
        raise ValueError(f"register_format takes an ExpertFormat, such as Float8(), got {added!r}")
    if not isinstance(getattr(added, "name", None), str) or not added.name:
        raise ValueError(f"{type(added).__name__}.name must be a string that calls the format, got none")
    known = _formats.setdefault(added.name, added)
    if known != added:
        raise ValueError(f"there is a format {added.name!r} already, {known!r}; choose another name")
    return known


def plain_of(expert: ExpertWeights) -> ExpertFormat:
    """Returns the plain format of an expert's matrices."""
    return format_named(expert.gate.dtype.name)


def format_named(name: str) -> ExpertFormat:
    """Returns the format that is known by a name.

    Raises:
        ValueError: if there is none; names all that are known.

    >>> format_named("bfloat16")
    PlainFormat(name='bfloat16')
    """
    if name not in _formats:
        raise ValueError(
            f"expected one of the formats {', '.join(_formats)}, got {name!r}; "
            "layerscope_jax.formats.register_format makes others known"
        )
    return _formats[name]
