"""Small files: JSON read with errors that say what to do, and folders written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path


def read_json(file: Path, remedy: str = "download it again") -> dict:
    """The JSON object in a file.

    Args:
        file: where.
        remedy: what to do if the file is no JSON.

    Raises:
        ValueError: if it is missing or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: expected this file, found none; is the download complete?") from None
    except OSError as error:
        raise ValueError(f"{file}: expected a file of JSON, got {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"{file}: expected JSON, got some that is nested too deep; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}; {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def replace_files(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes files into a folder under temporary names, and renames them once all are complete.

    Args:
        folder: made if needed.
        writers: file name -> what writes it to the path that it is given.

    Raises:
        ValueError: if one cannot be written. That, as anything else that a writer raises, leaves none of the
            new files behind, and those they were to replace untouched.
    """
    written: list[tuple[Path, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            temporary = folder / f"{name}.tmp"
            written.append((temporary, folder / name))
            write(temporary)
        for temporary, final in written:
            os.replace(temporary, final)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error}; choose another folder or make room") from error
    finally:
        for temporary, _ in written:
            if temporary.parent.is_dir():
                temporary.unlink(missing_ok=True)
