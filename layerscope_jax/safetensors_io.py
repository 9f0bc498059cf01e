"""Reads and writes safetensors one tensor at a time, so that no second copy of a model stands in memory.

The safetensors package maps whole files; mapped pages count as memory in use until the file is closed, and it
writes only what lies complete in memory. The format is simple enough to read and write as a stream: eight
bytes with the length of a JSON header, the header (dtype, shape and place of each tensor), the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors

from layerscope_jax.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
"""Safetensors' names of the dtypes that weights may come in."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        file: its safetensors file.
        dtype: safetensors' name of it, "BF16" say.
        shape: as stored.
        start, size: in bytes, from the beginning of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> np.ndarray:
        """Its values in its own dtype, one of `DTYPES`.

        Raises:
            ValueError: if the file has become shorter since its header was read.
        """
        values = np.fromfile(self.file, np.uint8, self.size, offset=self.start)
        if values.size != self.size:
            raise ValueError(f"{self.file} was cut off while it was read; load it again once it is complete")
        return values.view(DTYPES[self.dtype]).reshape(self.shape)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a Hugging Face folder, by name; only headers are read.

    Raises:
        ValueError: if there are no weights, a shard is missing or a file is damaged.
    """
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise ValueError(
            f"{folder}: expected {SINGLE} or {INDEX}, found neither; "
            "other weight formats must first be saved as safetensors (transformers: model.save_pretrained)"
        )
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(
            f"{folder / INDEX}: expected a 'weight_map' from tensors to files; download it again"
        )
    shards = sorted(set(names.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}; "
            "download or copy them into the folder"
        )
    return {name: tensor for shard in shards for name, tensor in read_header(folder / shard).items()}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name.

    Raises:
        ValueError: if the file is not a complete safetensors file.
    """
    try:
        # Checks the header, that tensors neither overlap nor leave gaps, and that the file ends with them.
        with safetensors.safe_open(file, framework="numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: expected a complete safetensors file, got {error}; "
            "it may have been cut off on its way: download or copy it again"
        ) from None
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(
            file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin
        )
    return tensors


def write_tensors(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    value: Callable[[str], np.ndarray],
) -> None:
    """Writes a safetensors file, asking `value(name)` for one tensor at a time."""
    code = {known: code for code, known in DTYPES.items()}[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors begin aligned
    with file.open("wb") as opened:
        opened.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            array = np.ascontiguousarray(value(name), dtype)
            assert array.shape == shape, (name, array.shape, shape)
            opened.write(array.view(np.uint8).data)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`array` in another dtype, itself if it has it already.

    Raises:
        ValueError: if a number is too large for the dtype.

    >>> cast(np.ones(2, np.float32), dtype_named("bfloat16"), "norm").dtype.name
    'bfloat16'
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype == np.float16 and not np.isfinite(result).all():
        raise ValueError(f"{name} holds numbers too large for float16; use bfloat16 or float32")
    return result


def dtype_named(name: str) -> np.dtype:
    """The dtype called "float32", "bfloat16" or "float16"; ValueError for any other name."""
    supported = {dtype.name: dtype for dtype in DTYPES.values()}
    if name not in supported:
        raise ValueError(f"dtype must be one of {', '.join(supported)}, got {name!r}")
    return supported[name]
