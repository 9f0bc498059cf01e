"""The command `layerscope calibrate`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from layerscope_jax.cli import profile_view
from layerscope_jax.cli.args import arg
from layerscope_jax.cli.options import (
    Checkpoint,
    DenseFormat,
    DeviceBudget,
    Dtype,
    ExpertFormat,
    HostBudget,
    Json,
    LinkBandwidth,
    Revision,
    open_model,
)
from layerscope_jax.config import AUTO, OffloadConfig
from layerscope_jax.generation.device_memory import room_on
from layerscope_jax.profiling.calibrate import calibrate
from layerscope_jax.support import exits
from layerscope_jax.support.errors import MachineError
from layerscope_jax.support.option_errors import writing


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Measure what experts, layers and copies cost on this machine, alone and while other parts are busy.

    `layerscope generate --profile` then plans by these times instead of measuring a few each time. Measuring
    keeps to the budgets.

    Examples:
        layerscope calibrate path/to/checkpoint --out profile.json --device-budget 2GiB
    """

    checkpoint: Checkpoint
    out: Annotated[Path, arg(metavar="FILE", help="File for the profile.")] = Path("profile.json")
    device_budget: DeviceBudget = AUTO
    host_budget: HostBudget = None
    emulated_link_bandwidth: LinkBandwidth = None
    dtype: Dtype = None
    expert_format: ExpertFormat = None
    dense_format: DenseFormat = None
    revision: Revision = None
    json: Json = False

    def run(self) -> int:
        """Returns the exit code."""
        exits.need_output()
        sizes: dict[str, Any] = {
            "device_budget": self.device_budget,
            "host_budget": self.host_budget,
            "emulated_link_bandwidth": self.emulated_link_bandwidth,
        }
        config = OffloadConfig(**sizes)  # refuses a malformed size before the model is loaded
        with writing("--out", self.out):
            model = open_model(
                self.checkpoint,
                self.dtype,
                self.revision,
                self.expert_format,
                self.dense_format,
                self.host_budget,
            )
            room = None
            if self.device_budget == AUTO:
                room = room_on(
                    model.device,
                    model,
                    max_num_seqs=config.max_num_seqs,
                    context=config.context,
                    prefill_chunk_size=config.prefill_chunk_size,
                )
                sizes["device_budget"] = None if room is None else min(model.bank.total_bytes, room.left)
            try:
                with nullcontext() if room is None else room.explained():
                    exits.say("measuring; other work on this machine distorts the figures")
                    profile = calibrate(model, **sizes)
            except MachineError as error:
                raise MachineError(f"{error}; or give --device-budget a size") from error
            profile.save(self.out)
        if self.json:
            print(json.dumps(profile.to_json()))
        else:
            profile_view.show(profile, Console(highlight=False))
            print(f"The profile is in {self.out}")
        return 0
