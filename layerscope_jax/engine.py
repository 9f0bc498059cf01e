"""The engine: a model, a budget and a policy, ready to generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, Literal

import jax

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.config import AUTO, OffloadConfig, check_engine
from layerscope_jax.generation.arguments import (
    batch_of,
    check_options,
    defaults_of,
    make_request,
    make_requests,
    need_costs,
)
from layerscope_jax.generation.calls import Call
from layerscope_jax.generation.chat import Chat
from layerscope_jax.generation.completions import Completions, Token
from layerscope_jax.generation.detokenize import continuation
from layerscope_jax.generation.device_memory import room_on
from layerscope_jax.generation.encoding import encode_prompts
from layerscope_jax.generation.fitting import Fitting
from layerscope_jax.generation.handles import Handle
from layerscope_jax.generation.limits import Limits
from layerscope_jax.generation.loop import Loop
from layerscope_jax.generation.progress import progress_bar, so_far
from layerscope_jax.generation.requests import Request
from layerscope_jax.generation.shared_calls import call_of_all
from layerscope_jax.generation.structured import Structures
from layerscope_jax.models.cache import new_caches
from layerscope_jax.offload.disk import DiskBank
from layerscope_jax.prediction.predictors import make_predictor
from layerscope_jax.profiling import measure as calibration
from layerscope_jax.profiling.machine_profile import costs_of
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.build import build
from layerscope_jax.runtime.processes import agree_on_engine, need_one_process, spans_processes, together
from layerscope_jax.runtime.resources import Resources
from layerscope_jax.runtime.runner import Runner
from layerscope_jax.runtime.timeline_files import check_timeline, of_call, write_timeline
from layerscope_jax.runtime.turns import Turns
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.policy import PolicyBase
from layerscope_jax.scheduling.registry import make_policy
from layerscope_jax.support.compile_cache import Compilations, counted
from layerscope_jax.support.units import parse_bytes


class Engine:
    """Generates tokens with a model whose experts live in host memory, within a budget of device memory.

    The budget and the policy change only the time, never the tokens. Experts stay resident from one call to
    the next. An engine is a context manager; leaving it ends its threads.

    Several threads may call one engine, and `on_token` may call it too: new requests join the running ones,
    each step gives every running request a token, and a thread that waits for a token runs the next step. A
    call that overlaps no other has the engine to itself. Where calls overlap, each gets the tokens that it
    would get alone (see `layerscope_jax.generation.run` on rounding), and its statistics cover all the work
    done during the call. The caller's JAX settings, in a `with` statement or for the process, do not change
    the tokens. An engine can be neither made nor used in a fork of the process or in a function that JAX
    traces.

    Args:
        model: from `layerscope_jax.load`.
        config: budget, policy, numerics; by default as many experts are resident as fit on the device.
        device: the accelerator that the model was loaded onto; None for the same.
        host_device: the JAX CPU device that computes experts on the host; None for the last of them. Without
            an accelerator it takes turns with `device`, even if JAX has several CPU devices, because they
            share the same cores.
        chat_template: Jinja text that turns the `messages` of a request into a prompt; None for the
            checkpoint's own.
        generation_config: "auto" to take the sampling settings that the checkpoint's `generation_config.json`
            recommends where a call gives none (a `Request` has its own); "none" to take those of `Request`.

    Attributes:
        defaults: settings of prompts for which a call gives none.
        structures: compiles the grammars of requests.

    Raises:
        ValueError: if the policy is unknown; if the budget is too small for the policy and what the predictor
            keeps on the device; if the profile or the predictor belongs to another machine or model; or if
            the model is on another device.

    Example::

        model = layerscope_jax.load("path/to/checkpoint")
        config = layerscope_jax.OffloadConfig(device_budget="2GiB")
        engine = layerscope_jax.Engine(model, config)
        result = engine.generate(["Call me Ishmael.", "def main():"], max_new_tokens=64)
        [(completion.text, completion.finish_reason) for completion in result], result.stats
    """

    def __init__(
        self,
        model: Model,
        config: OffloadConfig | None = None,
        *,
        device: jax.Device | None = None,
        host_device: jax.Device | None = None,
        chat_template: str | None = None,
        generation_config: Literal["auto", "none"] = "auto",
    ):
        check_engine(model, config, device, host_device, chat_template, generation_config)
        self.defaults: Mapping[str, Any] = defaults_of(model) if generation_config == "auto" else {}
        self._turns = Turns()
        resources = self._resources = Resources(self, self._turns)
        self._chat = resources.add(Chat(model.path, chat_template))
        self.config = config or OffloadConfig()
        self.device = model.device
        self.model = model = model.prepared(self.config.expert_format, self.config.dense_format)
        self.structures = Structures.of(model)
        agree_on_engine(model, self.config, chat_template)
        with self._turns.turn(), together(model.partition, "the engine"):
            self._build(host_device)
        self._loop = resources.add(
            Loop(
                model,
                self.runner,
                self._turns,
                lambda: resources.closed,
                lambda rows, length: new_caches(model.config, rows, length, model.bank.dtype, model.place),
                Limits.of(self.config),
                self.budget_bytes,
                self.structures,
                self._fitting,
            )
        )

    def _build(self, host_device: jax.Device | None) -> None:
        """Makes the runner that the config asks for."""
        config, model, bank = self.config, self.model, self.model.bank  # `make` must not hold the engine
        budget, pace, predictor = config.device_budget, config.emulated_link_bandwidth, config.predictor
        room, size = None, model.own_bytes
        if budget == AUTO:
            room = room_on(
                self.device,
                model,
                max_num_seqs=int(config.max_num_seqs),
                context=config.context,
                prefill_chunk_size=int(config.prefill_chunk_size),
            )
            size = size if room is None else min(size, room.left)
        elif budget is not None:
            size = parse_bytes(budget, "device_budget")
        held = config.host_budget
        if held is not None and not isinstance(bank, DiskBank):
            raise ValueError(
                f"host_budget={held!r} bounds the memory of experts that are on the disk, and those of this "
                "model are in memory; load it with layerscope_jax.load(folder, experts='disk')"
            )
        bandwidth = None if pace is None else parse_bytes(pace, "emulated_link_bandwidth")
        policy, known = make_policy(config.policy), costs_of(config.profile, model, bandwidth)

        def make(budget_bytes: int, costs: HardwareProfile | None, alternates: bool) -> Runner:
            return build(
                model,
                policy,
                None if predictor is None else make_predictor(predictor),
                budget_bytes=budget_bytes,
                measure=calibration.measure,
                policy_is_obeyed=not isinstance(config.policy, str),
                alternates=alternates,
                numerics=config.numerics,
                costs=costs or known,
                bandwidth=bandwidth,
                threads=config.host_threads,
                host_device=host_device,
                host_bytes=None if held is None else parse_bytes(held, "host_budget"),
            )

        with self._resources.opening(), nullcontext() if room is None else room.explained():
            shrinks = room is not None and not spans_processes(model.partition)  # all would have to
            self._fitting = Fitting(make, self._resources, size, bank.expert_bytes, shrinks)
        if room is None and budget in (None, AUTO) and isinstance(bank, DiskBank):
            self._fitting.budget_bytes = size if self.policy.uses_device else 0

    @property
    def runner(self) -> Runner:
        """What runs the steps; another one after the device's memory has run out."""
        return self._fitting.runner

    @property
    def policy(self) -> PolicyBase:
        """The policy that plans each layer; "resident" if there is nothing to decide."""
        return self.runner.policy

    @property
    def budget_bytes(self) -> int:
        """Device memory (bytes) for experts."""
        return self._fitting.budget_bytes

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Request],
        *,
        progress: bool = False,
        on_token: Callable[[Token], object] | None = None,
        record_plans: bool = False,
        bound: bool = False,
        timeline: str | Path | None = None,
        **settings: Any,
    ) -> Completions:
        """Generates a completion for every prompt.

        At most `OffloadConfig.max_num_seqs` requests run at once. When some of them end, waiting requests
        take their slots while the others go on (see `layerscope_jax.generation.scheduler`).

        Args:
            prompts: texts, lists of token ids, or `Request`s, in any mixture.
            progress: whether to show a progress bar on stderr.
            on_token: function called with each `Token` as soon as it is known. It may use the engine itself;
                an exception that it raises ends the call.
            record_plans: whether to keep every layer's plan in the result, covering all requests that ran
                during the call.
            bound: whether to report the lower bound on the time of the decode steps, computed from this
                machine's costs, as a share of the time taken; takes a few seconds more.
            timeline: file for a timeline of what device, host, link and disk did when, with every layer's
                plan: a trace for Perfetto, chrome://tracing and `layerscope report` (docs/timeline.md). It
                takes up to 128 MiB of memory, and of a longer call covers the end.
            **settings: fields of `Request` for the prompts that are not a `Request`, such as max_new_tokens,
                temperature or stop. At least one prompt must not be a `Request`.

        Raises:
            ValueError: for unknown or out-of-range settings; for prompts that are empty or too long, naming
                each; if the engine was closed; if a bound is asked for but no costs are known; and in a fork
                or a traced function (see `Engine`).
            TransferError: if an expert could not be copied to the device.
        """
        self._turns.check()
        options = ("progress", "on_token", "record_plans", "bound", "timeline")
        requests = make_requests(prompts, settings, options, self.defaults)
        check_options(on_token, progress=progress, record_plans=record_plans, bound=bound)
        if timeline is not None:
            check_timeline(timeline, self.model)
        if bound:
            need_costs(self.runner.costs)
        if on_token is not None:
            need_one_process(self.model.partition, "on_token")
        kept = {"record_plans": record_plans, "bound": bound, "timeline": timeline is not None}
        call = call_of_all(self.model.partition, requests, lambda each: self._call(each, **kept))
        if not progress and on_token is None:
            result = self._loop.complete(call)
        else:
            with (
                progress_bar(requests, lambda: so_far(call, self.account))
                if progress
                else nullcontext(lambda event: None) as advance,
                closing(self._loop.stream(call)) as events,
            ):
                for event in events:
                    advance(event)
                    if on_token is not None:
                        on_token(event)
            result = self._loop.answer(call)
        if timeline is not None:
            write_timeline(timeline, [of_call(call.recording, result.stats, self.model)])
        return result

    def stream(self, prompts: Sequence[str | Sequence[int] | Request], **settings: Any) -> Iterator[Token]:
        """Yields each `Token` of the prompts' completions as soon as it is known.

        Prompts and settings are as in `generate`, and bad input raises at once, but generation begins only
        when the iterator is first read. Closing the iterator, dropping it, or leaving a loop over it cancels
        its requests.
        """
        self._turns.check()
        need_one_process(self.model.partition, "stream")
        return self._stream(self._call(make_requests(prompts, settings, defaults=self.defaults)))

    def _stream(self, call: Call) -> Iterator[Token]:
        yield from self._loop.stream(call)  # a generator method keeps the engine alive while it is read

    def submit(self, prompt: str | Sequence[int] | Request, **settings: Any) -> Handle:
        """Adds a request to the running ones and returns at once.

        No background thread runs the steps: a thread that waits for a token, of this request or any other,
        does.

        Args:
            prompt: a text, a list of token ids, or a `Request`.
            **settings: as in `generate`; none if the prompt is a `Request`, which has its own.

        Returns:
            A handle to wait for the request's tokens or its whole completion, or to cancel it.

        Raises:
            ValueError: as in `generate`.

        Example::

            handle = engine.submit("Call me Ishmael.", max_new_tokens=64)
            for token in handle:
                print(token.text, end="")
            handle.result().finish_reason
        """
        self._turns.check()
        need_one_process(self.model.partition, "submit")
        request = make_request(prompt, settings, self.defaults)
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
        **settings: Any,
    ) -> Compilations:
        """Compiles what `generate` needs for batches of one size, so that no request waits for compilation.

        The size is that of a whole batch. Requests that join a running batch later, in smaller groups, need
        prefill programs of their own, one for each power of two of requests, compiled when first needed. Each
        takes as long to compile as the batch's, and is needed only if more requests come than there are
        slots. To compile these too, warm up again with `max_num_seqs` set to the size of such a group
        (`scheduler.joining` gives it); then only one small program is left. However tokens are routed, an
        accelerator computes experts by one program in each phase; one more places what the host computed in a
        prefill. About a dozen are for the rest. Where a CPU leaves experts to XLA (float16), the shapes that
        routing may lead to, up to 21 (`possible_groups` of `kernels.grouping`), are all compiled.
        `use_compilation_cache` saves the next process most of this work.

        Statistics, and what policy and predictor have learned, stay unchanged; so do residency and copies in
        flight, unless policy "auto" has two ways of decode steps. The policy is asked for one plan in each
        phase, which is discarded. Meanwhile the device holds an expert more, and a batch's caches.

        Args:
            prompt_tokens: tokens of the longest prompt of a batch.
            max_num_seqs: requests of a batch, at most as many as the engine runs at once; None for that many.
            new_tokens: `max_new_tokens` of the request that reaches the highest position.
            **settings: those of the requests, as in `generate`. Which programs pick tokens depends on whether
                any request has a temperature above 0; `n` samples; penalties, `logit_bias` or
                `min_new_tokens`; `logprobs`; `min_p`. Their values do not matter.

        Returns:
            The number of programs that were compiled, or read from a cache on disk.

        Raises:
            ValueError: for sizes or settings that the model or `generate` does not take, or if the engine
                was closed.
        """
        most = self.config.max_num_seqs
        of_requests = {name: value for name, value in self.defaults.items() if name != "max_new_tokens"}
        requests = batch_of(
            self.model.config, prompt_tokens, max_num_seqs, most, new_tokens, of_requests | settings
        )
        call = call_of_all(self.model.partition, requests, self._call)
        with self._turns.turn(), counted() as found:
            self._loop.rehearse(call, lambda: self.runner.rehearsal().step)
        return found

    @property
    def account(self) -> Account:
        """Counts of the work of the requests in progress, since they began to share steps; afterwards, of the
        last ones.

        They are replaced when requests come to an idle engine, and change while a step runs.
        """
        return self._loop.account

    def close(self) -> None:
        """Ends the engine's threads, after any step that another thread is running; it generates no more."""
        self._resources.close(self.runner.settle_if_needed)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(
        self,
        requests: Sequence[Request],
        *,
        record_plans: bool = False,
        bound: bool = False,
        timeline: bool = False,
    ) -> Call:
        """Returns the requests as they are before their first step; refuses prompts the model cannot take."""
        self._loop.check_open()
        config = self.model.config
        prompts = encode_prompts(
            requests, self.model.tokenizer, config.max_position_embeddings, config.vocab_size, self._chat
        )
        return self._loop.call(requests, prompts, record_plans=record_plans, bound=bound, timeline=timeline)

    def text(self, tokens: list[int], finish: str, prompt: Sequence[int] = ()) -> str:
        """Returns the text of new tokens that follow a prompt's, without the stop token that ended it."""
        tokenizer = self.model.tokenizer
        return "" if tokenizer is None else continuation(tokenizer, tokens, finish, prompt)
