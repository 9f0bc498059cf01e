"""Prints what fits where, for `layerscope fit`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from layerscope_jax.cli.comparison_view import percent
from layerscope_jax.cli.fit_report import HOST_MARGIN, FitReport, FormatFit
from layerscope_jax.cli.fit_times import Expected
from layerscope_jax.cli.profile_view import table
from layerscope_jax.support.units import gib

MOST_ADVICE = 5


def show(report: FitReport, console: Console) -> None:
    """Prints a report."""
    memory, needs, fit = report.memory, report.needs, report.chosen
    where = memory.device or "a CPU alone"
    console.print(f"{Path(report.checkpoint).name} (family {report.family}) on {where}\n")
    lines = {
        "dense weights": f"{gib(needs.dense)} in {report.dtype}",
        "caches": f"{gib(needs.caches)} for {report.max_num_seqs} requests of {report.context:,} positions",
        "steps": f"{gib(needs.workspace)} for prefill steps of up to {report.prefill_chunk_size:,} tokens",
        "left free": gib(needs.margin),
        "experts": f"{gib(fit.total_bytes)}, {gib(fit.expert_bytes)} each in {fit.format}",
    }
    if memory.device_bytes is not None:
        lines["device memory"] = f"{gib(memory.device_bytes)}, {memory.device_told}"
    lines["host memory"] = f"{gib(memory.host_bytes)}, {memory.host_told}"
    for name, text in lines.items():
        console.print(f"{name:<14} {text}", soft_wrap=True)
    console.print(f"\n{verdict(report)}\n", soft_wrap=True)
    rows = [
        (each.format, gib(each.total_bytes), gib(each.left_bytes), percent(each.share), place(each))
        for each in report.formats
    ]
    console.print(table(("experts in", "all take", "room", "of them\nthere", "the others"), rows))
    for name, why in report.refused.items():
        console.print(f"{name}: {why}", soft_wrap=True)
    if report.times is None:
        console.print(f"Expected times are left out: {report.no_times}", soft_wrap=True)
    else:
        show_times(report.times, console)
    if report.advice:
        console.print("\nWhat would help, most first (share of the experts that would then fit):")
        for advice in report.advice[:MOST_ADVICE]:
            console.print(f"  {percent(advice.share):>4}  {advice.change}", soft_wrap=True)


def verdict(report: FitReport) -> str:
    """Returns the answer in a sentence."""
    fit, device = report.chosen, report.memory.device
    left = f"{gib(fit.left_bytes)} for experts"
    if fit.experts_lie == "nowhere":
        if fit.left_bytes == 0:
            return (
                f"It does not fit: weights, caches and steps take {gib(report.needs.total)} beside the "
                "experts, more than there is."
            )
        return (
            f"It does not fit: the experts take {gib(fit.total_bytes)} of host memory, more than there is, "
            f"because {gib(HOST_MARGIN)} of it is left free for Python, JAX and the system."
        )
    if fit.experts_lie == "disk":
        host = fit.left_bytes if device is None else report.memory.host_bytes - HOST_MARGIN
        return (
            f"It runs from the disk, with --host-budget {host // 2**20}MiB or less: there is {left}"
            f"{'' if device is None else ' on the device'}, {fit.share:.0%} of them."
        )
    if device is None:
        return f"It fits: there is {left} in memory, all of them."
    if fit.experts_lie == "device":
        return f"It fits on the device: there is {left}, all of them."
    return f"It runs with experts in host memory: there is {left} on the device, {fit.share:.0%} of them."


def place(fit: FormatFit) -> str:
    """Returns where the experts are that have no room."""
    if fit.experts_lie == "nowhere":
        return "nowhere"
    return "-" if fit.share == 1 and fit.experts_lie != "disk" else f"{fit.experts_lie}"


def show_times(found: Expected, console: Console) -> None:
    """Prints expected times."""
    decode, prefill = found.decode_error, found.prefill_error
    console.print(
        f"Expected with policy {found.policy} and {found.experts:,} experts on the device, by the simulator. "
        f"Where it was compared with a measured machine, its mean error was {decode:.0%} for decode steps "
        f"and {prefill:.0%} for prefills:",
        soft_wrap=True,
    )
    rows = [
        (
            str(each.batch),
            f"{each.prompt_tokens:,}",
            bar(each.ttft_s, prefill, 1.0, "s"),
            bar(each.tpot_s, decode, 1e3, "ms"),
        )
        for each in found.times
    ]
    console.print(table(("requests", "prompt\ntokens", "first token", "each further token"), rows))
    console.print(f"Costs: {found.source}. Routing: {found.routing}.", soft_wrap=True)


def bar(seconds: float, error: float, scale: float, unit: str) -> str:
    """Returns a time with its error bar.

    >>> bar(0.02, 0.1, 1e3, "ms")
    '20 ms (18 to 22)'
    """
    values = (scale * seconds * factor for factor in (1 - error, 1, 1 + error))
    low, middle, high = (f"{value:.3g}" if value < 999.5 else f"{value:,.0f}" for value in values)
    return f"{middle} {unit} ({low} to {high})"
