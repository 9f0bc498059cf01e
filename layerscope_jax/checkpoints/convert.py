"""Writes a checkpoint in another layout (`convert`): for this engine, or back as a Hugging Face folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax.traverse_util import unflatten_dict

from layerscope_jax.checkpoints.converted_writer import Writer, orbax
from layerscope_jax.checkpoints.dense_weights import check_dense_format, named_arrays, packed
from layerscope_jax.checkpoints.fingerprint import fingerprint
from layerscope_jax.checkpoints.headers import Headers, read_headers
from layerscope_jax.checkpoints.hub import TAKEN, WEIGHTS
from layerscope_jax.checkpoints.manifest import VERSION, Manifest, is_converted
from layerscope_jax.checkpoints.model import load
from layerscope_jax.checkpoints.progress import loading
from layerscope_jax.checkpoints.saving import save
from layerscope_jax.checkpoints.shards import Shards
from layerscope_jax.checkpoints.tensor_reader import TensorReader
from layerscope_jax.formats import ExpertFormat, PlainFormat, format_named
from layerscope_jax.formats.int8 import Int8
from layerscope_jax.offload.bank import put_packed
from layerscope_jax.scheduling.plan import ExpertId
from layerscope_jax.support.folders import new_folder

BESIDE = [name for name in TAKEN if name != WEIGHTS and not name.endswith("index.json")]
"""Files that a checkpoint has beside its weights, as patterns of their names."""

NEVER_CHANGED = "config.json", "generation_config.json"


def convert(
    folder: Path,
    out: Path,
    *,
    experts: str | None = None,
    dense: str | None = None,
    dtype: str | None = None,
    to: Literal["engine", "hf"] = "engine",
) -> None:
    """Writes a checkpoint into a new folder, completely or not at all.

    At a time, the dense parameters or one layer's experts are in memory; with `to="hf"` the whole model,
    once.

    Args:
        folder: of a checkpoint that `load` reads.
        out: must not exist.
        experts: name of the format to pack experts into; None to keep them as they are stored.
        dense: "int8" to pack the matrices of dense layers too; None to keep them in the other weights' dtype.
        dtype: "float32", "bfloat16" or "float16" to convert to; None to keep the checkpoint's dtype.
        to: "engine" for the layout of `layerscope_jax.checkpoints.converted`; "hf" for a Hugging Face folder,
            with everything unpacked.

    Raises:
        ValueError: if the checkpoint cannot be read, the format does not suit its experts, or `out` exists or
            cannot be written.
    """
    check_dense_format(dense, "dense")
    if to == "hf":
        for name, given in {"experts": experts, "dense": dense}.items():
            if given is not None:
                raise ValueError(
                    f"{name} must be left out for a Hugging Face folder, whose weights are not packed, got "
                    f"{given!r}"
                )
        with new_folder(out) as new:
            save(load(folder, dtype=dtype), new)
            _copy_beside(folder, new, but=NEVER_CHANGED)
        return
    if is_converted(folder):
        raise ValueError(
            f"{folder} is a converted checkpoint; convert the checkpoint that it was made from, or write it "
            "as a Hugging Face folder first"
        )
    orbax()  # refuses before anything is read
    headers = read_headers(folder, dtype, None if experts is None else format_named(experts))
    form = (headers.format or format_named(headers.dtype.name)).for_body(headers.config.expert_body)
    _check_room(out, headers, form, dense)
    total = sum(tensor.size for tensor in headers.stored.values())
    with new_folder(out) as new, loading(total) as advance, Shards() as shards:
        reader = TensorReader(
            headers.naming, headers.stored, shards, headers.dtype, advance, packed=headers.as_stored
        )
        _copy_beside(folder, new)
        _write(new, headers, form, dense, reader)
        dtype, head = headers.dtype.name, "tied" if headers.config.tie_embeddings else "own"
        # Last, as it is what makes the folder load.
        Manifest(VERSION, fingerprint(folder), dtype, form.name, dense or dtype, head).write(new)


def _write(
    folder: Path, headers: Headers, form: ExpertFormat, dense: str | None, reader: TensorReader
) -> None:
    config, naming = headers.config, headers.naming
    writer, buffers = Writer(folder), form.buffers(config.hidden_size, config.moe_intermediate_size)
    weights = {}
    for source in naming.dense:
        for path, array in reader.arrays(source).items():
            packs = dense is not None and path in naming.matrices
            # Copies, because the reader may read into its memory again.
            weights[path] = packed(array, headers.dtype) if packs else np.array(array)
    writer.dense(dict(named_arrays(unflatten_dict(weights))))
    del weights

    def experts(layer: int) -> Iterator[Any]:
        for expert in (ExpertId(layer, index) for index in range(config.num_experts)):
            keys = [(expert, name) for name in config.expert_shapes()]
            matrices = [reader.array(naming.experts[key], key) for key in keys]
            if headers.as_stored:
                yield put_packed(form, lambda array: array, matrices)
                continue
            if isinstance(form, PlainFormat) and form.dtype == headers.dtype:
                yield matrices
                continue
            result = form.pack(*matrices)
            form.check(result)
            yield result

    for layer in range(config.num_moe_layers):
        writer.layer(layer, experts(layer), buffers, config.num_experts)


def _check_room(out: Path, headers: Headers, form: ExpertFormat, dense: str | None) -> None:
    config, needed = headers.config, 0
    for path, shape in headers.naming.parameters.items():
        if dense is not None and path in headers.naming.matrices:
            needed += sum(buffer.nbytes for buffer in Int8().arrays(*shape))
        else:
            needed += math.prod(shape) * (4 if path in headers.naming.wide else headers.dtype.itemsize)
    count = config.num_moe_layers * config.num_experts
    needed += count * form.expert_bytes(config.hidden_size, config.moe_intermediate_size)
    there = next((place for place in out.absolute().parents if place.is_dir()), Path("/"))
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"{out}: the checkpoint takes {needed:,} bytes, and {there} has {free:,} left; make room or "
            "choose another disk"
        )


def _copy_beside(folder: Path, out: Path, but: tuple[str, ...] = ()) -> None:
    for pattern in BESIDE:
        for file in folder.glob(pattern):
            if file.name not in but:
                target = out / file.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
