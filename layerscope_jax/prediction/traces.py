"""Traces: recorded routing and hidden states, written chunk by chunk and memory-mapped for reading.

    DIR/trace.json          what was recorded, of which model
    DIR/chunks.jsonl        a line for each finished chunk: its passages, its files with sizes and CRC-32
    DIR/00000.tokens.npy    [N] int32
    DIR/00000.experts.npy   [N, L, K] uint8 or uint16, best first
    DIR/00000.weights.npy   [N, L, K] float16
    DIR/00000.hidden.npy    [N, L, P] float16, where hidden states were recorded

Rows are tokens, passage after passage. Everything but the hidden states is small and can be read alone.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerscope_jax.prediction.trace_index import (
    Passage,
    TraceHeader,
    layout,
    read_files,
    read_header,
    read_passage,
)
from layerscope_jax.support.files import Content, parse_json, replace_files, write_file

HEADER, INDEX = "trace.json", "chunks.jsonl"


@dataclass(frozen=True)
class Chunk:
    """Chunk of a trace: some passages, whose arrays are mapped from disk on demand."""

    folder: Path
    number: int
    passages: tuple[Passage, ...]
    files: Mapping[str, tuple[int, int]]  # array -> bytes, CRC-32
    header: TraceHeader

    @property
    def rows(self) -> int:
        return sum(passage.tokens for passage in self.passages)

    def map(self, array: str) -> np.ndarray:
        """Maps one array; data is read when it is accessed.

        Raises:
            ValueError: if it was not recorded, or its file is missing, cut off or not what the index says.
        """
        if array not in self.files:
            raise ValueError(f"{self.folder}: expected {array} to be recorded, got {', '.join(self.files)}")
        path, size = self._path(array), self.files[array][0]
        there = path.stat().st_size if path.exists() else None
        if there != size:
            raise ValueError(
                f"{path}: expected {size:,} bytes, got {'no file' if there is None else f'{there:,}'}; "
                "copy it again, or record the trace anew"
            )
        shape, dtype = layout(self.header, self.rows)[array]
        try:  # not `np.load`, which accepts other kinds of files
            mapped = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # NumPy, ast and mmap raise errors without a common base
            raise ValueError(f"{path}: expected an array, got {error}; copy it again") from None
        if mapped.shape != shape or mapped.dtype != dtype:
            raise ValueError(
                f"{path}: expected {np.dtype(dtype)} {shape} by the index, got {mapped.dtype} "
                f"{mapped.shape}; copy it again"
            )
        return mapped

    def verify(self) -> None:
        """Checks every file against its checksum, and that the chosen experts exist.

        Raises:
            ValueError: naming the files that are damaged.
        """
        damaged = []
        for array, (_, expected) in self.files.items():
            self.map(array)
            if checksum(self._path(array)) != expected:
                damaged.append(self._path(array).name)
        if damaged:
            raise ValueError(
                f"{self.folder}: damaged (checksums differ): {', '.join(damaged)}; copy the trace again"
            )
        most, known = int(self.map("experts").max(initial=0)), self.header.model.num_experts
        if most >= known:
            raise ValueError(
                f"{self._path('experts')}: expected experts 0..{known - 1}, got {most}; record it anew"
            )

    def _path(self, array: str) -> Path:
        return self.folder / f"{self.number:05d}.{array}.npy"

    def passage_of_row(self) -> np.ndarray:
        """Returns the index [N] into `passages` of each row."""
        return passage_of_row(self.passages)

    def positions(self) -> np.ndarray:
        """[N] position of each row within its passage."""
        return positions(self.passages)

    def decode(self) -> np.ndarray:
        """[N] bool: whether a row is a decode step rather than a part of its prompt."""
        return decode_rows(self.passages)


def passage_of_row(passages: Sequence[Passage]) -> np.ndarray:
    """Returns the index [N] of the passage that each row belongs to."""
    return np.repeat(np.arange(len(passages)), [passage.tokens for passage in passages])


def positions(passages: Sequence[Passage]) -> np.ndarray:
    """[N] position of each row within its passage."""
    return np.concatenate([np.arange(passage.tokens) for passage in passages])


def decode_rows(passages: Sequence[Passage]) -> np.ndarray:
    """[N] bool: whether a row is a decode step rather than a part of its prompt."""
    prompts = np.array([passage.prompt for passage in passages])
    return positions(passages) >= prompts[passage_of_row(passages)]


@dataclass(frozen=True)
class Trace:
    """A recorded trace, complete or still being written.

    Attributes:
        folder: folder of its files.
        header: model and settings.
        chunks: the finished chunks.
        complete: whether the recording is finished.
    """

    folder: Path
    header: TraceHeader
    chunks: tuple[Chunk, ...]
    complete: bool

    @classmethod
    def open(cls, folder: str | Path) -> Trace:
        """Opens a trace, or the finished chunks of one that is still being written.

        Raises:
            ValueError: if there is no trace, or it is damaged or of another format.
        """
        folder = Path(folder)
        if not (folder / HEADER).exists():
            raise ValueError(
                f"{folder}: expected a trace ({HEADER}), found none; `layerscope trace` records one"
            )
        header = read_header(folder / HEADER)
        chunks: list[Chunk] = []
        complete, known = False, dict[bytes, int]()
        for number, line in enumerate(finished_lines(folder / INDEX)):
            try:
                entry = parse_json(line)
                if not isinstance(entry, dict):
                    raise TypeError(f"{str(entry)[:40]!r}")
                complete = complete or "complete" in entry
                if "complete" in entry:
                    continue
                passages = tuple(read_passage(passage) for passage in entry["passages"])
                files = read_files(entry["files"], header, sum(passage.tokens for passage in passages))
                if line in known:
                    raise ValueError(f"line {known[line]} a second time")
                known[line] = number + 1
                chunks.append(Chunk(folder, len(chunks), passages, files, header))
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
                raise ValueError(
                    f"{folder / INDEX}, line {number + 1}: expected a chunk, got {repr(error)[:300]}; "
                    "copy it again, or record the trace anew"
                ) from None
        return cls(folder, header, tuple(chunks), complete)

    @property
    def rows(self) -> int:
        return sum(chunk.rows for chunk in self.chunks)

    def passages(self) -> Iterator[tuple[Chunk, Passage, slice]]:
        """Yields every passage with its chunk and its rows there."""
        for chunk in self.chunks:
            end = 0
            for passage in chunk.passages:
                start, end = end, end + passage.tokens
                yield chunk, passage, slice(start, end)


class TraceWriter:
    """Writes a trace, or continues an interrupted one after its finished chunks.

    A chunk's files are written under temporary names and renamed, then its line is appended to the index. So
    a process that dies leaves complete chunks and, at worst, files that the next process replaces.

    Args:
        folder: created if needed.
        header: header of the trace.

    Raises:
        ValueError: if the folder holds another trace; says what differs.

    Attributes:
        done: recorded passages.
        complete: whether the trace is finished.
    """

    def __init__(self, folder: str | Path, header: TraceHeader):
        self.folder = Path(folder)
        self.header = header
        self.done: list[Passage] = []
        self.complete = False
        self._chunks = 0
        if (self.folder / HEADER).exists():
            trace = Trace.open(self.folder)
            header.model.check(trace.header.model, f"the trace in {self.folder}")
            theirs, ours = (_flat(each.to_json()) for each in (trace.header, header))
            differing = [
                f"{key} {theirs.get(key)!r} there, {ours.get(key)!r} now"
                for key in theirs | ours
                if theirs.get(key) != ours.get(key)
            ]
            if differing:
                raise ValueError(
                    f"{self.folder} holds a trace that was recorded differently: {'; '.join(differing)}; "
                    "choose another folder"
                )
            self.done = [passage for chunk in trace.chunks for passage in chunk.passages]
            self._chunks, self.complete = len(trace.chunks), trace.complete
        else:
            write_file(self.folder / HEADER, json.dumps(header.to_json(), indent=1) + "\n")

    def write(self, passages: Sequence[Passage], arrays: Mapping[str, np.ndarray]) -> None:
        """Adds a chunk.

        Args:
            passages: passages in the order of the rows.
            arrays: "tokens" [N], "experts" [N, L, K], "weights" [N, L, K] and, where the header has a width,
                "hidden" [N, L, P].

        Raises:
            ValueError: if a hidden state is not finite, or the chunk cannot be written; then none of it
                remains.
        """
        rows = sum(passage.tokens for passage in passages)
        expected = layout(self.header, rows)
        if self.header.hidden:
            finite = np.isfinite(arrays["hidden"]).all((0, 2))
            if not finite.all():
                raise ValueError(
                    f"hidden states of layers {np.flatnonzero(~finite).tolist()} are not finite, because of "
                    "the model or its dtype; try float32"
                )
        shapes = {name: shape for name, (shape, _) in expected.items()}
        given = {name: array.shape for name, array in arrays.items()}
        assert given == shapes, (given, shapes)
        files = {name: self.folder / f"{self._chunks:05d}.{name}.npy" for name in arrays}
        contents: dict[str, Content] = {
            files[name].name: np.ascontiguousarray(array, expected[name][1]) for name, array in arrays.items()
        }
        replace_files(self.folder, contents)
        sums = {name: (file.stat().st_size, checksum(file)) for name, file in files.items()}
        self._append({"passages": passages, "files": sums})
        self._chunks += 1
        self.done += passages

    def finish(self) -> None:
        """Marks the trace as complete."""
        if not self.complete:
            self._append({"complete": True})
        self.complete = True

    def _append(self, entry: Mapping[str, Any]) -> None:
        path = self.folder / INDEX
        try:
            whole = sum(len(line) + 1 for line in finished_lines(path))
            with path.open("ab") as file:
                file.truncate(whole)  # removes the part of a line that a killed process left
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ValueError(f"cannot write to {path}: {error}; make room and start again") from error


def finished_lines(path: Path) -> list[bytes]:
    """Returns the complete lines of a file that may still be written to.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    except OSError as error:
        raise ValueError(f"{path}: expected the index of a trace, got {error}; copy it again") from None


def checksum(path: Path) -> int:
    """Returns the CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a header as JSON reads it back, with its settings beside the other fields."""
    flat: dict[str, Any] = json.loads(json.dumps(record))
    return flat | flat.pop("settings")
