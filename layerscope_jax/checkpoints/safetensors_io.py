"""Reads and writes safetensors one tensor at a time, so that no second copy of a model stands in memory.

The safetensors package maps whole files; mapped pages count as memory in use until the file is closed, and it
writes only what lies complete in memory. The format is simple enough to read and write as a stream: eight
bytes with the length of a JSON header, the header (dtype, shape and place of each tensor), the tensors.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

import jax.numpy as jnp
import numpy as np
import safetensors

from layerscope_jax.support.files import is_there, parse_json, preadv, read_json, state_of

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LISTED = 10  # names that a message spells out
PIECE = 8 << 20  # bytes of two tensors that are compared at a time

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
"""Safetensors' names of the dtypes that weights may come in."""

BYTES = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(np.uint8),
    "F8_E8M0": np.dtype(np.uint8),
}
"""And of those that packed weights may come in; floats of 8 bits as bytes."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        file: its safetensors file.
        dtype: safetensors' name of it, "BF16" say.
        shape: as stored.
        start, size: in bytes, from the beginning of the file.
        state: of the file when its header was read (see `support.files.state_of`).
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    state: tuple[int, ...]

    def part(self, index: int) -> StoredTensor:
        """Returns where a part of it lies: the one at a place along its first axis."""
        size = self.size // self.shape[0]
        return replace(self, shape=self.shape[1:], start=self.start + index * size, size=size)

    def array(self, buffer: np.ndarray) -> np.ndarray:
        """Returns the values as a view of the tensor's bytes, in its dtype (see `DTYPES` and `BYTES`)."""
        return buffer.view((DTYPES | BYTES)[self.dtype]).reshape(self.shape)

    def read(self) -> np.ndarray:
        """Reads the tensor's values into new memory.

        Raises:
            ValueError: if the file cannot be read, or has changed since its header was read.
        """
        buffer = np.empty(self.size, np.uint8)
        self.read_into(buffer)
        return self.array(buffer)

    def read_into(self, buffer: np.ndarray, offset: int = 0) -> None:
        """Fills a buffer of bytes from those of the tensor, beginning at `offset`.

        Raises:
            ValueError: as `read`.
        """
        with errors_of(self.file), self.file.open("rb", buffering=0) as opened:
            self.fill(opened.fileno(), buffer.data, offset)
            self.check(opened.fileno())

    def fill(self, opened: int, part: memoryview, offset: int) -> None:
        """Fills memory with the bytes from `offset` on, read from its file, which several threads may share.

        Args:
            opened: file descriptor.
            part: as many bytes as are to be read.
            offset: in bytes, from the beginning of the tensor.

        Raises:
            ValueError: if the file ends before.
        """
        start = self.start + offset
        while part and (count := preadv(opened, [part], start)):
            part, start = part[count:], start + count
        if part:
            raise ValueError(f"{self.file} was cut off while it was read; load it again once it is complete")

    def is_changed(self, opened: int) -> bool:
        """Whether the tensor's file, given by a file descriptor, has changed since its header was read."""
        return state_of(opened) != self.state

    def check(self, opened: int) -> None:
        """Checks that the tensor's file, given by a file descriptor, is as it was when its header was read.

        Raises:
            ValueError: if it has changed.
        """
        if self.is_changed(opened):
            raise ValueError(f"{self.file} was changed while it was read; load it again once it is complete")


@contextmanager
def errors_of(file: Path) -> Iterator[None]:
    """Turns the system's errors while a file is read into a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror} while it was read; load it again") from None


def equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are the same, byte for byte, read in pieces."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for offset in range(0, one.size, PIECE):
        ours, theirs = (np.empty(min(PIECE, one.size - offset), np.uint8) for _ in range(2))
        one.read_into(ours, offset)
        other.read_into(theirs, offset)
        if not np.array_equal(ours, theirs):
            return False
    return True


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a Hugging Face folder, by name; only headers are read.

    They are those of model.safetensors if it is there, as for transformers; else those that the index names,
    each from the shard that it names; without an index those of all safetensors files.

    Warns:
        UserWarning: of files or tensors that are passed over.

    Raises:
        ValueError: if there are no weights, a shard or a tensor is missing, a file is damaged, or a tensor
            lies in two files and nothing says which is meant.
    """
    single, index = folder / SINGLE, folder / INDEX
    if is_there(single):
        if is_there(index) and (others := sorted(set(weight_map(index).values()) - {SINGLE})):
            warnings.warn(
                f"{folder} has both {SINGLE} and {INDEX}; {SINGLE} alone is read, as by transformers, and "
                f"not {_listed(others)}",
                stacklevel=4,
            )
        return read_header(single)
    if is_there(index):
        return _indexed(index)
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    if not files:
        raise ValueError(
            f"{folder}: expected {SINGLE} or {INDEX}, found neither; "
            "other weight formats must first be saved as safetensors (transformers: model.save_pretrained)"
        )
    tensors: dict[str, StoredTensor] = {}
    twice = []
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                twice.append(f"{name} in {tensors[name].file.name} and {file.name}")
            tensors[name] = tensor
    if twice:
        raise ValueError(
            f"{folder}: expected each tensor in one file, or {INDEX} to say which is meant, got "
            f"{_listed(twice)}; remove the files that do not belong to the model"
        )
    return tensors


