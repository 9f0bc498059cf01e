"""Files: JSON read with errors that say what to do, and files written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np

Content: TypeAlias = "str | bytes | np.ndarray | Mapping[str, np.ndarray] | Callable[[Path], object]"
"""What a file is to hold; see `replace_files`."""

_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}

_MARKS = {
    b"\xef\xbb\xbf": "a byte order mark before it",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def is_there(path: Path) -> bool:
    """Whether there is anything under this name.

    Raises:
        ValueError: if it cannot be told, or if it is a link to a file that is not there.
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
    """Value of JSON in UTF-8, read strictly.

    Raises:
        ValueError: if it is no JSON, names a key twice, or holds NaN, an infinity or a number too large.

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
    odd: list[float] = []  # numbers that are none; looked for only where there are some

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
    """The JSON object in a file.

    Args:
        file: where.
        remedy: what to do if the file is no JSON.

    Raises:
        ValueError: if it is missing or holds something else (see `parse_json`).
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
    """Every float in a JSON value and where it is; not by recursion, for Python's is bounded."""
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
    """The user's cache folder of this package; it need not exist.

    Raises:
        RuntimeError: if the user has no home.
    """
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        named = os.environ.get("XDG_CACHE_HOME", "")
        base = Path(named) if os.path.isabs(named) else home / ".cache"  # as its specification says
    return base / "layerscope_jax"


def write_file(file: Path, content: Content) -> None:
    """Writes one file, whole or not at all, as `replace_files` does."""
    replace_files(file.parent, {file.name: content})


def replace_files(folder: Path, contents: Mapping[str, Content]) -> None:
    """Writes files into a folder under temporary names, and renames them once all are complete and on disk.

    Whoever opens one of the files meanwhile finds the old one or the new one, whole. A failure or an
    interrupt leaves all of the old ones or, once the last is renamed, all of the new ones. For more than one
    file no file system promises as much of a kill or a power cut: between two of the renames, which take
    microseconds, it leaves some files new and some old; the old ones of those then lie beside them, under
    names that end in ".old".

    Args:
        folder: made if needed.
        contents: file name -> what it is to hold: text (as UTF-8), bytes, an array (as `.npy`), arrays by
            name (as `.npz`), or what writes it to the path that it is given, where an empty file is.

    Raises:
        ValueError: if one cannot be written. That, as anything else that writing raises, leaves none of the
            new files behind, and those they were to replace untouched.
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
        _sync(folder)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error}; choose another folder or make room") from error
    finally:
        for swap in swaps:
            for left in (swap.new, swap.old):
                with suppress(OSError):
                    left.unlink()


def _put(file: Path, content: Content) -> None:
    """Fills a file that is there."""
    if isinstance(content, str):
        file.write_text(content, encoding="utf-8")
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif callable(content):
        content(file)
    else:
        import numpy as np  # only where there are arrays: a command's first words should not wait for it

        with file.open("wb") as opened:  # a file, for NumPy adds an ending to a name
            if isinstance(content, Mapping):
                arrays: Any = dict(content)
                np.savez_compressed(opened, **arrays)
            else:
                np.save(opened, content)


class _Swap:
    """A file that is to take another's place, beside both of them."""

    def __init__(self, final: Path):
        self.final = final
        # No other process and no other call has these names; the dot keeps them out of most listings.
        token = f".{final.name[:40]}.{secrets.token_hex(6)}"
        self.new, self.old = final.with_name(token + ".tmp"), final.with_name(token + ".old")
        self.had_old: bool | None = None  # not known before the renames begin

    def prepare(self, content: Content) -> None:
        os.close(os.open(self.new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        _put(self.new, content)
        _sync(self.new)

    def replace(self, keep_old: bool) -> None:
        if self.final.is_dir() and not self.final.is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(self.final))
        self.had_old = os.path.lexists(self.final)
        if self.had_old and keep_old:
            try:
                os.link(self.final, self.old, follow_symlinks=False)
            except (OSError, NotImplementedError):  # without links there is no such file for a moment
                os.rename(self.final, self.old)
        os.replace(self.new, self.final)

    def undo(self) -> None:
        """Puts the old file back, from wherever `replace` stopped; twice is as good as once."""
        if os.path.lexists(self.old):
            os.replace(self.old, self.final)
        elif self.had_old is False and not os.path.lexists(self.new):
            self.final.unlink(missing_ok=True)


def _undo(swaps: list[_Swap]) -> None:
    for _ in range(3):  # the user may be impatient, and interrupt what the first interrupt began
        with suppress(KeyboardInterrupt):
            for swap in reversed(swaps):
                swap.undo()
            return


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # some systems open no folders
            return
        raise
    try:
        os.fsync(opened)
    except OSError as error:
        # Not every file system has this for folders, and what is on none (a pipe) cannot have it.
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(opened)
