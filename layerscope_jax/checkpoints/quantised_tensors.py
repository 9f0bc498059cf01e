"""The tensors of a quantised checkpoint, with those of each quantised matrix put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from layerscope_jax.checkpoints.packed_tensors import PackedTensor
from layerscope_jax.checkpoints.safetensors_io import BYTES, DTYPES, StoredTensor
from layerscope_jax.checkpoints.schemes import SCHEMES, Scheme, expect_dtype, refuse_order
from layerscope_jax.checkpoints.weight_names import LISTED, Naming
from layerscope_jax.formats import ExpertFormat
from layerscope_jax.formats.encoding import Encoding
from layerscope_jax.formats.fp8 import Fp8
from layerscope_jax.formats.int4 import Int4
from layerscope_jax.formats.mxfp4 import Mxfp4
from layerscope_jax.models.quantisation import Quantisation, read_quantisation

UNUSED = (".input_scale", ".input_global_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale")
"""What the names of tensors end with that only matter where activations or caches are quantised."""


def quantisation_of(raw: Mapping[str, Any]) -> Quantisation | None:
    """Returns how a checkpoint is quantised, by its `config.json`; None if it is not."""
    inner = raw.get("text_config")
    given = raw.get("quantization_config")
    if given is None and isinstance(inner, Mapping):
        given = inner.get("quantization_config")
    return read_quantisation(given)


def encoding_told(said: Quantisation | None) -> Encoding | None:
    """Returns how experts are stored, where config.json alone tells; None where it does not."""
    if said is None or said.method not in ("fp8", "mxfp4"):
        return None
    if said.method == "mxfp4":
        return Mxfp4()
    return None if said.block is None else Fp8(*said.block)


def put_together(
    folder: Path, raw: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor | PackedTensor]:
    """Returns a checkpoint's tensors by the names of its family's table, each quantised matrix as one tensor.

    Args:
        folder: of the checkpoint.
        raw: its `config.json`.
        stored: its tensors.

    Raises:
        ValueError: naming each quantised matrix whose tensors are incomplete or do not fit each other.
    """
    said = quantisation_of(raw)
    if said is None:
        return dict(stored)
    left = {name: tensor for name, tensor in stored.items() if not name.endswith(UNUSED)}
    result: dict[str, StoredTensor | PackedTensor] = {}
    wrong: list[str] = []
    for name, tensor in stored.items():
        scheme = next(
            (s for s in SCHEMES[said.method] if name.endswith(s.codes) and tensor.dtype == s.dtype), None
        )
        if scheme is None:
            continue
        base = name[: -len(scheme.codes)]
        separator = scheme.codes[0]
        try:
            parts = _parts(scheme, base + separator, tensor, stored)
            encoding, shape, convert = scheme.make(parts, said)
            if said.reorders and isinstance(encoding, Int4) and "g_idx" in parts:
                refuse_order(parts["g_idx"].read(), encoding.group)
        except ValueError as error:
            wrong.append(f"{base}{separator}{error}")
            continue
        weight = base + scheme.weight
        result[weight] = PackedTensor(weight, encoding, shape, parts, convert)
        for part in parts:
            left.pop(base + separator + part, None)
    if wrong:
        rest = [f"and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []
        raise ValueError(
            f"{folder}: {len(wrong)} quantised weights ({said.method}) are not as expected; check that the "
            "checkpoint is complete and belongs to its config.json:\n  " + "\n  ".join(wrong[:LISTED] + rest)
        )
    return left | result


def _parts(
    scheme: Scheme, begins: str, codes: StoredTensor, stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    parts = {scheme.codes[1:]: codes}
    scales = [name for name in scheme.scales if begins + name in stored]
    if not scales:
        raise ValueError(f"{' or '.join(scheme.scales)}: expected the scales, found no such tensor")
    parts[scales[0]] = stored[begins + scales[0]]
    for name, needed in scheme.others.items():
        if begins + name in stored:
            parts[name] = stored[begins + name]
        elif needed:
            raise ValueError(f"{name}: found no such tensor")
    for name, tensor in parts.items():
        expect_dtype(name, tensor, *DTYPES, *BYTES)
    return parts


def encoding_of_experts(
    folder: Path,
    naming: Naming,
    stored: Mapping[str, StoredTensor | PackedTensor],
    chosen: ExpertFormat | None = None,
) -> Encoding | None:
    """Returns how all matrices of a checkpoint's routed experts are stored; None if as plain floats.

    Args:
        folder: of the checkpoint.
        naming: of the model.
        stored: its tensors, put together.
        chosen: format that the experts are to have, if one was chosen.

    Raises:
        ValueError: if they are stored in several ways, and no format was chosen.
    """
    held: dict[str, list[str]] = {}
    encodings: dict[str, Encoding | None] = {}
    sources = {id(source): source for source in naming.experts.values()}.values()
    by_rows = all(source.transform.by_rows for source in sources)
    for name in _matrices(naming, stored):
        tensor = stored[name]
        packed = isinstance(tensor, PackedTensor)
        kind = tensor.dtype if packed else "floats"
        held.setdefault(kind, []).append(name)
        encodings[kind] = tensor.encoding if isinstance(tensor, PackedTensor) else None
    if len(held) > 1 and chosen is not None:
        return None
    if len(held) > 1:
        kinds = ", ".join(f"{kind} ({len(names)}, such as {names[0]})" for kind, names in held.items())
        raise ValueError(
            f"{folder}: expected all matrices of routed experts in one format, found {kinds}; choose the "
            'format of all with format= ("bfloat16", say, to unpack those that are packed), or use a '
            "checkpoint whose experts are all quantised alike"
        )
    return next(iter(encodings.values())) if by_rows else None


def _matrices(naming: Naming, stored: Mapping[str, StoredTensor | PackedTensor]) -> Iterable[str]:
    """Yields the names of the tensors that hold matrices of routed experts."""
    for name, uses in naming.uses.items():
        source, part = uses[0]
        if source.keys[0] in naming.experts:
            stacked = source.tensors[part][1] is not None
            if len(stored[name].shape) - stacked == 2:
                yield name
