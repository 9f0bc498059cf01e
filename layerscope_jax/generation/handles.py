"""Handles: what `Engine.submit` returns."""

from __future__ import annotations

from collections.abc import Iterator

from layerscope_jax.generation.calls import Call
from layerscope_jax.generation.completions import Completion, Token
from layerscope_jax.generation.loop import Loop


class Handle:
    """A request that an engine was given.

    Whoever waits for its tokens drives the engine's steps, in which the requests of all other handles get
    theirs too; so threads that each wait for a handle of their own come along together. It may be gone
    through by several threads, and again: each time all tokens come. A handle that nobody holds any more is
    cancelled.

    Args:
        engine: that is at it, which stays open while somebody holds the handle.
        loop: of the engine.
        call: of the request alone.

    Example::

        handles = [engine.submit(prompt, max_new_tokens=64) for prompt in ("Call me", "def main():")]
        for token in handles[0]:
            print(token.text, end="")
        handles[1].result().text
    """

    def __init__(self, engine: object, loop: Loop, call: Call):
        self._engine, self._loop, self._call = engine, loop, call

    def __iter__(self) -> Iterator[Token]:
        """Yields every token when it is known, the first ones too where they came before.

        Raises:
            ValueError: if the engine was closed.
            TransferError: if an expert could not be copied to the device. Whatever else a step that it drives
                fails with, an interrupt too, is raised as well; the request is then aborted.
        """
        yield from self._loop.follow(self._call)  # as a method, so that who reads it holds the handle

    def result(self) -> Completion:
        """Waits for the last token and returns the whole; raises as going through it does."""
        return self._loop.answer(self._call)[0]

    def cancel(self) -> None:
        """Ends the request at the next step boundary, with `finish_reason` "abort"; does not wait.

        Its slot is free for others then, whose tokens stay what they are. May be called at any time, from any
        thread and again; of a request that has ended nothing changes.
        """
        self._loop.cancel(self._call)

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._call.ended

    def __del__(self) -> None:
        self._loop.cancel(self._call)
