"""The command `layerscope fit`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
from rich.console import Console

from layerscope_jax.checkpoints.description import describe
from layerscope_jax.checkpoints.headers import read_configs
from layerscope_jax.cli import fit_view
from layerscope_jax.cli.args import arg
from layerscope_jax.cli.fit_bounds import host_rate
from layerscope_jax.cli.fit_report import report, timed
from layerscope_jax.cli.fit_sizes import Asked, Memory
from layerscope_jax.cli.options import (
    Checkpoint,
    DenseFormat,
    ExpertFormat,
    Json,
    PrefillChunkSize,
    Revision,
    folder_of,
    known_format,
)
from layerscope_jax.config import OffloadConfig
from layerscope_jax.generation.device_memory import usual_context
from layerscope_jax.profiling.machine_profile import MachineProfile, names
from layerscope_jax.simulation.routing import Routing
from layerscope_jax.support import exits, machine
from layerscope_jax.support.option_errors import option
from layerscope_jax.support.units import parse_bytes

FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Environment variables that say which share of a GPU's memory JAX takes; the second is the older name."""

FRACTION = 0.75
"""That share without them."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Say whether a model fits this machine or another, which of its experts fit where, and what would help.

    Reads configs and headers alone; of a checkpoint on the hub no weights are downloaded. Exits with 1 if the
    model cannot be run on the machine in any way.

    Examples:
        layerscope fit path/to/checkpoint
        layerscope fit Qwen/Qwen3-30B-A3B --device-memory 24GiB --host-memory 64GiB --context 2048
        layerscope fit path/to/checkpoint --device-memory 24GiB --link 12GB/s --host-bandwidth 60GB/s
    """

    checkpoint: Checkpoint
    revision: Revision = None
    device_memory: Annotated[
        str | None,
        arg(
            metavar="SIZE",
            help="Memory of an accelerator, such as '24GiB', of which JAX takes 75% unless "
            "XLA_CLIENT_MEM_FRACTION says otherwise; by default what is free on this machine's.",
        ),
    ] = None
    host_memory: Annotated[
        str | None,
        arg(metavar="SIZE", help="Free host memory, such as '64GiB'; by default this machine's."),
    ] = None
    link: Annotated[
        str | None,
        arg(
            metavar="SIZE",
            help="Speed of copies to the device, such as '12GB/s', for times; with --profile, in place of "
            "the profile's.",
        ),
    ] = None
    host_bandwidth: Annotated[
        str | None,
        arg(
            metavar="SIZE",
            help="Speed at which the host reads its memory, such as '60GB/s', for times without --profile; "
            "by default it is measured, unless options describe another machine.",
        ),
    ] = None
    profile: Annotated[
        str | None,
        arg(
            metavar="PROFILE",
            help="Costs of the machine, for expected times: a file that `layerscope calibrate` wrote with "
            f"this model, or one of {', '.join(name for name in names() if '@' not in name)}.",
        ),
    ] = None
    trace: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="Recorded routing of the model, an .npz file that `layerscope predictor routing` wrote; "
            "without it, the one that the profile names, or one that is shipped for a model with the same "
            "numbers.",
        ),
    ] = None
    context: Annotated[
        int | None,
        arg(metavar="INT", help="Positions of a request, prompt and new tokens; by default 2,048."),
    ] = None
    max_num_seqs: Annotated[int, arg(metavar="INT", help="Requests that run at once.")] = 32
    prefill_chunk_size: PrefillChunkSize = 4096
    expert_format: ExpertFormat = None
    dense_format: DenseFormat = None
    json: Json = False

    def run(self) -> int:
        """Returns the exit code."""
        exits.need_output()
        settings = OffloadConfig(
            context=self.context,
            max_num_seqs=self.max_num_seqs,
            prefill_chunk_size=self.prefill_chunk_size,
        )
        expert_format = known_format(self.expert_format)
        given = {
            name: None if size is None else above_zero(size.removesuffix("/s"), name)
            for name, size in {
                "--device-memory": self.device_memory,
                "--host-memory": self.host_memory,
                "--link": self.link,
                "--host-bandwidth": self.host_bandwidth,
            }.items()
        }
        profile, routing = self._opened()
        folder = folder_of(self.checkpoint, self.revision, weights=False)
        description, config = describe(folder), read_configs(folder)[0]
        if self.context is not None and self.context > config.max_position_embeddings:
            raise ValueError(
                f"--context must be at most {config.max_position_embeddings:,} positions, which the model "
                f"takes, got {self.context:,}"
            )
        asked = Asked(settings.max_num_seqs, usual_context(config, self.context), settings.prefill_chunk_size)
        memory = memory_of(given["--device-memory"], given["--host-memory"])
        if memory.device is None and self.link is not None:
            raise ValueError(
                "--link is of copies to an accelerator, and there is none; add --device-memory or leave "
                "--link out"
            )
        made = report(
            description,
            config,
            memory,
            asked,
            expert_format=expert_format,
            dense_format=self.dense_format,
        )
        is_here = self.device_memory is None and self.host_memory is None
        made = timed(
            made,
            config,
            profile,
            routing,
            given["--link"],
            host_rate(given["--host-bandwidth"], profile, is_here=is_here),
        )
        if self.json:
            print(json.dumps(made.to_json()))
        else:
            fit_view.show(made, Console(highlight=False))
        return exits.DONE if any(fit.experts_lie != "nowhere" for fit in made.formats) else exits.FAILED

    def _opened(self) -> tuple[MachineProfile | None, Routing | None]:
        profile = routing = None
        if self.profile is not None:
            with option("--profile"):
                profile = MachineProfile.load(self.profile)
        if self.trace is not None:
            with option("--trace"):
                routing = Routing.load(self.trace)
        if self.profile is None and self.trace is not None:
            raise ValueError(
                "--trace changes expected times, which need costs of a machine; add --profile or leave it out"
            )
        if self.profile is not None and self.host_bandwidth is not None:
            raise ValueError(
                "--host-bandwidth is for times without --profile, which has costs of its host; leave one out"
            )
        return profile, routing


def memory_of(device_bytes: int | None, host_bytes: int | None) -> Memory:
    """Returns the memory of the machine that is meant: this one's, where nothing else is said."""
    free = machine.free_bytes() if host_bytes is None else host_bytes
    host_told = "free on this machine" if host_bytes is None else "as given"
    if device_bytes is not None:
        share, told = fraction()
        return Memory(
            device="an accelerator",
            device_bytes=int(share * device_bytes),
            device_told=f"{share:.0%} of what was given, {told}",
            host_bytes=free,
            host_told=host_told,
            taken=share,
        )
    device = jax.devices()[0]
    room = machine.device_free_bytes(device)
    return Memory(
        device=None if room is None else device.device_kind,
        device_bytes=room,
        device_told=None if room is None else "free on this machine, as JAX says",
        host_bytes=free,
        host_told=host_told,
    )


def fraction() -> tuple[float, str]:
    """Returns the share of a GPU's memory that JAX takes, and why."""
    for name in FRACTIONS:
        if given := os.environ.get(name):
            try:
                share = float(given)
            except ValueError:
                share = 0.0
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be a share such as .9, got {given!r}")
            return share, f"as {name} says"
    return FRACTION, f"which JAX takes unless {FRACTIONS[0]} says otherwise"


def above_zero(size: str, name: str) -> int:
    """Returns the bytes of an option.

    Raises:
        ValueError: if they are no size, or 0.
    """
    count = parse_bytes(size, name)
    if count == 0:
        raise ValueError(f"{name} must be more than 0 bytes, got {size!r}")
    return count
