"""Prints a measured profile: each part's times alone, and while the other parts are busy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from layerscope_jax.profiling.machine_profile import MachineProfile, costs_json


def show(profile: MachineProfile, console: Console) -> None:
    """Prints a measured profile."""
    model, details = profile.model, profile.details
    busy = costs_json(profile.costs)
    alone = busy["alone"]
    console.print(
        f"{profile.name}: {model.num_layers} layers of {model.num_experts} experts, "
        f"{model.experts_per_token} a token; {model.expert_bytes / 1e6:.3g} MB an expert in {model.dtype}\n"
        f"{profile.costs.source}; in milliseconds\n"
    )
    tokens = alone["host_ms"]["tokens"]
    columns = [costs[part]["ms"] for part in ("host_ms", "device_ms") for costs in (alone, busy)]
    names = ("tokens of\nan expert", "host\nalone", "host\nbusy", "device\nalone", "device\nbusy")
    console.print(table(names, zip(tokens, *columns, strict=True)))

    rows = [
        (context, *row)
        for context, layers in contexts(profile)
        for row in zip(layers[0]["tokens"], layers[0]["ms"], layers[1]["ms"], strict=True)
    ]
    steps = ("positions", "tokens of\na step", "rest of a\nlayer, alone", "rest of a\nlayer, busy")
    console.print(table(steps, rows))

    sizes = details["transfer_by_size"]
    sent = zip(sizes["alone"]["experts"], *(sizes[how]["ms"] for how in ("alone", "together")), strict=True)
    console.print(table(("experts\ncopied", "link\nalone", "link\nbusy"), sent))
    for how, text in (("alone", "alone"), ("together", "busy")):
        if sizes[how]["bytes_per_s"] is not None:
            console.print(
                f"The link, {text}: {sizes[how]['latency_ms']:.3g} ms and then "
                f"{sizes[how]['bytes_per_s'] / 1e9:.3g} GB/s"
            )
    memory = details["memory"]
    free = [f"{memory['host_free_bytes'] / 1e9:.3g} GB of it free"]
    if memory["device_free_bytes"] is not None:
        free.append(f"{memory['device_free_bytes'] / 1e9:.3g} GB on the device")
    console.print(
        f"Host memory: {memory['host_read_bytes_per_s'] / 1e9:.3g} GB/s read by all cores, {', '.join(free)}"
    )
    console.print(
        f"Policies plan by the times with the other parts busy. Measuring took {details['seconds']} s."
    )


def contexts(profile: MachineProfile) -> Iterable[tuple[str, tuple[dict, dict]]]:
    """Yields the positions that requests have room for, and a layer's times there, alone and busy."""
    details = profile.details
    usual = details["costs"]["context_of_layer_ms"]
    yield str(usual), (costs_json(profile.costs)["alone"]["layer_ms"], profile.costs.layer_ms.to_json())
    for context, layers in details["layer_ms_by_context"].items():
        yield context, (layers["alone"], layers["together"])


def table(headings: Sequence[str], rows: Iterable[Sequence[float | str]]) -> Table:
    """Returns a table of numbers to three digits, each column aligned right."""
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        grid.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    for row in rows:
        grid.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row))
    return grid
