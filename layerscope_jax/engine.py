"""The engine: a model, a budget and a policy, ready to generate."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import jax
import numpy as np

from layerscope_jax import calibration
from layerscope_jax.batching import Batch, Running, Times
from layerscope_jax.checkpoints import Model
from layerscope_jax.compilations import Compilations, counted
from layerscope_jax.config import OffloadConfig, parse_bytes
from layerscope_jax.detokenize import continuation
from layerscope_jax.experts.cpu import WorkStats, default_threads
from layerscope_jax.experts.executors import HostExperts
from layerscope_jax.experts.residency import Residency
from layerscope_jax.experts.rooms import Rooms
from layerscope_jax.experts.transfers import LinkStats, Transfers
from layerscope_jax.forecasts import Forecasts
from layerscope_jax.generation import Request, Result, Token, encode_prompts, is_integer, make_requests
from layerscope_jax.layerwise import LayerByLayer
from layerscope_jax.machine import cpu_device
from layerscope_jax.machine_profile import costs_of
from layerscope_jax.prediction import make_predictor
from layerscope_jax.progress import progress_bar
from layerscope_jax.resident import ResidentOnCpu
from layerscope_jax.scheduling.baselines import POLICIES, Resident
from layerscope_jax.scheduling.bounds import lower_bound_ms
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.guard import Guard
from layerscope_jax.scheduling.plan import Geometry, LayerPlan, Policy
from layerscope_jax.statistics import RunStats
from layerscope_jax.warmup import rehearsal
from layerscope_jax.whole import WholeModel, new_caches

logger = logging.getLogger(__name__)


class Engine:
    """Generates with a model whose experts live in host memory, within a budget of device memory.

    Whatever the budget and the policy, the tokens are the same; only the time differs. An engine keeps what
    is resident from one call to the next. It is a context manager; leaving it ends its threads. One call at a
    time: it is not made to be called from several threads at once.

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
        result.texts, result.tokens, result.stats
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
        self._rooms = Rooms(self)
        self._costs: HardwareProfile | None = None
        self.model = model
        self.config = config = config or OffloadConfig()
        self.device = device or model.device
        if self.device != model.device:
            raise ValueError(
                f"device must be the model's own, {model.device}, got {self.device}; "
                "load the model with device= for another"
            )
        bank = model.bank
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
        if config.link_bandwidth is not None:
            bandwidth = parse_bytes(config.link_bandwidth, "link_bandwidth")
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
                "every expert fits on %s: OffloadConfig(numerics='fast') runs a step as one program "
                "there, several times as fast; its logits agree with those of other budgets to rounding",
                self.device,
            )
        self.policy = Resident() if everything else policy
        geometry = Geometry(
            num_layers=model.config.num_layers,
            num_experts=model.config.num_experts,
            experts_per_token=model.config.experts_per_token,
            expert_bytes=bank.expert_bytes,
            slots=self.budget_bytes // bank.expert_bytes,
        )
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
            self._geometry, self._costs = geometry, profile
            runner = ResidentOnCpu if everything and host.inside is not None else LayerByLayer
            self.runner = runner(model, self.policy, state, residency, transfers, host, forecasts)
            if everything:
                self.runner.preload()

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Request],
        *,
        batch_size: int = 32,
        progress: bool = False,
        on_token: Callable[[Token], object] = lambda event: None,
        record_plans: bool = False,
        bound: bool = False,
        **settings: Any,
    ) -> Result:
        """Continues every prompt.

        Args:
            prompts: texts, lists of token ids, or `Request`s, in any mixture.
            batch_size: how many run at once. When some end, waiting ones take their slots while the others
                go on (see `layerscope_jax.batching`).
            progress: whether to show a bar on stderr.
            on_token: is given each token when it is known.
            record_plans: whether to keep every layer's decision in the result.
            bound: whether to say which share of the least possible time the decode steps reached, by this
                machine's costs; takes some seconds more.
            **settings: of `Request`, for prompts that are not one: max_new_tokens, temperature, top_k, top_p,
                seed, stop_tokens.

        Raises:
            ValueError: for settings out of range, for an empty or too long prompt, naming each, if the engine
                was closed, and if a bound is asked for where no costs are known.
            TransferError: if an expert could not be copied to the device.
        """
        requests = make_requests(prompts, settings)
        if bound and self._costs is None:
            raise ValueError(
                "a bound needs the costs of this machine: give OffloadConfig(profile=) what `layerscope "
                "calibrate` measured, or a policy that weighs costs; and a budget with something to decide"
            )
        plans: list[LayerPlan] = []
        if isinstance(self.runner, LayerByLayer):
            self.runner.record = plans.append if record_plans else None
            self.runner.decoded = [] if bound else None
        self.runner.reset()
        times = Times()
        tokens: list[list[int]] = [[] for _ in requests]
        pieces: list[list[str]] = [[] for _ in requests]
        finish = [""] * len(requests)
        began = time.perf_counter()
        with progress_bar(requests) if progress else nullcontext(lambda event: None) as advance:
            for event in self._stream(requests, batch_size, times):
                tokens[event.request].append(event.token)
                pieces[event.request].append(event.text)
                finish[event.request] = event.finish or ""
                advance(event)
                on_token(event)
        total_s = time.perf_counter() - began
        return Result(
            texts=list(map("".join, pieces)),
            tokens=tokens,
            finish=finish,
            stats=self._stats(times, tokens, total_s),
            plans=plans,
        )

    def stream(
        self, prompts: Sequence[str | Sequence[int] | Request], *, batch_size: int = 32, **settings: Any
    ) -> Iterator[Token]:
        """As `generate`, but yields each `Token` when it is known; bad input is refused at once."""
        requests = make_requests(prompts, settings)
        if isinstance(self.runner, LayerByLayer):
            self.runner.record = self.runner.decoded = None
        return self._stream(requests, batch_size, Times())

    def warmup(
        self, *, prompt_tokens: int, batch_size: int = 32, new_tokens: int = 64, sampled: bool = False
    ) -> Compilations:
        """Compiles what `generate` needs for batches of one size, so that none waits for it.

        The size is that of a whole batch. Requests that join it later, fewer at once, have prefill programs
        of their own for each power of two of them, compiled when they first come: as dear as the batch's, and
        only needed where more requests come than there are slots. Having warmed up with that `batch_size`
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
            batch_size: as of `generate`.
            new_tokens: `max_new_tokens` of the request that gets to the highest position.
            sampled: whether any request has a temperature.

        Returns:
            How many programs were compiled, or read from a cache on disk.

        Raises:
            ValueError: for sizes that the model or `generate` does not take, or if the engine was closed.
        """
        if not is_integer(prompt_tokens) or prompt_tokens < 1:
            raise ValueError(f"prompt_tokens must be a whole number, 1 or more, got {prompt_tokens!r}")
        if prompt_tokens >= (context := self.model.config.max_positions):
            raise ValueError(
                f"prompt_tokens must be less than the model's context of {context}, got {prompt_tokens}"
            )
        request = Request(
            prompt=[0] * prompt_tokens,
            max_new_tokens=new_tokens,
            temperature=float(sampled),
            stop_tokens=(),
        )
        runner = self.runner
        with counted() as found:
            try:
                self.runner = rehearsal(runner)
                batch = self._stream([request] * batch_size, batch_size, Times())
                deque(islice(batch, 2 * batch_size), maxlen=0)  # a prefill and a decode step
            finally:
                self.runner = runner
        return found

    def close(self) -> None:
        """Ends the engine's threads, after the step that another thread may be at; it generates no more."""
        self._rooms.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(self, requests: Sequence[Request]) -> list[list[int]]:
        config = self.model.config
        return encode_prompts(requests, self.model.tokenizer, config.max_positions, config.vocab_size)

    def _stream(self, requests: Sequence[Request], batch_size: int, times: Times) -> Iterator[Token]:
        """Refuses bad input at once; the rest happens as tokens are asked for."""
        self._check_open()
        if isinstance(self.runner, LayerByLayer):
            self.runner.forecasts.check()
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        prompts = self._encode(requests)
        room = [self.model.config.max_positions - len(prompt) for prompt in prompts]
        running = [
            Running(index, request, prompt, min(request.max_new_tokens, left))
            for index, (request, prompt, left) in enumerate(zip(requests, prompts, room, strict=True))
        ]
        return self._run(running, batch_size, times)

    def _run(self, running: list[Running], batch_size: int, times: Times) -> Iterator[Token]:
        if isinstance(self.runner, LayerByLayer):
            self.runner.steps = 0
        batch = Batch(
            running,
            batch_size,
            self._step,
            lambda rows, length: new_caches(self.model, rows, length, self.device),
            self.config.prefill_chunk,
            self.model.config.stop_tokens,
            self.model.tokenizer,
            times,
        ).run()
        while True:
            with self._rooms.step:  # whoever closes the engine meanwhile waits for the end of it
                event = next(batch, None)
            if event is None:
                return
            yield event

    def _step(self, *inputs: Any) -> Any:
        self._check_open()  # a stream may outlive its engine
        return self.runner.step(*inputs)

    def _check_open(self) -> None:
        if self._rooms.closed:
            raise ValueError("the engine was closed; make a new Engine to generate more")

    def _share_of_bound(self, decode_s: float) -> float | None:
        demand = self.runner.decoded if isinstance(self.runner, LayerByLayer) else None
        if not demand or self._costs is None:
            return None
        layers, experts = self._geometry.num_layers, self._geometry.num_experts
        counts = np.zeros((len(demand) // layers, layers, experts), int)
        for turn, tokens in enumerate(demand):
            counts[turn // layers, turn % layers, list(tokens)] = list(tokens.values())
        each = counts[:, 0].sum(1) // self._geometry.experts_per_token
        least_ms = lower_bound_ms(counts, each.tolist(), self._geometry, self._costs.alone or self._costs)
        return least_ms / (1e3 * decode_s)

    def text(self, tokens: list[int], finish: str, prompt: Sequence[int] = ()) -> str:
        """The text of new tokens behind a prompt's; a last token that ended it ("stop") is no part of it."""
        if self.model.tokenizer is None:
            return ""
        return continuation(self.model.tokenizer, tokens, finish, prompt)

    def _stats(self, times: Times, tokens: list[list[int]], total_s: float) -> RunStats:
        runner, meter = self.runner, self.runner.meter
        new_tokens = sum(map(len, tokens))
        link, host, device = LinkStats(), WorkStats(), WorkStats()
        peak, wasted, ways = self.model.bank.total_bytes, 0, None
        if isinstance(runner, LayerByLayer):
            link, host, device = (
                runner.transfers.stats,
                runner.host_experts.stats,
                runner.device_experts.stats,
            )
            peak, wasted = runner.residency.peak_bytes, runner.residency.unused_prefetch_bytes()
            if isinstance(self.policy, Guard):
                ways = self.policy.report(runner.state)
        rows = host.rows + device.rows
        experts = host.experts + device.experts
        kernels = {name: n / experts for name, n in (host.by_kernel + device.by_kernel).items()}
        used_prefetches = meter.on_time + meter.late
        return RunStats(
            policy=self.policy.name,
            mode=runner.mode,
            budget_bytes=self.budget_bytes,
            peak_expert_bytes=peak,
            predictor_bytes=runner.forecasts.kept_bytes if isinstance(runner, LayerByLayer) else 0,
            prompts=len(tokens),
            prompt_tokens=times.prompt_tokens,
            new_tokens=new_tokens,
            total_s=total_s,
            ttft_s=float(np.mean(times.first_token_s)) if times.first_token_s else 0.0,
            tpot_s=float(np.mean(times.decode_s)) if times.decode_s else 0.0,
            tokens_per_s=new_tokens / total_s,
            device_share=meter.device_busy_s / total_s,
            host_share=host.busy_s / total_s,
            link_share=link.busy_s / total_s,
            hit_rate=meter.expert_hits / meter.experts if meter.experts else 1.0,
            token_hit_rate=meter.token_hits / meter.tokens if meter.tokens else 1.0,
            bytes_demand=link.demand_bytes,
            bytes_prefetch=link.prefetch_bytes,
            bytes_moved=link.demand_bytes + link.prefetch_bytes,
            bytes_wasted=wasted,
            predictor=runner.forecasts.name if isinstance(runner, LayerByLayer) else None,
            forecast_recall=meter.foreseen / meter.foreseeable if meter.foreseeable else None,
            prefetch_on_time=meter.on_time / used_prefetches if used_prefetches else None,
            ways=ways,
            share_of_bound=self._share_of_bound(sum(times.decode_s)),
            padding=1 - (host.tokens + device.tokens) / rows if rows else 0.0,
            dispatches=host.dispatches + device.dispatches,
            kernels=kernels | {"xla": 1 - sum(kernels.values())} if experts else None,
        )


def make_policy(policy: str | Policy) -> Policy:
    """A policy from its name, or the object itself.

    Raises:
        ValueError: with the names there are, if it is neither.
    """
    if isinstance(policy, str) and policy in POLICIES:
        return POLICIES[policy]()
    parts = ("name", "uses_costs", "init", "plan")
    if isinstance(policy, str | type) or not all(hasattr(policy, part) for part in parts):
        hint = "; make an object of the class" if isinstance(policy, type) else ""
        raise ValueError(
            f"policy must be one of {', '.join(sorted(POLICIES))} or a Policy object, with "
            f"{', '.join(parts)}, got {policy!r}{hint}"
        )
    return policy
