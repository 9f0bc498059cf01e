"""A hub of one checkpoint, on this machine: as much of the Hugging Face hub's protocol as is used."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

NAME, COMMIT, BRANCH = "tiny/olmoe", "0123456789abcdef0123456789abcdef01234567", "main"


@dataclass
class Hub:
    """What a hub has and does.

    Attributes:
        files: their contents, by name.
        revisions: names under which they can be had, each with its commit.
        token: what a reader must send; None if anybody may read.
        answers: status and error code to answer with instead of a file.
        api_answers: the same, for questions about the checkpoint.
        ranges_served: whether parts of a file can be had.
        wrong: files that come with other bytes than are listed.
        lfs: whether weights are in Git LFS, with their SHA-256 as etag.
        pauses: of a file, after how many bytes the server waits for `go`.
        cuts: of a file, after how many bytes the connection breaks off: for each request the next one.
        requests: method, path and range of all that came.
        sent: bytes of its contents, by the file's name.
    """

    files: Mapping[str, bytes]
    revisions: Mapping[str, str] = field(default_factory=lambda: {BRANCH: COMMIT, COMMIT: COMMIT})
    token: str | None = None
    answers: tuple[int, str] | None = None
    api_answers: tuple[int, str] | None = None
    ranges_served: bool = True
    wrong: Set[str] = frozenset()
    lfs: bool = True
    pauses: dict[str, int] = field(default_factory=dict)
    go: threading.Event = field(default_factory=threading.Event)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    url: str = ""

    def ranges(self, name: str) -> list[str | None]:
        """What was asked for of a file, each time: a range, or None for all of it."""
        return [part for method, path, part in self.requests if method == "GET" and path.endswith("/" + name)]

    def fetched(self) -> set[str]:
        """Names of the files whose contents somebody asked for."""
        marker = f"/{NAME}/resolve/"
        return {
            path.split("/", 5)[5] for method, path, _ in self.requests if method == "GET" and marker in path
        }


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Runs a hub; within, this process's huggingface_hub talks to it alone."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", hub.url)
            patch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
            )
            yield hub
    finally:
        hub.go.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Says nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._refuse(401, "GatedRepo")
        api, file = f"/api/models/{NAME}", f"/{NAME}/resolve/"
        if path == api or path.startswith(api + "/"):
            return self._about(path.removeprefix(api).strip("/"))
        if path.startswith(file):
            revision, _, name = path.removeprefix(file).partition("/")
            return self._file(revision, name)
        return self._refuse(404, "RepoNotFound")

    def _about(self, question: str) -> None:
        if self.hub.api_answers:
            return self._refuse(*self.hub.api_answers)
        kind, _, revision = question.partition("/")
        commit = self.hub.revisions.get(revision or BRANCH)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        if kind == "tree":
            return self._json([self._entry(name, content) for name, content in self.hub.files.items()])
        siblings = [{"rfilename": name} for name in self.hub.files]
        return self._json({"id": NAME, "sha": commit, "private": False, "siblings": siblings})

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if self._in_lfs(name):
            entry["lfs"] = {"oid": self._etag(name, content), "size": len(content), "pointerSize": 130}
        return entry

    def _in_lfs(self, name: str) -> bool:
        return self.hub.lfs and name.endswith(".safetensors")

    def _etag(self, name: str, content: bytes) -> str:
        digest = hashlib.sha256 if self._in_lfs(name) else hashlib.sha1
        return digest(content).hexdigest()

    def _file(self, revision: str, name: str) -> None:
        if self.hub.answers:
            return self._refuse(*self.hub.answers)
        commit, content = self.hub.revisions.get(revision), self.hub.files.get(name)
        if commit is None or content is None:
            return self._refuse(404, "RevisionNotFound" if commit is None else "EntryNotFound")
        asked = self.headers.get("Range") if self.hub.ranges_served else None
        start = int((asked or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("X-Linked-ETag" if self._in_lfs(name) else "ETag", f'"{self._etag(name, content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if name in self.hub.wrong:
            content = content[::-1]
        cuts = self.hub.cuts.get(name)
        end = start + cuts.pop(0) if cuts else len(content)
        self.close_connection = end < len(content)
        parts = [content[start:end]]
        if start < (pause := self.hub.pauses.get(name, 0)) < end:
            parts = [content[start:pause], content[pause:end]]
        with suppress(ConnectionError):  # of a reader who was killed
            for number, part in enumerate(parts):
                if number:
                    self.hub.go.wait(60)
                self.wfile.write(part)
                self.hub.sent[name] += len(part)
        return None

    def _json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