def weight_map(index: Path) -> dict[str, str]:
    """Returns an index's tensor names, each with the name of the file that holds the tensor.

    Raises:
        ValueError: if the file is not an index, or names a file outside its folder.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"{index}: expected a 'weight_map' from tensors to files; download it again")
    outside = sorted(shard for shard in set(names.values()) if not _is_inside(shard))
    if outside:
        raise ValueError(
            f"{index}: weight_map: expected files inside its folder, got {_listed(map(repr, outside))}; "
            "download it again"
        )
    return names


def _is_inside(name: str) -> bool:
    path = PurePath(name)
    return bool(path.parts) and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def _indexed(index: Path) -> dict[str, StoredTensor]:
    folder, names = index.parent, weight_map(index)
    shards = sorted(set(names.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}; "
            "download or copy them into the folder"
        )
    held = {shard: read_header(folder / shard) for shard in shards}
    absent = sorted(f"{name} in {shard}" for name, shard in names.items() if name not in held[shard])
    if absent:
        raise ValueError(
            f"{index}: {len(absent)} tensors are not in the files that it names: {_listed(absent)}; check "
            "that the index and the shards belong to the same checkpoint"
        )
    unnamed = sorted({name for tensors in held.values() for name in tensors} - names.keys())
    if unnamed:
        warnings.warn(
            f"{index} does not name {len(unnamed)} tensors of its shards, which are passed over: "
            f"{_listed(unnamed)}",
            stacklevel=5,
        )
    return {name: held[shard][name] for name, shard in names.items()}


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    rest = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + rest


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file, by name.

    Raises:
        ValueError: if the file is not a complete safetensors file.
    """
    if is_there(file) and not file.is_file():  # opening a pipe would block until another process writes to it
        raise ValueError(f"{file}: expected a safetensors file, got a folder, pipe or device; replace it")
    try:
        # Checks the header, that tensors neither overlap nor leave gaps, and that the file ends with them.
        with safetensors.safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as opened:
            state = state_of(opened.fileno())
            length = int.from_bytes(opened.read(8), "little")
            header = parse_json(opened.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = StoredTensor(
                file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin, state
            )
    except OSError as error:
        raise ValueError(
            f"{file}: expected a file that can be read, got {error.strerror or error}; check its permissions"
        ) from None
    # The last three only of a header that was written over after it had been checked.
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: expected a complete safetensors file, got {error}; "
            "the transfer may have been interrupted: download or copy it again"
        ) from None
    return tensors


def write_tensors(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    value: Callable[[str], np.ndarray],
) -> None:
    """Writes a safetensors file, asking `value(name)` for one tensor at a time."""
    codes = {known: code for code, known in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * dtypes[name].itemsize
        header[name] = {"dtype": codes[dtypes[name]], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors begin aligned
    with file.open("wb") as opened:
        opened.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            array = np.ascontiguousarray(value(name), dtypes[name])
            assert array.shape == shape, (name, array.shape, shape)
            opened.write(array.view(np.uint8).data)


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Returns an array converted to a dtype; the same array if it has that dtype already.

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
    """Returns the dtype called "float32", "bfloat16" or "float16"; raises ValueError for any other name."""
    supported = {dtype.name: dtype for dtype in DTYPES.values()}
    if name not in supported:
        raise ValueError(f"dtype must be one of {', '.join(supported)}, got {name!r}")
    return supported[name]
