"""The loop of a running engine: calls arrive at any time and share its steps, run by the waiting threads.

No background thread runs the steps. A thread that waits for a token takes the engine's turn and runs a step,
in which every running request gets one; other threads find their tokens in the logs of their calls when they
get the turn. A run lasts from when an idle engine gets a call until it is idle again, so a call that overlaps
no other has a run of its own.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.generation.calls import Call, RequestState
from layerscope_jax.generation.completions import Completions, Token
from layerscope_jax.generation.fitting import Fitting
from layerscope_jax.generation.limits import Limits
from layerscope_jax.generation.prefixes import Prefixes
from layerscope_jax.generation.requests import Request, with_seed
from layerscope_jax.generation.run import Run
from layerscope_jax.generation.shares import join, leave
from layerscope_jax.generation.slots import Slots
from layerscope_jax.generation.structured import Structures
from layerscope_jax.runtime.accounts import Account, run_stats
from layerscope_jax.runtime.non_finite import why_not_finite
from layerscope_jax.runtime.runner import Runner
from layerscope_jax.runtime.turns import Turns


class Loop:
    """Waiting and running calls, and the run that they share.

    A step that fails or is interrupted destroys the caches. Its exception is raised in the thread that ran
    the step, and the requests of that thread's call are aborted; requests of other calls are prefilled again
    in the next step, with the tokens that they have so far. The loop waits for nothing but the turn.

    If the device's memory runs out in a step, and `fitting` may give some of it back, the loop goes on with
    another runner, and all requests are prefilled again in the same way.

    Args:
        model: the model.
        runner: runs the steps.
        turns: turns of the engine.
        is_closed: returns whether the engine is closed, so that no step may begin.
        new_caches: `(rows, length)` -> empty caches.
        limits: on what runs at once; with a prefix cache, slots stay from run to run.
        budget_bytes: device budget (bytes) of the engine, for statistics.
        structures: compiles the grammars of requests.
        fitting: makes another runner when the device's memory runs out; None for nothing that does.

    Attributes:
        account: counts of the run in progress, or of the last one.
    """

    def __init__(
        self,
        model: Model,
        runner: Runner,
        turns: Turns,
        is_closed: Callable[[], bool],
        new_caches: Callable[[int, int], Any],
        limits: Limits,
        budget_bytes: int,
        structures: Structures,
        fitting: Fitting | None = None,
    ):
        self._model, self._runner, self._turns, self._is_closed = model, runner, turns, is_closed
        self._slots: Slots | None = None  # of the run, or of the one before
        self._new_caches, self._limits = new_caches, limits
        self._budget_bytes, self._structures, self._fitting = budget_bytes, structures, fitting
        self._ids = itertools.count()
        self._inbox: deque[Call] = deque()  # calls that no step knows of yet
        self._cancelled: deque[Call] = deque()
        self._calls: dict[Call, None] = {}  # calls that have not ended, in order of arrival
        self._run: Run | None = None
        self.account = Account()
        self._settled = True  # whether these agree; False after an interrupt
        # Cached: reading all weights takes a while.
        self._why_not_finite = functools.cache(functools.partial(why_not_finite, model))
        # An attribute, because modules' names are gone when the last objects are collected.
        self._leaving = sys.is_finalizing

    # ---- any thread's side -------------------------------------------------------------------------------

    def call(
        self,
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        *,
        record_plans: bool,
        bound: bool,
        timeline: bool = False,
    ) -> Call:
        """Returns a call for requests and their prompts' token ids, which has yet to be submitted.

        Raises:
            ValueError: if a request's grammar cannot be compiled.
        """
        call = Call(record_plans, bound, timeline)
        context = self._model.config.max_position_embeddings
        call.states = [
            RequestState(
                next(self._ids), index, request, prompt, most, call, sample, self._structures.guide(grammar)
            )
            for index, (request, prompt) in enumerate(zip(map(with_seed, requests), prompts, strict=True))
            for most in [min(request.max_new_tokens, context - len(prompt))]
            for grammar in [request.structure]
            for sample in range(request.n)
        ]
        return call

    def submit(self, call: Call) -> None:
        """Queues a call for the next step; does not wait."""
        call.began = time.perf_counter()
        self._inbox.append(call)

    def cancel(self, call: Call) -> None:
        """Ends a call's requests at the next step, or now if they run and no step does; does not wait.

        It may be called at any time and more than once, even by the garbage collector: without JAX.
        """
        if call.ended or call.cancelled or self._leaving():
            return
        call.cancelled = True
        self._cancelled.append(call)
        with self._turns.turn_if_free() as taken:
            if taken and self._settled:
                self._abort_cancelled()

    def follow(self, call: Call) -> Iterator[Token]:
        """Yields every token of a call from the first on, and runs steps until the call has ended."""
        seen = 0
        while True:
            ended = call.ended  # read before the log: an ended call logs no more tokens
            while seen < len(call.log):
                seen += 1
                yield call.log[seen - 1]
            if ended:
                return
            self._drive(call, seen)

    def finish(self, call: Call) -> None:
        """Runs steps until a call has ended; keeps the turn unless another thread wants it."""
        while not call.ended:
            self._drive(call, 0, to_the_end=True)

    def advance(self, call: Call) -> None:
        """Runs one step, unless a call has ended."""
        self._drive(call, len(call.log))

    def stream(self, call: Call) -> Generator[Token]:
        """Submits a call and yields its tokens; closing the generator cancels the call."""
        self._turns.check()
        try:
            self.submit(call)
            yield from self.follow(call)
        finally:
            self.cancel(call)

    def complete(self, call: Call) -> Completions:
        """Submits a call, waits for it and returns its completions; an exception cancels the call."""
        try:
            self.submit(call)
            self.finish(call)
        finally:
            self.cancel(call)
        return self.answer(call)

    def answer(self, call: Call) -> Completions:
        """Waits for a call to end and returns its completions."""
        self.finish(call)
        with self._turns.turn():
            assert call.counted is not None
            stats = run_stats(
                call.counted,
                self._runner.stats(call.counted),
                call.times,
                call.total_s,
                prompts=len({state.index for state in call.states}),
                new_tokens=sum([len(state.tokens) for state in call.states]),
                budget_bytes=self._budget_bytes,
                budget_cuts=0 if self._fitting is None else self._fitting.cuts,
            )
        return Completions(call.completions(stats), stats, call.counted.plans or [])

    def rehearse(self, call: Call, step: Callable[[], Callable[..., Any]]) -> None:
        """Runs the prefills and one decode step of a call in a run of its own.

        Args:
            call: the call.
            step: returns the step to run them with; asked again if the device's memory ran out in one.
        """
        while self._rehearsal_ran_out(call, step):
            pass

    def _rehearsal_ran_out(self, call: Call, step: Callable[[], Callable[..., Any]]) -> bool:
        run, most = self._new_run(Slots(self._new_caches), len(call.states)), 2 * len(call.states)
        call.log.clear()
        for state in call.states:
            state.recall()
        run.add(call.states)
        made, run_step = 0, step()  # tokens of all prefills and of one decode step
        try:
            while made < most and (states := run.step(run_step)):
                made += len(states)
            if self._limits.prefix_cache:
                run.rehearse_copies(run_step, call.states)
            return False
        except Exception as error:
            if self._fitting is None or not self._fitting.can_shrink(error):
                raise
        del run, run_step
        self._shrink()
        return True

    def close(self) -> None:
        """Lets go of caches that were kept for later requests."""
        self._slots = None

    def check_open(self) -> None:
        """Refuses to begin a step in a closed engine.

        Raises:
            ValueError: if the engine was closed.
        """
        if self._is_closed():
            raise ValueError("the engine was closed; make a new Engine to generate more")

    # ---- within a turn -----------------------------------------------------------------------------------

    def _drive(self, call: Call, seen: int, to_the_end: bool = False) -> None:
        """Takes a turn and runs a step, or all steps, unless the call has new tokens by then."""
        with self._turns.turn():
            if call.ended or (len(call.log) > seen and not to_the_end):
                return
            self.check_open()
            while self._ran_out(call, to_the_end):
                pass

    def _ran_out(self, call: Call, to_the_end: bool) -> bool:
        """Runs a step, or all steps; returns whether memory ran out, so that they have to be repeated."""
        try:
            self._step()
            assert call.ended or call in self._calls, "a call that no step knows of"
            while to_the_end and not (call.ended or self._turns.is_contended):
                self.check_open()
                self._step()
            return False
        except BaseException as error:
            # Before anything else: no thread waits for this call any more.
            before, call.cancelled = call.cancelled, True
            shrinks = self._fitting is not None and self._fitting.can_shrink(error)
            call.cancelled = before or not shrinks
            self._recover()
            if not shrinks:
                raise
        # Out here nothing holds the caches and experts of the step any more, as its error did.
        try:
            self._shrink()
        except BaseException:
            call.cancelled = True
            raise
        return True

    def _shrink(self) -> None:
        """Goes on with a runner that has fewer experts on the device."""
        assert self._fitting is not None
        self._runner.reset(None)
        self._fitting.shrink()
        self._runner, self._budget_bytes = self._fitting.runner, self._fitting.budget_bytes

    def _step(self) -> None:
        """Runs one step for all calls."""
        self._ready()
        if self._run is None:
            return
        self._settled = False
        self._runner.reset(self.account)
        states = self._run.step(self._runner.step, self._runner.score)
        if not states:
            raise AssertionError("requests were left that no step was scheduled for")
        for state in states:
            if state.finish_reason is not None:
                self._close_ended()
                break
        self._settled = True

    def _ready(self) -> None:
        """Adds new calls to the run, and ends cancelled calls."""
        if not self._settled:
            self._recover()
        if not (self._inbox or self._cancelled):
            return
        self._settled = False
        if self._inbox:
            self._begin(self._arrived())
        self._abort_cancelled()

    def _abort_cancelled(self) -> None:
        """Ends cancelled calls that have begun; others stay for the step that begins them."""
        self._settled = False
        for call in [call for call in tuple(self._cancelled) if call not in self._inbox]:
            if call in self._calls and self._run is not None:
                for state in call.unfinished:
                    self._run.abort(state)
            self._cancelled.remove(call)
        self._close_ended()
        self._settled = True

    def _arrived(self) -> list[Call]:
        """Adds the calls that were submitted since the last step to the others, and returns them."""
        new = []
        while self._inbox:
            call = self._inbox[0]  # removed only after it was added to the others
            if call not in self._calls:
                self._calls[call] = None
                new.append(call)
            self._inbox.popleft()
        return new

    def _begin(self, calls: Sequence[Call]) -> None:
        """Adds calls to the run, and begins a run if there is none."""
        if self._run is None:
            slots = self._slots or self._new_slots()
            slots.shrink(sum([len(call.states) for call in calls]))
            self._run, self.account = self._new_run(slots), Account()
        self._runner.reset(None)
        for call in calls:
            if call.joined is None:
                join(call, self.account, self._run.decode_s)
        self._run.add([state for call in calls for state in call.unfinished])

    def _close_ended(self) -> None:
        """Stores the counts of ended calls in them; after the last call, ends the run."""
        ended = [call for call in self._calls if not call.unfinished]
        if not ended:
            return
        assert self._run is not None
        self._runner.reset(None)
        now = time.perf_counter()
        for call in ended:
            leave(call, self.account, self._run.decode_s, now)
            call.ended = True
            del self._calls[call]
        begun = [call.joined.decode_steps for call in self._calls if call.joined is not None]
        self._run.decode_s.forget(min(begun, default=0))
        if not any(call.record_plans for call in self._calls):
            self.account.plans = None
        if not any(call.bound for call in self._calls):
            self.account.decoded = None
        if not any(call.timeline for call in self._calls):
            self.account.timeline = None
        if not self._calls:
            self._run = None
            if not self._limits.prefix_cache:
                self._slots = None

    def _recover(self) -> None:
        """Restores the state after a failed step from the logs of the calls, and begins a new run."""
        self._settled = False
        self._runner.reset(None)
        self._arrived()
        run = self._new_run(self._new_slots())
        if self._run is None:
            self.account = Account()
        else:  # the old run is dropped, because the step may have destroyed its caches
            run.decode_s = self._run.decode_s
        self._run = run
        for call in self._calls:
            if call.joined is None:
                join(call, self.account, run.decode_s)
            for state in call.states:
                state.recall()
                if call.cancelled and state.finish_reason is None:
                    state.begin(self._model.tokenizer)
                    state.end("abort")
        run.add([state for call in self._calls for state in call.unfinished])
        self._cancelled.clear()
        self._close_ended()
        self._settled = True

    def _new_slots(self) -> Slots:
        self._slots = Slots(self._new_caches, Prefixes() if self._limits.prefix_cache else None)
        return self._slots

    def _new_run(self, slots: Slots, most: int | None = None) -> Run:
        return Run(
            self._limits if most is None else self._limits._replace(max_num_seqs=most),
            self._new_caches,
            slots,
            self._model.config.stop_token_ids,
            self._model.tokenizer,
            self._why_not_finite,
        )
