"""Handles: what `Engine.submit` returns."""

from __future__ import annotations

from collections.abc import Iterator

from layerscope_jax.generation.calls import Call
from layerscope_jax.generation.completions import Completion, Completions, Token
from layerscope_jax.generation.loop import Loop


class Handle:
    """A submitted request: iterate over it for its tokens, or wait for its `result`.

    A thread that waits for its tokens runs the engine's steps, in which the running requests of all other
    handles get tokens too; so threads that each wait for their own handle advance together. Several threads
    may iterate over a handle, and more than once: each iteration yields all tokens from the first. A handle
    that is garbage-collected cancels its request.

    Args:
        engine: the engine that runs the request; the handle keeps it alive.
        loop: the engine's loop.
        call: a call with this request alone.

    Example::

        handles = [engine.submit(prompt, max_new_tokens=64) for prompt in ("Call me", "def main():")]
        for token in handles[0]:
            print(token.text, end="")
        handles[1].result().text
    """

    def __init__(self, engine: object, loop: Loop, call: Call):
        self._engine, self._loop, self._call = engine, loop, call

    def __iter__(self) -> Iterator[Token]:
        """Yields every token as soon as it is known, beginning with those that are known already.

        Raises:
            ValueError: if the engine was closed.
            TransferError: if an expert could not be copied to the device. Any other exception in a step that
                this iteration runs, including an interrupt, is raised too, and the request is then aborted.
        """
        yield from self._loop.follow(self._call)  # a generator method keeps the handle alive while it is read

    def result(self) -> Completion:
        """Waits for the last token and returns the whole `Completion`; raises what iterating raises.

        Of a request with `n` samples it returns the first; `results` returns all.
        """
        return self.results()[0]

    def results(self) -> Completions:
        """Waits for the last token and returns a `Completion` for each sample; raises as iterating does."""
        return self._loop.answer(self._call)

    def advance(self) -> None:
        """Runs one step of the engine, in which all running requests get tokens, unless this one has ended.

        For a thread that runs the steps for many handles, and reads their tokens by `since`.

        Raises:
            ValueError, TransferError: as iterating does; the request is then aborted.
        """
        self._loop.advance(self._call)

    def since(self, count: int) -> tuple[list[Token], bool]:
        """Returns the tokens that are known after the first `count`, and whether these are the last; does not
        wait."""
        ended = self._call.ended  # read before the log: an ended call logs no more tokens
        return self._call.log[count:], ended

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that a prefix cache held, known with the first new token."""
        return self._call.cached_tokens

    def scheduled(self, sample: int) -> float:
        """Returns when the prompt of a sample began to be computed, as time (s) of `time.perf_counter`; known
        with the sample's first token."""
        began = self._call.states[sample].scheduled
        assert began is not None
        return began

    def cancel(self) -> None:
        """Ends the request at the next step boundary, with `finish_reason` "abort"; does not wait.

        Its slot is then free for other requests, whose tokens do not change. It may be called at any time,
        from any thread, and more than once; it has no effect on a request that has ended.
        """
        self._loop.cancel(self._call)

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._call.ended

    def __del__(self) -> None:
        self._loop.cancel(self._call)
