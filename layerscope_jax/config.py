"""How a model is to be run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax

from layerscope_jax.models.delta_net import CHUNK
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.registry import make_policy
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.units import is_integer, parse_bytes, parse_pace

if TYPE_CHECKING:
    from layerscope_jax.prediction.predictors import History, Predictor
    from layerscope_jax.profiling.machine_profile import MachineProfile
    from layerscope_jax.scheduling.plan import Policy

AUTO = "auto"
"""Device budget that is chosen when an engine is made: as many experts as fit."""


@dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """How experts are placed, moved and computed.

    Attributes:
        device_budget: bytes of device memory for experts, including copies in flight and what the predictor
            keeps there: "2GiB" or an int. "auto" takes what is free on the device when the engine is made,
            less its caches, its steps' workspace and a margin
            (`layerscope_jax.generation.device_memory`); when the device's memory runs out all the same,
            fewer experts stay there and the step is repeated. On a CPU, whose memory is the host's, all are
            resident. None for as much as all experts take, whether or not it is free.
        host_budget: bytes of host memory for experts, "16GiB" or an int, if the model was loaded with
            experts="disk": the others are read from its files when they are needed, or shortly before. None
            for as much as all experts take. It must hold one expert at least; buffers of 16 MiB come on top.
        policy: a name from `layerscope_jax.POLICIES`, or a `Policy` object. "auto" runs PreSched, and
            switches to simpler ways of running a layer where measured times show that they are faster on
            this machine. If the budget holds every expert, there is nothing to decide: all are resident and
            the policy is not used, unless it is "host-only" or a `Policy` object.
        emulated_link_bandwidth: bytes per second ("500MB") to which copies to the device are slowed down, or
            None for full speed. The copies are real either way: a machine with a fast link can be measured
            as if its link were slow.
        numerics: "auto" gives bit-identical logits under every budget, policy and plan on one backend.
            "exact" does too, and a request's logits then depend neither on what shares its batch nor on its
            slot or the chunks of its prompt; on CPUs alone, see docs/numerics.md for what it takes and costs.
            "fast" differs from "auto" only if everything is resident on an accelerator: there each step is
            one jitted function, without Python between its layers. XLA fuses it differently, so logits agree
            to rounding, and two tokens that score nearly the same may change places. On a CPU the two are the
            same.
        profile: costs of this machine, for policies that weigh costs: a file that `layerscope calibrate`
            wrote, a `MachineProfile` (both refused if they belong to another machine or model), a
            `HardwareProfile` (times alone), or None to measure roughly when needed.
        predictor: forecasts the experts of coming layers, for policies that prefetch: a name from
            `layerscope_jax.PREDICTORS`, a loaded predictor (`predictor.load(folder)`), or None for no
            predictor, except that policy "auto" then uses the next layers' routers ("gate"). It never changes
            the tokens. What a trained predictor keeps on the device is taken off `device_budget`; the others
            keep nothing. If every expert is resident, no predictor is run.
        host_threads: number of threads that compute experts on this machine's CPU. None for one per core,
            less one core if there is an accelerator, for the thread that feeds it.
        expert_format: format in which the experts are stored, moved and computed, such as "int8", "int4",
            "mxfp4" or "fp8" (`layerscope_jax.formats`); None for the one that the model was loaded in. The
            engine converts the experts of a model that has them in another format, and both are in memory
            until the model is let go of; `load(format=)` converts while it loads, one expert at a time.
        dense_format: "int8" to pack the matrices of dense layers, as `load(dense_format=)` does; None for the
            format that the model was loaded in.
        prefill_chunk_size: maximum tokens of a prefill step, including padding. Short prompts share a step; a
            longer prompt is prefilled in several steps, each appending to its caches. The memory of a step
            grows with it: the experts' rows take chunk * K * D numbers, the attention scores
            chunk * H * context numbers (float32). So does the speed: every step runs all layers, and experts
            that are not resident are copied, or read by the host, again in every step.
        max_num_seqs: maximum number of requests that run at once; others wait until some end. Caches and rows
            are allocated only for the requests that there are.
        prefix_cache: whether a prompt may begin with the caches of an earlier or running request that has the
            same first tokens, which are then not computed again. A slot's caches stay until another request
            takes it, also while nothing runs. With numerics="exact" the tokens are those without it: then
            only what was prefilled is used again, and no answers. Otherwise they agree to rounding as in
            batches of other shapes (docs/numerics.md), and the same call again may have other bits.
        slot_tokens: positions of a slot at least: requests of up to so many tokens, prompt and answer
            together, need the same programs, which may be compiled ahead. They take memory for each request
            that runs at once, however short it is; longer requests run all the same.
        context: positions of a request, its prompt and its new tokens, for which device_budget="auto" keeps
            caches free, `max_num_seqs` times; None for 2,048. Longer requests run all the same, if there is
            memory.
    """

    device_budget: str | int | None = AUTO
    host_budget: str | int | None = None
    policy: str | Policy = "auto"
    emulated_link_bandwidth: str | int | None = None
    numerics: Literal["auto", "exact", "fast"] = "auto"
    profile: HardwareProfile | MachineProfile | str | Path | None = field(default=None, repr=False)
    predictor: str | Predictor | History | None = field(default=None, repr=False)
    host_threads: int | None = None
    expert_format: str | None = None
    dense_format: str | None = None
    prefill_chunk_size: int = 4096
    max_num_seqs: int = 32
    prefix_cache: bool = False
    slot_tokens: int = 0
    context: int | None = None

    def __post_init__(self) -> None:
        # Imported here because all of them import models, which import this file.
        from layerscope_jax.checkpoints.dense_weights import check_dense_format
        from layerscope_jax.formats import format_named
        from layerscope_jax.prediction.predictors import make_predictor
        from layerscope_jax.profiling.machine_profile import MachineProfile

        problems = Problems()
        check = problems.check

        def expect(name: str, fits: bool, expected: str) -> None:
            problems.expect(fits, name, expected, getattr(self, name))

        if self.device_budget is not None and self.device_budget != AUTO:
            check(parse_bytes, self.device_budget, "device_budget")
        if self.host_budget is not None:
            check(parse_bytes, self.host_budget, "host_budget")
        check(make_policy, self.policy)
        if self.emulated_link_bandwidth is not None:
            check(parse_pace, self.emulated_link_bandwidth)
        numerics, profile, threads = self.numerics, self.profile, self.host_threads
        is_known = isinstance(numerics, str) and numerics in ("auto", "exact", "fast")
        expect("numerics", is_known, "'auto', 'exact' or 'fast'")
        known = isinstance(profile, HardwareProfile | MachineProfile | str | Path)
        expect("profile", profile is None or known, "a file, a MachineProfile, a HardwareProfile or None")
        if self.predictor is not None:
            check(make_predictor, self.predictor)
        counted = threads is None or (is_integer(threads) and threads >= 1)
        expect("host_threads", counted, "1 or more")
        form = self.expert_format
        expect("expert_format", isinstance(form, str | None), "the name of a format or None")
        if isinstance(form, str):
            check(format_named, form, of="expert_format")
        check(check_dense_format, self.dense_format)
        chunk = self.prefill_chunk_size
        expect("prefill_chunk_size", is_integer(chunk) and chunk >= 16, "16 tokens or more")
        if is_known and numerics == "exact" and is_integer(chunk) and chunk % CHUNK:
            problems.add(
                f"prefill_chunk_size must be a multiple of {CHUNK} with numerics='exact', got {chunk}"
            )
        most = self.max_num_seqs
        expect("max_num_seqs", is_integer(most) and most >= 1, "1 or more")
        cached = self.prefix_cache
        expect("prefix_cache", isinstance(cached, bool), "True or False")
        slot = self.slot_tokens
        expect("slot_tokens", is_integer(slot) and slot >= 0, "0 or more positions")
        reserved = self.context
        within = reserved is None or (is_integer(reserved) and reserved >= 1)
        expect("context", within, "1 or more positions, or None")
        problems.raise_any()


def check_engine(
    model: Any, config: Any, device: Any, host_device: Any, chat_template: Any, generation_config: Any
) -> None:
    """Refuses arguments of an `Engine` that are of another kind; raises a ValueError that names each."""
    from layerscope_jax.checkpoints.model import Model  # which imports models, which import this file

    problems, device_or_none = Problems(), "one of jax.devices() or None"
    for name, value, is_right, expected in (
        ("model", model, isinstance(model, Model), "a Model, as layerscope_jax.load gives one"),
        ("config", config, isinstance(config, OffloadConfig | None), "an OffloadConfig or None"),
        ("device", device, isinstance(device, jax.Device | None), device_or_none),
        ("host_device", host_device, isinstance(host_device, jax.Device | None), device_or_none),
        ("chat_template", chat_template, isinstance(chat_template, str | None), "a text or None"),
        ("generation_config", generation_config, generation_config in ("auto", "none"), "'auto' or 'none'"),
    ):
        problems.expect(is_right, name, expected, value)
    problems.raise_any()
    if device not in (None, model.device):
        raise ValueError(
            f"device must be the model's own, {model.device}, got {device}; load the model with device= for "
            "another"
        )
