"""A runtime to compare with, in a process of its own: JSON lines in, JSON lines out.

The other side may be another interpreter, with other packages: this file needs the standard library alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TextIO


class PeerProcess:
    """Runs a module of this folder in `python` until it is closed; the module calls `serve`.

    Args:
        name: of the runtime, for messages.
        python: its interpreter.
        module: "benchmarks.hf_peer" say.
        arguments: of its command line.
        environment: variables beside those of this process.

    Attributes:
        pid: of the process.
        first: what it said when it had started.

    Raises:
        ValueError: if the process ends; what it said is on stderr.
    """

    def __init__(
        self, name: str, python: Path, module: str, arguments: list[str], environment: dict[str, str]
    ):
        self._name = name
        offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        self._process = subprocess.Popen(
            [str(python), "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | offline | environment,
        )
        self.pid = self._process.pid
        try:
            self.first = self._answer()
        except ValueError:
            self.close()
            raise

    def ask(self, **work: Any) -> dict[str, Any]:
        """Has it work; gives its answer, which is {"error": ...} where it can not."""
        assert self._process.stdin is not None
        print(json.dumps(work), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"the process that runs {self._name} ended with code {self._process.wait()}")
        return json.loads(line)


def take_stdout() -> TextIO:
    """Where answers go, in the other process: what a library prints after this goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(answers: TextIO, first: dict[str, Any], run: Callable[..., dict[str, Any]]) -> None:
    """The other process, from when it has started until nobody asks any more."""
    print(json.dumps(first), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = run(**json.loads(line))
        except Exception as error:  # one way of computing that it does not have, or memory that is short
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
