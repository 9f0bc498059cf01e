"""What do more cards gain, and what does the root complex take back?

Simulated: recorded routing on the machines of the shipped profiles, with 1, 2 and 4 cards that share the
experts (`layerscope_jax.simulation.devices`). All cards together have as much memory for experts as the one
card has, so that what is gained is links and arithmetic, and not room; their links are as fast as the one
card's, or share `--root-link`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import tyro
from rich.console import Console

from benchmarks import harness
from layerscope_jax.profiling.machine_profile import MachineProfile
from layerscope_jax.simulation.comparison import simulate_profile
from layerscope_jax.simulation.routing import Routing
from layerscope_jax.support.units import parse_bytes


@dataclass(frozen=True, kw_only=True)
class Options(harness.Common):
    """Machines, cards and policies."""

    profiles: tuple[str, ...] = ("deepseek-v2-lite", "qwen3-30b-a3b", "mixtral-8x7b")
    devices: tuple[int, ...] = (2, 4)
    root_link: str = "25GB"
    """Bytes a second of what all links share."""
    batches: tuple[int, ...] = (4, 64)
    steps: int = 16
    """Decode steps, at most."""
    policies: tuple[str, ...] = ("presched", "fiddler", "hybrimoe", "lru")


def main(options: Options) -> dict[str, Any]:
    if options.quick:
        options = replace(options, profiles=("mixtral-8x7b",), devices=(2,), batches=(4,), steps=4)
    root, progress, rows = parse_bytes(options.root_link, "root_link"), Console(stderr=True), []
    for name in options.profiles:
        profile = MachineProfile.load(name)
        slots = profile.geometry().slots
        cases = [(1, None)] + [(count, shared) for count in options.devices for shared in (None, root)]
        for count, shared in cases:
            found = simulate_profile(
                profile,
                Routing.shipped(str(profile.routing)).shortened(options.steps),
                batches=options.batches,
                policies=options.policies,
                slots=slots // count,
                devices=count,
                root_bandwidth=shared,
            )
            for row in found.rows:
                rows.append(
                    {"profile": name, "devices": count, "root_link": shared}
                    | {key: getattr(row, key) for key in ("policy", "batch", "phase", "step_s", "bound_s")}
                    | {key: getattr(row, key) for key in ("hit_rate", "link_share", "share_of_bound")}
                )
            progress.print(f"simulated: {name}, {count} cards, root {shared}")
    harness.print_table(
        f"Decode, ms a step (share of the bound); the root complex carries {options.root_link}/s; simulated",
        ("model", "batch", "policy", "1 card", *headings(options.devices)),
        [
            (name, batch, policy, *(shown(rows, name, batch, policy, *case) for case in cases))
            for name in options.profiles
            for batch in options.batches
            for policy in options.policies
        ],
    )
    return harness.finish(
        options,
        {
            "benchmark": "devices",
            "quick": options.quick,
            "machine": harness.machine(),
            "root_bytes_per_s": root,
            "rows": rows,
        },
    )


def headings(devices: tuple[int, ...]) -> list[str]:
    return [text for count in devices for text in (f"{count}, own links", f"{count}, one root")]


def shown(
    rows: list[dict[str, Any]], name: str, batch: int, policy: str, devices: int, root: int | None
) -> str:
    """Returns the time of a decode step and its share of the bound; a dash where the policy was refused."""
    wanted = (name, batch, policy, devices, root, "decode")
    keys = ("profile", "batch", "policy", "devices", "root_link", "phase")
    found = [row for row in rows if tuple(row[key] for key in keys) == wanted]
    return f"{1e3 * found[0]['step_s']:.4g} ({found[0]['share_of_bound']:.0%})" if found else "-"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
