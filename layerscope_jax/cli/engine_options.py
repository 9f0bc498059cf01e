"""Options of commands that run an engine on requests: its checkpoint, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.cli.args import arg
from layerscope_jax.cli.groups import ENGINE_GROUPS, Groups
from layerscope_jax.cli.options import (
    PREDICTOR_HELP,
    Checkpoint,
    DenseFormat,
    DeviceBudget,
    Dtype,
    ExpertFormat,
    HostBudget,
    LinkBandwidth,
    PolicyName,
    PrefillChunkSize,
    PrefixCache,
    Revision,
    folder_of,
    known_format,
    measured_predictor,
    open_model,
    open_predictor,
    open_profile,
)
from layerscope_jax.config import AUTO, OffloadConfig
from layerscope_jax.generation.chat import read_template
from layerscope_jax.scheduling.registry import make_policy
from layerscope_jax.support.option_errors import option


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """A checkpoint, and how an engine runs it."""

    GROUPS: ClassVar[Groups] = ENGINE_GROUPS

    checkpoint: Checkpoint
    chat_template: Annotated[
        Path | None, arg(metavar="FILE", help="A Jinja chat template to use instead of the checkpoint's.")
    ] = None
    device_budget: DeviceBudget = AUTO
    host_budget: HostBudget = None
    policy: PolicyName = "auto"
    predictor: Annotated[
        str | None,
        arg(
            metavar="PREDICTOR",
            help=f"Forecasts experts for policies that prefetch. {PREDICTOR_HELP} By default policy 'auto' "
            "uses what `layerscope predictor train` measured to be best, or else 'gate'.",
        ),
    ] = None
    profile: Annotated[
        str | None,
        arg(
            metavar="FILE",
            help="A profile that `layerscope calibrate` wrote, for policies that weigh costs; without it, "
            "costs are measured roughly before the first token.",
        ),
    ] = None
    max_num_seqs: Annotated[
        int,
        arg(
            help="Maximum prompts that run at once; when one ends, a waiting one takes its slot. In a batch "
            "of a different shape a prompt may get different tokens, because sums round differently, mostly "
            "in bfloat16."
        ),
    ] = 32
    prefill_chunk_size: PrefillChunkSize = 4096
    prefix_cache: PrefixCache = False
    emulated_link_bandwidth: LinkBandwidth = None
    dtype: Dtype = None
    expert_format: ExpertFormat = None
    dense_format: DenseFormat = None
    revision: Revision = None
    devices: Annotated[
        int | None,
        arg(
            metavar="INT",
            help="How many accelerators share the experts, each with the device budget "
            "(docs/many-devices.md); without it, the first one has all.",
        ),
    ] = None
    numerics: Annotated[
        Literal["auto", "exact", "fast"],
        arg(
            help="'auto' gives the same bits under every budget and policy; 'exact' in every batch too, on a "
            "CPU; 'fast' is faster if everything is resident on an accelerator, and agrees to rounding."
        ),
    ] = "auto"
    generation_config: Annotated[
        Literal["auto", "none"],
        arg(
            help="'auto' samples as the checkpoint's generation_config.json recommends where nothing else is "
            "said; 'none' takes the likeliest tokens."
        ),
    ] = "auto"

    def engine_config(self) -> OffloadConfig:
        """Returns how the engine is to be run; refuses a policy or format that there is not."""
        config = OffloadConfig(
            device_budget=self.device_budget,
            host_budget=self.host_budget,
            policy=self.policy,
            emulated_link_bandwidth=self.emulated_link_bandwidth,
            numerics=self.numerics,
            predictor=open_predictor(self.predictor),
            profile=open_profile(self.profile),
            max_num_seqs=self.max_num_seqs,
            prefill_chunk_size=self.prefill_chunk_size,
            prefix_cache=self.prefix_cache,
        )
        make_policy(self.policy)
        known_format(self.expert_format)  # before anything is fetched
        return config

    def measured(self, config: OffloadConfig, model: Model) -> OffloadConfig:
        """Returns the config for a model: policy "auto" takes the predictor that was measured to be best.

        `layerscope predictor train` measures. A predictor that was asked for is kept.
        """
        if self.predictor is not None or self.policy != "auto":
            return config
        return replace(config, predictor=measured_predictor(self.folder, model))

    @cached_property
    def folder(self) -> Path:
        """The checkpoint's folder, for which a hub is asked once."""
        return folder_of(self.checkpoint, self.revision)

    def template(self) -> str | None:
        """Returns the chat template that was given, if any was."""
        if self.chat_template is None:
            return None
        with option("--chat-template"):
            return read_template(self.chat_template)

    def open_model(self) -> Model:
        """Loads the checkpoint."""
        return open_model(
            str(self.folder),
            self.dtype,
            expert_format=self.expert_format,
            dense_format=self.dense_format,
            host_budget=self.host_budget,
            devices=self.devices,
        )
