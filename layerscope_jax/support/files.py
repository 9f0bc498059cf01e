"""Reads JSON with errors that say what to do, and writes files completely or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np

Content: TypeAlias = "str | bytes | np.ndarray | Mapping[str, np.ndarray] | Callable[[Path], object]"
"""Content of a file to write; see `replace_files`."""

_SEEKING = threading.Lock()  # a file has one position for all threads
_MOST_READ = 4 << 20

READ_ONLY = os.O_RDONLY | getattr(os, "O_BINARY", 0)
"""Opens a file for reading; Windows would translate its line ends otherwise."""

_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}

_MARKS = {
    b"\xef\xbb\xbf": "a byte order mark before it",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def is_there(path: Path) -> bool:
    """Whether a file or folder exists at a path.

    Raises:
        ValueError: if that cannot be determined, or if it is a link to a file that does not exist.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ValueError(f"{path}: expected a file that can be read, got {error.strerror}") from None
    try:
        path.stat()
    except FileNotFoundError:
        raise ValueError(
            f"{path}: expected a file, got a link to {os.readlink(path)}, which is not there; copy it again"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: expected a file that can be read, got {error.strerror}") from None
    return True


def parse_json(content: bytes) -> Any:
    """Returns the value of JSON in UTF-8, read strictly.

    Raises:
        ValueError: if it is not JSON, names a key twice, or holds NaN, an infinity or a number that is too
            large.

    >>> parse_json(b'{"a": [1, {"b": 1e400}]}')
    Traceback (most recent call last):
    ValueError: a[1].b: expected a finite number, got inf
    """
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            raise ValueError(f"expected UTF-8, got {encoding}; save it as plain UTF-8")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected UTF-8, got the byte 0x{content[error.start]:02x} at {error.start}; save it as UTF-8"
        ) from None
    odd: list[float] = []  # floats that are not finite; only if there are some are they located

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            odd.append(value)
        return value

    try:
        value = json.loads(text, object_pairs_hook=_object, parse_float=number, parse_constant=number)
    except RecursionError:
        raise ValueError("expected JSON nested a few levels deep, got hundreds or more") from None
    except ValueError as error:
        if "int_max_str_digits" in str(error) or "integer string conversion" in str(error):
            raise ValueError("expected numbers of ordinary length, got one of thousands of digits") from None
        raise
    if odd:
        where, infinite = next(item for item in _numbers(value) if not math.isfinite(item[1]))
        raise ValueError(f"{where}: expected a finite number, got {infinite}")
    return value


def read_json(file: Path, remedy: str = "download it again") -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
        file: path of the file.
        remedy: what to do if the file is not JSON.

    Raises:
        ValueError: if the file is missing or holds anything else (see `parse_json`).
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{file}: expected this file, found none; is the download complete?") from None
    except OSError as error:
        raise ValueError(f"{file}: expected a file that can be read, got {error.strerror}") from None
    try:
        value = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}; {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in record if names.count(name) > 1})
        raise ValueError(f"{', '.join(map(repr, twice))} more than once in one object; keep one")
    return record


def _numbers(value: Any) -> Iterator[tuple[str, float]]:
    """Yields every float in a JSON value with its path; without recursion, whose depth Python limits."""
    left: list[tuple[str, Any]] = [("", value)]
    while left:
        where, item = left.pop()
        if isinstance(item, dict):
            left += ((f"{where}.{key}" if where else key, inner) for key, inner in item.items())
        elif isinstance(item, list):
            left += ((f"{where}[{index}]", inner) for index, inner in enumerate(item))
        elif isinstance(item, float):
            yield where, item


def user_cache() -> Path:
    """Returns this package's folder in the user's cache folder; it need not exist.

    Raises:
        RuntimeError: if the user has no home folder.
    """
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        named = os.environ.get("XDG_CACHE_HOME", "")
        base = Path(named) if os.path.isabs(named) else home / ".cache"  # as the XDG specification requires
    return base / "layerscope_jax"


def write_file(file: Path, content: Content) -> None:
    """Writes one file, completely or not at all, as `replace_files` does."""
    replace_files(file.parent, {file.name: content})


