"""Weights on the hub, downloaded so that another process continues what one began.

`huggingface_hub` continues a file within one process only: it gives an incomplete file a random name and
removes it when the download ends. So the weights are downloaded before it is asked for them, over HTTP, into
its cache, under its names and its locks: as `blobs/<etag>.incomplete` until they are complete, then as
`blobs/<etag>`, where it finds them. Its older versions use the same name, so what they began is continued
too.

This applies to files in Git LFS, whose etag is their SHA-256. The name therefore tells which contents a
partial file belongs to, and a file takes its place only after its digest has been compared.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

AT_ONCE = 8
"""Files that are downloaded at the same time, as many as `huggingface_hub` takes."""


@dataclass(frozen=True)
class LargeFile:
    """A file in Git LFS, with what the hub says of its contents."""

    path: str
    sha256: str
    size: int


class Download:
    """A download of a checkpoint's weights.

    Args:
        name: of the checkpoint, on the hub.
        commit: which version of it.
        bar: makes a progress bar, by the arguments of tqdm; its `update` may raise to end the download.
    """

    def __init__(self, name: str, commit: str, bar: Callable[..., Any]) -> None:
        from huggingface_hub import constants  # imported late, because only names need it
        from huggingface_hub.file_download import repo_folder_name

        folder = repo_folder_name(repo_id=name, repo_type="model")
        self._name = name
        self._commit = commit
        self._bar = bar
        self._cache = Path(constants.HF_HUB_CACHE)
        self._blobs = self._cache / folder / "blobs"
        self._locks = self._cache / ".locks" / folder
        self._ended = threading.Event()  # set when one file failed, so that the others stop
        self._counting = threading.Lock()

    def run(self, taken: list[str], left: list[str]) -> None:
        """Downloads the files that match a pattern in `taken`, none in `left`, and are not in the cache.

        Raises:
            OSError: if a file cannot be written, or the hub sent other bytes than it says.
        """
        files = self._missing(taken, left)
        if not files:
            return
        total = sum(file.size for file in files)
        with (
            self._bar(total=total, unit="B", unit_scale=True, desc="Weights", disable=None) as bar,
            ThreadPoolExecutor(min(AT_ONCE, len(files))) as pool,
        ):
            futures = [pool.submit(self._fetch, file, bar) for file in files]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._ended.set()
                for future in futures:
                    future.cancel()
                raise

    def _missing(self, taken: list[str], left: list[str]) -> list[LargeFile]:
        """Returns the files to download; without an answer of the hub none, and its own client says why."""
        from huggingface_hub import HfApi, constants
        from huggingface_hub.file_download import are_symlinks_supported
        from huggingface_hub.utils import filter_repo_objects

        try:
            tree = list(HfApi().list_repo_tree(self._name, revision=self._commit))
        except (OSError, network_error()):
            return []
        files = []
        for entry in filter_repo_objects(
            tree, allow_patterns=taken, ignore_patterns=left, key=lambda entry: entry.path
        ):
            lfs = getattr(entry, "lfs", None)
            if lfs is None or not re.fullmatch("[0-9a-f]{64}", lfs.sha256):
                continue
            shared = getattr(entry, "xet_hash", None)  # in the store that all checkpoints share
            if shared and (self._cache / "blobs" / shared[:2] / shared).exists():
                continue
            if lfs.size <= constants.MAX_HTTP_DOWNLOAD_SIZE and not (self._blobs / lfs.sha256).exists():
                files.append(LargeFile(entry.path, lfs.sha256, lfs.size))
        # Without symbolic links `huggingface_hub` copies a file that it finds: it would be on the disk twice.
        return files if files and are_symlinks_supported(self._cache) else []

    def _fetch(self, file: LargeFile, bar: Any) -> None:
        blob = self._blobs / file.sha256
        blob.parent.mkdir(parents=True, exist_ok=True)
        begun = blob.with_name(blob.name + ".incomplete")
        with ExitStack() as held:
            self._lock(file, held)
            if blob.exists():  # another process had the lock
                self._count(bar, file.size, before=True)
                return
            if begun.exists() and begun.stat().st_size > file.size:
                begun.unlink()
            continued = begun.exists()
            whole = self._receive(file, begun, bar)
            if continued and not whole:
                begun.unlink()
                self._count(bar, -file.size, before=True)
                whole = self._receive(file, begun, bar)
            if not whole:
                begun.unlink()
                raise OSError(f"{file.path} came with another SHA-256 than the hub lists")
            os.replace(begun, blob)

    def _lock(self, file: LargeFile, held: ExitStack) -> None:
        """Waits for the lock that `huggingface_hub` takes for this file too."""
        from huggingface_hub.utils import WeakFileLock

        self._locks.mkdir(parents=True, exist_ok=True)
        while True:
            self._check()
            try:
                held.enter_context(WeakFileLock(self._locks / f"{file.sha256}.lock", timeout=1))
                return
            except TimeoutError:  # checks whether another file failed
                continue

    def _receive(self, file: LargeFile, begun: Path, bar: Any) -> bool:
        """Downloads what is missing of a file, after what was begun; returns whether its digest is right."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        size = begun.stat().st_size if begun.exists() else 0
        self._count(bar, size, before=True)
        # Not appended: where a file system ignores locks, two writers write the same bytes to the same place.
        with begun.open("r+b" if size else "wb") as out:
            out.seek(size)
            http_get(
                hf_hub_url(self._name, file.path, revision=self._commit),
                out,
                resume_size=size,
                headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                expected_size=file.size,
                displayed_filename=file.path,
                tqdm_class=partial(_OneOfSeveral, self, bar),  # type: ignore[arg-type]
            )
        with begun.open("rb") as contents:
            return hashlib.file_digest(contents, "sha256").hexdigest() == file.sha256

    def _count(self, bar: Any, size: int, before: bool = False) -> None:
        """Moves the bar by as many bytes; what came before this download does not count in its speed."""
        self._check()
        with self._counting:
            if before and not bar.disable:  # tqdm gives a bar that is not shown no numbers
                bar.initial += size
            bar.update(size)

    def _check(self) -> None:
        if self._ended.is_set():
            raise RuntimeError("the download has ended")  # seen by nobody: what ended it is reported


class _OneOfSeveral:
    """Progress of one file, on the bar of them all."""

    def __init__(self, download: Download, bar: Any, **_: object) -> None:
        self.update = partial(download._count, bar)

    def __enter__(self) -> _OneOfSeveral:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def network_error() -> type[Exception]:
    """Returns the base of the errors of the HTTP library that this version of `huggingface_hub` uses."""
    from huggingface_hub import errors

    return next(kind for kind in errors.HfHubHTTPError.__mro__[1:] if kind.__name__ == "HTTPError")
