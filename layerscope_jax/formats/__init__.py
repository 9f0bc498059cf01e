"""Formats of experts by their names: plain ones, quantised ones, and those that `register_format` adds."""

from __future__ import annotations

from layerscope_jax.formats.base import Buffer, ExpertFormat
from layerscope_jax.formats.plain import BFLOAT16, FLOAT16, FLOAT32, PlainFormat
from layerscope_jax.formats.quantised import ENCODINGS, QuantisedFormat, quantised, quantised_named
from layerscope_jax.models.experts import ExpertWeights

__all__ = [
    "Buffer",
    "ExpertFormat",
    "PlainFormat",
    "QuantisedFormat",
    "format_named",
    "plain_of",
    "quantised",
    "register_format",
]

_formats: dict[str, ExpertFormat] = {
    known.name: known
    for known in (FLOAT32, BFLOAT16, FLOAT16, *(quantised(encoding()) for encoding in ENCODINGS))
}


def register_format(added: ExpertFormat) -> ExpertFormat:
    """Registers a format under its name, for `load(format=)`, profiles and files.

    Args:
        added: the format; no other format may have its name. Registering an equal format again has no effect.

    Returns:
        The format that is registered under the name.

    Raises:
        ValueError: if it is not a format, has no name, or another format has its name.
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
    """Returns the format of a name.

    Raises:
        ValueError: if no format has that name; lists the names of all formats.

    >>> format_named("bfloat16"), format_named("int4-g128-bfloat16")
    (PlainFormat(name='bfloat16'), QuantisedFormat(name='int4-g128-bfloat16'))
    """
    known = _formats.get(name) or quantised_named(name)
    if known is None:
        raise ValueError(
            f"expected one of the formats {', '.join(_formats)}, got {name!r}; others of int4 are called "
            "int4-g128-bfloat16 or int4-g32-float16-zeros (size of a group, dtype of its scale, whether it "
            "has a zero point), and of fp8 fp8-channel, fp8-tensor or fp8-64x64 (what has a scale); add "
            "others with layerscope_jax.formats.register_format"
        )
    return known
