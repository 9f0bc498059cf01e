"""The command `layerscope simulate`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from rich.console import Console

from layerscope_jax.cli import comparison_view
from layerscope_jax.cli.args import arg
from layerscope_jax.cli.options import Json, TimelineFile
from layerscope_jax.profiling.machine_profile import MachineProfile
from layerscope_jax.simulation.comparison import simulate_profile
from layerscope_jax.simulation.policies import SIMULATED
from layerscope_jax.simulation.routing import DERIVED, Routing
from layerscope_jax.support import exits
from layerscope_jax.support.files import write_file
from layerscope_jax.support.option_errors import option, writing
from layerscope_jax.support.units import parse_bytes

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Simulate:
    """Compare policies on the machine of a profile, on a virtual clock: nothing is computed.

    Every policy prefills the prompts of a batch, starting with an empty device, then runs the decode steps,
    over recorded routing of a model. Beside them stands the bound that no policy can beat.

    Examples:
        layerscope simulate --profile mixtral-8x7b --batch 4 16 --policy presched fiddler lru
        layerscope simulate --profile profile.json --trace routing.npz --device-budget 24GiB --json
    """

    profile: Annotated[
        str,
        arg(
            metavar="PROFILE",
            help="A file that `layerscope calibrate` wrote, or a shipped profile: deepseek-v2-lite, "
            "moonlight, qwen3-30b-a3b or mixtral-8x7b; append @pcie3-x8, @pcie4-x16 or @pcie5-x16 for "
            "another link.",
        ),
    ]
    trace: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="Recorded routing of the profile's model, an .npz file that `layerscope predictor routing` "
            "wrote; without it, the one that the profile names, or one that is shipped for a model with the "
            "same numbers.",
        ),
    ] = None
    batch: Annotated[
        tuple[int, ...] | None,
        arg(
            metavar="INT ...",
            help="Batch sizes, in requests; by default 4, 16 and 64, but no more than were recorded.",
        ),
    ] = None
    decode_steps: Annotated[
        int | None,
        arg(metavar="INT", help="Decode steps, the first that were recorded; without it, all."),
    ] = None
    device_budget: Annotated[
        str | None,
        arg(
            metavar="SIZE",
            aliases=("--budget",),
            help="Device memory for experts, such as '24GiB', or a number of experts; without it, the "
            "profile's budget.",
        ),
    ] = None
    host_budget: Annotated[
        str | None,
        arg(
            metavar="SIZE",
            help="Host memory for experts, such as '64GiB', or a number of experts, if the others are on a "
            "disk, whose costs the profile must have; by default host memory holds all.",
        ),
    ] = None
    devices: Annotated[
        int,
        arg(
            metavar="INT",
            help="How many devices share the experts, each with a link and the budget of its own.",
        ),
    ] = 1
    root_link: Annotated[
        str | None,
        arg(
            metavar="BYTES/S",
            help="Rate of what the links of several devices share, such as '25GB/s' of one root complex; by "
            "default each link is as fast as alone.",
        ),
    ] = None
    policy: Annotated[
        tuple[str, ...],
        arg(metavar="POLICY ...", help=f"Some of {', '.join(SIMULATED)}, or {ALL}."),
    ] = (ALL,)
    predictor: Annotated[
        str | None,
        arg(
            metavar="PREDICTOR",
            help="Predictor whose forecasts the policies are given: one that the routing was recorded with "
            f"(llapor, gate), or one of {', '.join(DERIVED)}; by default llapor, if recorded, or gate.",
        ),
    ] = None
    out: Annotated[
        Path | None,
        arg(metavar="FILE", help="Also write the rows of the tables there, as one JSON object."),
    ] = None
    json: Json = False
    timeline: TimelineFile = None

    def run(self) -> int:
        """Returns the exit code."""
        exits.need_output()
        with option("--profile"):
            profile = MachineProfile.load(self.profile)
        if profile.slots is None and self.device_budget is None:
            raise ValueError(f"the profile {self.profile} names no budget; set one with --device-budget")
        with (
            nullcontext() if self.out is None else writing("--out", self.out),
            nullcontext() if self.timeline is None else writing("--timeline", self.timeline),
        ):
            self._simulate(profile)
        return 0

    def _routing(self) -> Routing | None:
        if self.trace is None:
            return None
        with option("--trace"):
            return Routing.load(self.trace)

    def _simulate(self, profile: MachineProfile) -> None:
        comparison = simulate_profile(
            profile,
            self._routing(),
            batches=self.batch,
            steps=self.decode_steps,
            slots=None
            if self.device_budget is None
            else experts_of(self.device_budget, profile.model.expert_bytes, "device_budget"),
            policies=SIMULATED if ALL in self.policy else self.policy,
            predictor=self.predictor,
            host_slots=None
            if self.host_budget is None
            else experts_of(self.host_budget, profile.model.expert_bytes, "host_budget"),
            devices=self.devices,
            root_bandwidth=None
            if self.root_link is None
            else parse_bytes(self.root_link.removesuffix("/s"), "root_link"),
            progress=True,
            timeline=self.timeline,
        )
        if self.trace is not None:
            comparison = replace(comparison, routing=str(self.trace))
        if self.out is not None:
            write_file(self.out, json.dumps(comparison.to_json(), indent=1) + "\n")
        if self.json:
            print(json.dumps(comparison.to_json()))
            return
        comparison_view.show(comparison, Console(highlight=False))
        if self.out is not None:
            print(f"The rows are in {self.out}")


def experts_of(budget: str, expert_bytes: int, what: str) -> int:
    """Returns how many experts a budget holds.

    Args:
        budget: bytes with a unit, or a number of experts.
        expert_bytes: bytes of one expert.
        what: name of the option, for messages.

    Raises:
        ValueError: if the budget is neither.

    >>> experts_of("1GiB", 300 * 2**20, "device_budget"), experts_of("62", 300 * 2**20, "device_budget")
    (3, 62)
    """
    if budget.strip().isdecimal():
        return int(budget)
    try:
        return parse_bytes(budget, what) // expert_bytes
    except ValueError:
        raise ValueError(
            f"{what} must be a size with its unit, such as '24GiB', or a number of experts, got {budget!r}"
        ) from None
