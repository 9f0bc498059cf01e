"""The command `layerscope fit`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import jax
from rich.console import Console

from layerscope_jax.checkpoints.description import describe
from layerscope_jax.checkpoints.headers import read_configs
from layerscope_jax.cli import fit_view
from layerscope_jax.cli.args import arg
from layerscope_jax.cli.fit_report import Asked, FitReport, Memory, report
from layerscope_jax.cli.fit_times import expected
from layerscope_jax.cli.options import Checkpoint, Json, Revision, folder_of
from layerscope_jax.config import OffloadConfig
from layerscope_jax.generation.device_memory import usual_context
from layerscope_jax.models.config import ModelConfig
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
            help="Speed of copies to the device, such as '12GB/s', in place of the profile's.",
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
    json: Json = False

    def run(self) -> int:
        """Returns the exit code."""
        exits.need_output()
        settings = OffloadConfig(context=self.context, max_num_seqs=self.max_num_seqs)
        given = {
            name: None if size is None else above_zero(size.removesuffix("/s"), name)
            for name, size in {
                "--device-memory": self.device_memory,
                "--host-memory": self.host_memory,
                "--link": self.link,
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
        made = report(description, config, memory_of(given["--device-memory"], given["--host-memory"]), asked)
        made = timed(made, config, profile, routing, given["--link"])
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
        alone = [
            name for name, value in (("--link", self.link), ("--trace", self.trace)) if value is not None
        ]
        if self.profile is None and alone:
            raise ValueError(
                f"{' and '.join(alone)} changes expected times, which need costs of a machine; add --profile"
            )
        return profile, routing


def timed(
    made: FitReport,
    config: ModelConfig,
    profile: MachineProfile | None,
    routing: Routing | None,
    link_bytes_per_s: int | None,
) -> FitReport:
    """Returns a report with expected times, or why they are left out."""
    fit = made.chosen
    if profile is None:
        reason = (
            "no measured costs of this model on this machine: run `layerscope calibrate`, and give the file "
            "with --profile"
        )
    elif fit.experts_lie not in ("device", "host"):
        reason = "simulated are models whose experts fit into host memory"
    elif made.memory.device is None:
        # The only memory holds all experts: the device of the profile would be this CPU, with all resident.
        reason = "simulated are machines with an accelerator: give its memory with --device-memory"
    else:
        slots = fit.left_bytes // fit.expert_bytes
        return replace(
            made,
            times=expected(
                config,
                fit.format,
                profile,
                routing,
                slots=slots,
                max_num_seqs=made.max_num_seqs,
                link_bytes_per_s=link_bytes_per_s,
            ),
        )
    return replace(made, no_times=reason)


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
