"""The engine: a model, a budget and a policy, ready to generate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

import jax

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.config import OffloadConfig
from layerscope_jax.generation.calls import Call
from layerscope_jax.generation.detokenize import continuation
from layerscope_jax.generation.handles import Handle
from layerscope_jax.generation.loop import Loop
from layerscope_jax.generation.progress import progress_bar
from layerscope_jax.generation.requests import (
    Completions,
    Request,
    Token,
    batch_of,
    check_options,
    encode_prompts,
    make_request,
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
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.runtime.resident import ResidentOnCpu
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
from layerscope_jax.support.units import parse_bytes

logger = logging.getLogger(__name__)


class Engine:
    """Generates with a model whose experts live in host memory, within a budget of device memory.

    Whatever the budget and the policy, the tokens are the same; only the time differs. An engine keeps what
    is resident from one call to the next. It is a context manager; leaving it ends its threads.

    Several threads may call one engine, and calls may come from within `on_token`: requests join those that
    run, each step gives every one of them a token, and whoever waits for one drives the next step. A call
    that no other overlaps has the engine for itself; where calls overlap each gets the tokens that it gets
    alone (see `layerscope_jax.generation.run` on rounding), and its statistics are of all that was done
    meanwhile. No setting of JAX's that a caller has made, in a `with` statement or for the process, has a
    part in the tokens. In forks of the process, and in functions that JAX traces, there can be no engine:
    both are refused.

    Args:
        model: from `layerscope_jax.load`.
        config: budget, policy, numerics; the default keeps everything resident.
        device: the accelerator; None for the one that the model was loaded onto, and no other may be named.
        host_device: the JAX CPU device that computes experts on the host; None for the last one. Without an
            accelerator it takes turns with `device`, also where JAX has several CPU devices: the cores are
            the same.

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
        problems.raise_any()
        self._rooms = Rooms(self)
        self._turns = Turns(self._rooms.step)
        self._costs: HardwareProfile | None = None
        self.model = model
        self.config = config or OffloadConfig()
        self.device = device or model.device
        if self.device != model.device:
            raise ValueError(
                f"device must be the model's own, {model.device}, got {self.device}; "
                "load the model with device= for another"
            )
        with self._turns.turn():
            self._build(host_device)
        rooms = self._rooms
        self._loop = Loop(
            model,
            self.runner,
            self._turns,
            lambda: rooms.closed,
            lambda rows, length: new_caches(model, rows, length, model.device),
            int(self.config.max_num_seqs),
            self.config.prefill_chunk_size,
            self.budget_bytes,
            self._costs,
        )

    def _build(self, host_device: jax.Device | None) -> None:
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
        if everything and config.numerics == "fast" and WholeModel.is_faster_on(self.device):
            self.policy: Policy = Resident()
            self.runner = WholeModel(model)
            return
        if everything and WholeModel.is_faster_on(self.device):
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
            transfers = self._rooms.add(Transfers(bank, self.device, bandwidth))
            forecasts = self._rooms.add(Forecasts(None if everything else predictor, model, geometry))
            # What the predictor keeps on the device comes first; experts have the rest.
            residency = Residency(forecasts.beside(self.budget_bytes), bank.expert_bytes)
            geometry = replace(geometry, slots=residency.slots)
            if profile is None and self.policy.uses_costs:
                profile = calibration.measure(model, host, transfers, residency.slots)
            state = forecasts.explained(self.budget_bytes, lambda: self.policy.init(geometry, profile))
            self._costs = profile
            runner = ResidentOnCpu if everything and host.inside is not None else LayerByLayer
            self.runner = runner(model, self.policy, state, residency, transfers, host, forecasts)
            if everything:
                self.runner.preload()

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Request],
        *,
        progress: bool = False,
        on_token: Callable[[Token], object] | None = None,
        record_plans: bool = False,
        bound: bool = False,
        **settings: Any,
    ) -> Completions:
        """Continues every prompt.

        `OffloadConfig.max_num_seqs` run at once. When some end, waiting ones take their slots while the
        others go on (see `layerscope_jax.generation.scheduler`).

        Args:
            prompts: texts, lists of token ids, or `Request`s, in any mixture.
            progress: whether to show a bar on stderr.
            on_token: is given each token when it is known. It may use the engine itself; what it raises ends
                the call.
            record_plans: whether to keep every layer's decision in the result, of all requests that ran
                meanwhile.
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
        requests = make_requests(prompts, settings, ("progress", "on_token", "record_plans", "bound"))
        check_options(on_token, progress=progress, record_plans=record_plans, bound=bound)
        if bound and self._costs is None:
            raise ValueError(
                "a bound needs the costs of this machine: give OffloadConfig(profile=) what `layerscope "
                "calibrate` measured, or a policy that weighs costs; and a budget with something to decide"
            )
        call = self._call(requests, record_plans=record_plans, bound=bound)
        if not progress and on_token is None:
            return self._loop.complete(call)
        with (
            progress_bar(requests) if progress else nullcontext(lambda event: None) as advance,
            closing(self._loop.stream(call)) as events,
        ):
            for event in events:
                advance(event)
                if on_token is not None:
                    on_token(event)
        return self._loop.answer(call)

    def stream(self, prompts: Sequence[str | Sequence[int] | Request], **settings: Any) -> Iterator[Token]:
        """As `generate`, but yields each `Token` when it is known; bad input is refused at once.

        It begins when it is first read. What stops reading it (`close`, leaving a loop, dropping it) cancels
        its requests.
        """
        self._turns.check()
        return self._stream(self._call(make_requests(prompts, settings)))

    def _stream(self, call: Call) -> Iterator[Token]:
        yield from self._loop.stream(call)  # as a method, so that who reads it holds the engine

    def submit(self, prompt: str | Sequence[int] | Request, **settings: Any) -> Handle:
        """Gives the engine a request, which joins those that run, and returns at once.

        There is no thread behind it: steps are driven by whoever waits for tokens, of this request or of any
        other.

        Args:
            prompt: a text, a list of token ids, or a `Request`.
            **settings: as of `generate`, unless it is a `Request`, which has its own.

        Returns:
            A handle to wait for its tokens or the whole, or to cancel it.

        Raises:
            ValueError: as of `generate`.

        Example::

            handle = engine.submit("Call me Ishmael.", max_new_tokens=64)
            for token in handle:
                print(token.text, end="")
            handle.result().finish_reason
        """
        self._turns.check()
        request = make_request(prompt, settings)
        try:
            call = self._call([request])
        except ValueError as error:
            raise ValueError(str(error).replace("prompt 0", "the prompt")) from None
        handle = Handle(self, self._loop, call)
        self._loop.submit(call)
        return handle

    def warmup(
        self,
        *,
        prompt_tokens: int,
        max_num_seqs: int | None = None,
        new_tokens: int = 64,
        sampled: bool = False,
    ) -> Compilations:
        """Compiles what `generate` needs for batches of one size, so that none waits for it.

        The size is that of a whole batch. Requests that join it later, fewer at once, have prefill programs
        of their own for each power of two of them, compiled when they first come: as dear as the batch's, and
        only needed where more requests come than there are slots. Having warmed up with that `max_num_seqs`
        too (`scheduler.joining` says which), only one small program is left. Which programs of experts a
        prefill needs hangs on how tokens fall to experts, so all are compiled that can be: on each
        side that computes, in each phase, one for each of up to 21 shapes (`possible_groups` of
        `kernels.grouping`); for an accelerator up to log2(T K) + 2 more, which place what the host computed;
        and some dozen others. `use_compilation_cache` spares the next process most of it.

        What is resident or on its way, statistics, what policy and predictor have learned: all stay as they
        are. The policy is asked once a phase, and its answer dropped. For the while, one expert more than the
        budget holds is on the device, and a batch's caches.

        Args:
            prompt_tokens: of the longest prompt of a batch.
            max_num_seqs: requests of a batch, as many as the engine runs at once or fewer; None for as many.
            new_tokens: `max_new_tokens` of the request that gets to the highest position.
            sampled: whether any request has a temperature.

        Returns:
            How many programs were compiled, or read from a cache on disk.

        Raises:
            ValueError: for sizes that the model or `generate` does not take, or if the engine was closed.
        """
        most = self.config.max_num_seqs
        requests = batch_of(self.model.config, prompt_tokens, max_num_seqs, most, new_tokens, sampled)
        call = self._call(requests)
        with self._turns.turn(), counted() as found:
            self._loop.rehearse(call, rehearsal(self.runner).step)
        return found

    def close(self) -> None:
        """Ends the engine's threads; it generates no more. A step that another thread is at is waited for."""
        self._rooms.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, requests: Sequence[Request], *, record_plans: bool = False, bound: bool = False) -> Call:
        """The requests, as they are before their first step; refuses what no step can do."""
        self._loop.check_open()
        if isinstance(self.runner, LayerByLayer):
            self.runner.forecasts.check()
        config = self.model.config
        prompts = encode_prompts(
            requests, self.model.tokenizer, config.max_position_embeddings, config.vocab_size
        )
        return self._loop.call(requests, prompts, record_plans=record_plans, bound=bound)

    def text(self, tokens: list[int], finish: str, prompt: Sequence[int] = ()) -> str:
        """The text of new tokens behind a prompt's; a last token that ended it ("stop") is no part of it."""
        if self.model.tokenizer is None:
            return ""
        return continuation(self.model.tokenizer, tokens, finish, prompt)