def replace_files(folder: Path, contents: Mapping[str, Content]) -> None:
    """Writes files into a folder under temporary names, and renames them once all are complete and on disk.

    A process that opens one of the files meanwhile gets the complete old or the complete new file. A failure
    or an interrupt leaves all old files or, once the last is renamed, all new files. A kill or a power cut
    between two of the renames, which take microseconds, leaves some files new and some old, because no file
    system renames several at once; the old version of each new file is then beside it, under a name that ends
    in ".old".

    Args:
        folder: created if needed.
        contents: file name -> content: text (written as UTF-8), bytes, an array (`.npy`), arrays by name
            (`.npz`), or a function that writes to the path that it is called with, an empty file.

    Raises:
        ValueError: if a file cannot be written. After this or any other exception no new file remains, and
            the old files are unchanged.
    """
    swaps: list[_Swap] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            swaps.append(_Swap(folder / name))
            swaps[-1].prepare(content)
        try:
            for swap in swaps:
                swap.replace(keep_old=len(swaps) > 1)
        except BaseException:
            _undo(swaps)
            raise
        sync(folder)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error}; choose another folder or make room") from error
    finally:
        for swap in swaps:
            for left in (swap.new, swap.old):
                with suppress(OSError):
                    left.unlink()


def _put(file: Path, content: Content) -> None:
    """Writes content to an existing file."""
    if isinstance(content, str):
        file.write_text(content, encoding="utf-8")
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif callable(content):
        content(file)
    else:
        import numpy as np  # only if there are arrays, so that commands without them start sooner

        with file.open("wb") as opened:  # an open file, because NumPy adds an ending to a name
            if isinstance(content, Mapping):
                arrays: Any = dict(content)
                np.savez_compressed(opened, **arrays)
            else:
                np.save(opened, content)


class _Swap:
    """Replacement of one file: the new content and the old file, each under a temporary name beside it."""

    def __init__(self, final: Path):
        self.final = final
        # No other process or call uses these names; the dot hides them in most listings.
        token = f".{final.name[:40]}.{secrets.token_hex(6)}"
        self.new, self.old = final.with_name(token + ".tmp"), final.with_name(token + ".old")
        self.had_old: bool | None = None  # not known before the renames begin

    def prepare(self, content: Content) -> None:
        os.close(os.open(self.new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        _put(self.new, content)
        sync(self.new)

    def replace(self, keep_old: bool) -> None:
        if self.final.is_dir() and not self.final.is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.final))
        self.had_old = os.path.lexists(self.final)
        if self.had_old and keep_old:
            try:
                os.link(self.final, self.old, follow_symlinks=False)
            except (OSError, NotImplementedError):  # no links: the file is missing for a moment
                os.rename(self.final, self.old)
        os.replace(self.new, self.final)

    def undo(self) -> None:
        """Restores the old file, wherever `replace` stopped; may be called again."""
        if os.path.lexists(self.old):
            os.replace(self.old, self.final)
        elif self.had_old is False and not os.path.lexists(self.new):
            self.final.unlink(missing_ok=True)


def _undo(swaps: list[_Swap]) -> None:
    for _ in range(3):  # a second interrupt may stop what the first one started
        with suppress(KeyboardInterrupt):
            for swap in reversed(swaps):
                swap.undo()
            return


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # some systems cannot open folders
            return
        raise
    try:
        os.fsync(opened)
    except OSError as error:
        # Some file systems cannot sync folders, and pipes cannot be synced.
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(opened)


def _seek_and_read(opened: int, size: int, offset: int) -> bytes:
    """Does what `os.pread` does, one thread at a time: Windows has no such call."""
    with _SEEKING:
        os.lseek(opened, offset, os.SEEK_SET)
        return os.read(opened, size)


pread: Callable[[int, int, int], bytes] = getattr(os, "pread", _seek_and_read)
"""Returns at most as many bytes of an open file, from an offset; several threads may call it."""


def _read_and_copy(opened: int, memories: Sequence[Any], offset: int) -> int:
    found = pread(opened, min(len(memories[0]), _MOST_READ), offset)
    memories[0][: len(found)] = found
    return len(found)


preadv: Callable[[int, Sequence[Any], int], int] = getattr(os, "preadv", _read_and_copy)
"""Reads into the first of some memories, from an offset of an open file; returns how many bytes came."""


def state_of(opened: int) -> tuple[int, ...]:
    """Returns what tells an open file from what it becomes when somebody writes to it or replaces it."""
    status = os.fstat(opened)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
