"""The engine: a model, a budget and a policy, ready to generate."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import jax

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.config import OffloadConfig
from layerscope_jax.formats import PlainFormat
from layerscope_jax.generation.batching import Batch, Running
from layerscope_jax.generation.detokenize import continuation
from layerscope_jax.generation.progress import progress_bar
from layerscope_jax.generation.requests import (
    Completion,
    Completions,
    Request,
    Token,
    batch_of,
    check_options,
    encode_prompts,
    make_requests,
)
from layerscope_jax.kernels.cpu import default_threads
from layerscope_jax.offload.executors import HostExperts
from layerscope_jax.offload.link import Transfers
from layerscope_jax.offload.residency import Residency
from layerscope_jax.offload.rooms import Rooms
from layerscope_jax.prediction.forecasts import Forecasts
from layerscope_jax.prediction.predictors import make_predictor
from layerscope_jax.profiling import measure as calibration
from layerscope_jax.profiling.machine_profile import costs_of
from layerscope_jax.runtime.accounts import Account, count_for, stats_of
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.runtime.non_finite import why_not_finite
from layerscope_jax.runtime.resident import ResidentOnCpu
from layerscope_jax.runtime.statistics import Times
from layerscope_jax.runtime.turns import Turns
from layerscope_jax.runtime.warmup import rehearsal
from layerscope_jax.runtime.whole import WholeModel, new_caches
from layerscope_jax.scheduling.baselines import Resident
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.guard import Guard
from layerscope_jax.scheduling.plan import Policy
from layerscope_jax.scheduling.registry import make_policy
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.compile_cache import Compilations, counted
from layerscope_jax.support.machine import cpu_device
from layerscope_jax.support.units import is_integer, parse_bytes

Turn = Callable[[], AbstractContextManager]

logger = logging.getLogger(__name__)


class Engine:
    """Generates with a model whose experts live in host memory, within a budget of device memory.

    Whatever the budget and the policy, the tokens are the same; only the time differs. An engine keeps what
    is resident from one call to the next. It is a context manager; leaving it ends its threads.

    Several threads may call one engine: they take turns. A call of `generate` is one turn, unless it is given
    `on_token`; then, and with streams, each step is, so that calls may go on beside and within each other.
    Tokens, plans and counts are each call's own. No setting of JAX's that a caller has made, in a `with`
    statement or for the process, has a part in the tokens. In forks of the process, and in functions that JAX
    traces, there can be no engine: both are refused.

    Args:
        model: from `layerscope_jax.load`.
        config: budget, policy, numerics; the default keeps everything resident.
        device: the accelerator; None for the one that the model was loaded onto, and no other may be named.
        host_device: the JAX CPU device that computes experts on the host; None for the last one. Without an
            accelerator it takes turns with `device`, also where JAX has several CPU devices: the cores are
            the same.
        copy: how one array is put on the device; another than `jax.device_put` only to inject faults.

    Raises:
        ValueError: if the policy is unknown, the budget too small for it and what the predictor keeps on the
            device, the profile or predictor another machine's or model's, or the model on another device.

    Example::

        model = layerscope_jax.load("path/to/checkpoint")
        config = layerscope_jax.OffloadConfig(device_budget="2GiB")
        engine = layerscope_jax.Engine(model, config)
        result = engine.generate(["Call me Ishmael.", "def main():"], max_new_tokens=64)
        [(one.text, one.finish_reason) for one in result], result.stats
    """

    def __init__(
        self,
        model: Model,
        config: OffloadConfig | None = None,
        *,
        device: jax.Device | None = None,
        host_device: jax.Device | None = None,
        copy: Callable[[jax.Array, jax.sharding.Sharding], jax.Array] = jax.device_put,
    ):
        problems, device_or_none = Problems(), "one of jax.devices() or None"
        problems.expect(isinstance(model, Model), "model", "a Model, as layerscope_jax.load gives one", model)
        problems.expect(
            isinstance(config, OffloadConfig | None), "config", "an OffloadConfig or None", config
        )
        problems.expect(isinstance(device, jax.Device | None), "device", device_or_none, device)
        problems.expect(
            isinstance(host_device, jax.Device | None), "host_device", device_or_none, host_device
        )
        problems.expect(callable(copy), "copy", "a function as jax.device_put", copy)
        problems.raise_any()
        self._rooms = Rooms(self)
        self._turns = Turns(self._rooms.step)
        self._costs: HardwareProfile | None = None
        self._error: str | None = None  # why logits were not finite, once they were
        self.model = model
        self.config = config or OffloadConfig()
        self.device = device or model.device
        if self.device != model.device:
            raise ValueError(
                f"device must be the model's own, {model.device}, got {self.device}; "
                "load the model with device= for another"
            )
        with self._turns.turn():
            self._build(host_device, copy)

    def _build(self, host_device: jax.Device | None, copy: Callable[..., jax.Array]) -> None:
        """Makes the rooms, and the runner that goes through them."""
        model, config, bank = self.model, self.config, self.model.bank
        self.budget_bytes = (
            bank.total_bytes
            if config.device_budget is None
            else parse_bytes(config.device_budget, "device_budget")
        )
        policy = make_policy(config.policy)
        wanted = config.predictor
        if wanted is None and isinstance(policy, Guard):
            wanted = "gate"  # the best that needs no training
        predictor = None if wanted is None else make_predictor(wanted)
        bandwidth = None
        if config.emulated_link_bandwidth is not None:
            bandwidth = parse_bytes(config.emulated_link_bandwidth, "emulated_link_bandwidth")
        profile = costs_of(config.profile, model, bandwidth)
        # Where everything fits there is nothing to decide, unless the user decided otherwise.
        fits = self.budget_bytes >= bank.total_bytes
        left_to_us = isinstance(config.policy, str) and config.policy != "host-only"
        everything = fits and (left_to_us or isinstance(policy, Resident))
        self.runner: WholeModel | LayerByLayer
        # Packed experts are computed as they lie, which is not how a whole model has them.
        one_program = isinstance(bank.format, PlainFormat) and WholeModel.is_faster_on(self.device)
        if everything and config.numerics == "fast" and one_program:
            self.policy: Policy = Resident()
            self.runner = WholeModel(model)
            return
        if everything and one_program:
            logger.warning(
                "every expert fits on %s: OffloadConfig(numerics='fast') runs a step as one program there, "
                "without Python between layers; its logits agree with those of other budgets to rounding",
                self.device,
            )
        self.policy = Resident() if everything else policy
        geometry = model.geometry(self.budget_bytes // bank.expert_bytes)
        threads = config.host_threads or default_threads(self.device)
        on_cpu = self.device.platform == "cpu"
        with self._rooms.opening():
            host = self._rooms.add(
                HostExperts(bank, host_device or cpu_device(), threads, shares_inputs=on_cpu)
            )
            transfers = self._rooms.add(Transfers(bank, self.device, bandwidth, copy))
            forecasts = self._rooms.add(Forecasts(None if everything else predictor, model, geometry))
            # What the predictor keeps on the device comes first; experts have the rest.
            residency = Residency(forecasts.beside(self.budget_bytes), bank.expert_bytes)
            geometry = replace(geometry, slots=residency.slots)
            if profile is None and self.policy.uses_costs:
                profile = calibration.measure(model, host, transfers, residency.slots)
            state = forecasts.explained(self.budget_bytes, lambda: self.policy.init(geometry, profile))
            self._costs = profile
            in_programs = host.inside is not None and host.inside.target is not None
            runner = ResidentOnCpu if everything and in_programs else LayerByLayer
            self.runner = runner(model, self.policy, state, residency, transfers, host, forecasts)
            if everything:
                self.runner.preload()

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Request],
        *,
        max_num_seqs: int = 32,
        progress: bool = False,
        on_token: Callable[[Token], object] | None = None,
        record_plans: bool = False,
        bound: bool = False,
        **settings: Any,
    ) -> Completions:
        """Continues every prompt.

        Args:
            prompts: texts, lists of token ids, or `Request`s, in any mixture.
            max_num_seqs: how many run at once. When some end, waiting ones take their slots while the others
                go on (see `layerscope_jax.generation.batching`).
            progress: whether to show a bar on stderr.
            on_token: is given each token when it is known. It may use the engine itself; what it raises ends
                the call.
            record_plans: whether to keep every layer's decision in the result.
            bound: whether to say which share of the least possible time the decode steps reached, by this
                machine's costs; takes some seconds more.
            **settings: of `Request`, for prompts that are not one: max_new_tokens, temperature, top_k, top_p,
                seed, stop_token_ids. There must be such a prompt.

        Raises:
            ValueError: for settings out of range or unknown, for an empty or too long prompt, naming each, if
                the engine was closed, if a bound is asked for where no costs are known, and where there can
                be no engine (see above).
            TransferError: if an expert could not be copied to the device.
        """
        self._turns.check()
        requests = make_requests(prompts, settings)
        check_options(on_token, progress=progress, record_plans=record_plans, bound=bound)
        if bound and self._costs is None:
            raise ValueError(
                "a bound needs the costs of this machine: give OffloadConfig(profile=) what `layerscope "
                "calibrate` measured, or a policy that weighs costs; and a budget with something to decide"
            )
        running = self._running(requests, max_num_seqs)
        account, times = Account([] if record_plans else None, [] if bound else None), Times()
        errors: dict[int, str] = {}
        pieces: list[list[str]] = [[] for _ in requests]
        whole: Turn = self._turns.turn
        each: Turn = nullcontext
        if on_token is not None:  # which may call anybody, who may wait for a turn
            whole, each = each, whole
        with whole():
            began = time.perf_counter()
            with progress_bar(requests) if progress else nullcontext(lambda event: None) as advance:
                for event in self._run(running, int(max_num_seqs), account, times, each):
                    pieces[event.request].append(event.text)
                    if event.error is not None:
                        errors[event.request] = event.error
                    advance(event)
                    if on_token is not None:
                        on_token(event)
            total_s = time.perf_counter() - began
            with each():
                count_for(self.runner, None)
                stats = stats_of(
                    self.runner,
                    account,
                    times,
                    total_s,
                    prompts=len(running),
                    new_tokens=sum(len(one.tokens) for one in running),
                    budget_bytes=self.budget_bytes,
                    costs=self._costs,
                )
        completions = [
            Completion(
                text="".join(pieces[one.index]),
                token_ids=one.tokens,
                finish_reason=one.finish_reason or "",
                stats=stats,
                error=errors.get(one.index),
            )
            for one in running
        ]
        return Completions(completions, stats, account.plans or [])

    def stream(
        self, prompts: Sequence[str | Sequence[int] | Request], *, max_num_seqs: int = 32, **settings: Any
    ) -> Iterator[Token]:
        """As `generate`, but yields each `Token` when it is known; bad input is refused at once."""
        self._turns.check()
        running = self._running(make_requests(prompts, settings), max_num_seqs)
        return self._run(running, int(max_num_seqs), Account(), Times(), self._turns.turn)

    def warmup(
        self, *, prompt_tokens: int, max_num_seqs: int = 32, new_tokens: int = 64, sampled: bool = False
    ) -> Compilations:
        """Compiles what `generate` needs for batches of one size, so that none waits for it.

        The size is that of a whole batch. Requests that join it later, fewer at once, have prefill programs
        of their own for each power of two of them, compiled when they first come: as dear as the batch's, and
        only needed where more requests come than there are slots. Having warmed up with that `max_num_seqs`
        too (`batching.joining` says which), only one small program is left. Which programs of experts a
        prefill needs hangs on how tokens fall to experts, so all are compiled that can be: on each
        side that computes, in each phase, one for each of up to 21 shapes (`possible_groups` of
        `experts.grouping`); for an accelerator up to log2(T K) + 2 more, which place what the host computed;
        and some dozen others. `use_compilation_cache` spares the next process most of it.

        What is resident or on its way, statistics, what policy and predictor have learned: all stay as they
        are. The policy is asked once a phase, and its answer dropped. For the while, one expert more than the
        budget holds is on the device, and a batch's caches.

        Args:
            prompt_tokens: of the longest prompt of a batch.
            max_num_seqs: as of `generate`.
            new_tokens: `max_new_tokens` of the request that gets to the highest position.
            sampled: whether any request has a temperature.

        Returns:
            How many programs were compiled, or read from a cache on disk.

        Raises:
            ValueError: for sizes that the model or `generate` does not take, or if the engine was closed.
        """
        requests = batch_of(self.model.config, prompt_tokens, max_num_seqs, new_tokens, sampled)
        running = self._running(requests, max_num_seqs)
        with self._turns.turn(), counted() as found:
            steps = self._batch(running, int(max_num_seqs), Times(), rehearsal(self.runner).step).run()
            made = 0  # tokens: of all prefills, and of a decode step
            while made < 2 * max_num_seqs and (events := next(steps, None)) is not None:
                made += len(events)
        return found

    def close(self) -> None:
        """Ends the engine's threads; it generates no more. A step that another thread is at is waited for."""
        self._rooms.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, requests: Sequence[Request]) -> list[list[int]]:
        config = self.model.config
        return encode_prompts(
            requests, self.model.tokenizer, config.max_position_embeddings, config.vocab_size
        )

    def _running(self, requests: Sequence[Request], max_num_seqs: int) -> list[Running]:
        """The requests, as they are before their first step; refuses what no step can do."""
        self._check_open()
        if isinstance(self.runner, LayerByLayer):
            self.runner.forecasts.check()
        if not is_integer(max_num_seqs) or max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be 1 or more, got {repr(max_num_seqs)[:60]}")
        prompts = self._encode(requests)
        room = [self.model.config.max_position_embeddings - len(prompt) for prompt in prompts]
        return [
            Running(index, request, prompt, min(request.max_new_tokens, left))
            for index, (request, prompt, left) in enumerate(zip(requests, prompts, room, strict=True))
        ]

    def _run(
        self,
        running: list[Running],
        max_num_seqs: int,
        account: Account,
        times: Times,
        turn: Turn,
    ) -> Iterator[Token]:
        """Generates; `turn` is taken for each step, and given up before its tokens are."""

        def step(*inputs: Any) -> Any:
            return self.runner.step(*inputs)

        steps = self._batch(running, max_num_seqs, times, step).run()
        while True:
            with turn():
                self._check_open()  # a stream may outlive its engine
                count_for(self.runner, account)
                events = next(steps, None)
            if events is None:
                return
            yield from events

    def _batch(
        self, running: list[Running], max_num_seqs: int, times: Times, step: Callable[..., Any]
    ) -> Batch:
        return Batch(
            running,
            max_num_seqs,
            step,
            lambda rows, length: new_caches(self.model, rows, length, self.device),
            self.config.prefill_chunk_size,
            self.model.config.stop_token_ids,
            self.model.tokenizer,
            times,
            self._why_not_finite,
        )

    def _why_not_finite(self) -> str:
        if self._error is None:  # looking through all weights takes as long as reading them
            self._error = why_not_finite(self.model)
        return self._error

    def _check_open(self) -> None:
        if self._rooms.closed:
            raise ValueError("the engine was closed; make a new Engine to generate more")

    def text(self, tokens: list[int], finish: str, prompt: Sequence[int] = ()) -> str:
        """The text of new tokens behind a prompt's; a last token that ended it ("stop") is no part of it."""
        if self.model.tokenizer is None:
            return ""
        return continuation(self.model.tokenizer, tokens, finish, prompt)
