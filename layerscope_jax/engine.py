"""The engine: a model, a budget and a policy, ready to generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import Any

import jax

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.config import OffloadConfig
from layerscope_jax.generation.calls import Call
from layerscope_jax.generation.completions import Completions, Token
from layerscope_jax.generation.detokenize import continuation
from layerscope_jax.generation.encoding import encode_prompts
from layerscope_jax.generation.handles import Handle
from layerscope_jax.generation.loop import Loop
from layerscope_jax.generation.progress import progress_bar
from layerscope_jax.generation.requests import Request, batch_of, check_options, make_request, make_requests
from layerscope_jax.models.cache import new_caches
from layerscope_jax.prediction.predictors import make_predictor
from layerscope_jax.profiling import measure as calibration
from layerscope_jax.profiling.machine_profile import costs_of
from layerscope_jax.runtime.build import build
from layerscope_jax.runtime.resources import Resources
from layerscope_jax.runtime.turns import Turns
from layerscope_jax.scheduling.registry import make_policy
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.compile_cache import Compilations, counted
from layerscope_jax.support.units import parse_bytes


class Engine:
    """Generates with a model whose experts live in host memory, within a budget of device memory.

    Whatever the budget and the policy, the tokens are the same; only the time differs. An engine keeps what
    is resident from one call to the next. It is a context manager; leaving it ends its threads.

    Several threads may call one engine, and calls may come from within `on_token`: requests join those that
    run, each step gives every one of them a token, and whoever waits for one drives the next step. A call
    that no other overlaps has the engine for itself; where calls overlap each gets the tokens that it gets
    alone (see `layerscope_jax.generation.run` on rounding), and statistics cover all that was done meanwhile.
    No JAX setting of a caller, in a `with` statement or for the process, changes the tokens. An engine can be
    neither made nor used in forks of the process and in functions that JAX traces: both are refused.

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
        self._resources = Resources(self)
        self._turns = Turns(self._resources.step)
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
        resources = self._resources
        self._loop = Loop(
            model,
            self.runner,
            self._turns,
            lambda: resources.closed,
            lambda rows, length: new_caches(model.config, rows, length, model.bank.dtype, model.device),
            int(self.config.max_num_seqs),
            self.config.prefill_chunk_size,
            self.budget_bytes,
        )

    def _build(self, host_device: jax.Device | None) -> None:
        """Makes the runner, as the config says."""
        config, bank = self.config, self.model.bank
        budget, pace, predictor = config.device_budget, config.emulated_link_bandwidth, config.predictor
        self.budget_bytes = bank.total_bytes if budget is None else parse_bytes(budget, "device_budget")
        bandwidth = None if pace is None else parse_bytes(pace, "emulated_link_bandwidth")
        with self._resources.opening():
            self.runner = self._resources.add(
                build(
                    self.model,
                    make_policy(config.policy),
                    None if predictor is None else make_predictor(predictor),
                    budget_bytes=self.budget_bytes,
                    measure=calibration.measure,
                    policy_is_obeyed=not isinstance(config.policy, str),
                    fast=config.numerics == "fast",
                    costs=costs_of(config.profile, self.model, bandwidth),
                    bandwidth=bandwidth,
                    threads=config.host_threads,
                    host_device=host_device,
                )
            )
        self.policy = self.runner.policy

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
        if bound and self.runner.costs is None:
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
            self._loop.rehearse(call, self.runner.rehearsal().step)
        return found

    def close(self) -> None:
        """Ends the engine's threads; it generates no more. A step that another thread is at is waited for."""
        self._resources.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, requests: Sequence[Request], *, record_plans: bool = False, bound: bool = False) -> Call:
        """The requests, as they are before their first step; refuses what no step can do."""
        self._loop.check_open()
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
