"""Prints what fits where, for `layerscope fit`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from layerscope_jax.cli.comparison_view import percent
from layerscope_jax.cli.fit_bounds import Bounds
from layerscope_jax.cli.fit_report import FitReport
from layerscope_jax.cli.fit_sizes import HOST_MARGIN
from layerscope_jax.cli.fit_times import Expected
from layerscope_jax.cli.profile_view import table
from layerscope_jax.support.units import gib

MOST_ADVICE = 5


def show(report: FitReport, console: Console) -> None:
    """Prints a report."""
    memory, needs, fit = report.memory, report.needs, report.chosen
    where = memory.device or "a CPU alone"
    console.print(f"{Path(report.checkpoint).name} (family {report.family}) on {where}\n")
    requests = "1 request" if report.max_num_seqs == 1 else f"{report.max_num_seqs} requests"
    packed = "" if report.dense_format is None else f", matrices in {report.dense_format}"
    lines = {
        "dense weights": f"{gib(needs.dense)} in {report.dtype}{packed}",
        "caches": f"{gib(needs.caches)} for {requests} of {report.context:,} positions",
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
        (
            each.format,
            gib(each.total_bytes),
            gib(each.left_bytes),
            percent(each.share),
            place(each.share, each.experts_lie),
        )
        for each in report.formats
    ]
    console.print(table(("experts in", "all take", "room", "of them\nthere", "the others"), rows))
    for name, why in report.refused.items():
        console.print(f"{name}: {why}", soft_wrap=True)
    if report.times is None:
        console.print(f"Expected times are left out: {report.no_times}.", soft_wrap=True)
    else:
        show_times(report.times, console)
    if report.bounds is not None:
        show_bounds(report.bounds, console)
    elif report.no_bounds is not None:
        console.print(f"What bytes alone say of them is left out too: {report.no_bounds}.", soft_wrap=True)
    if report.advice:
        show_advice(report, console)


def show_advice(report: FitReport, console: Console) -> None:
    """Prints what would help, below how it is."""
    where = "on the device" if report.memory.device is not None else "in memory"
    console.print(
        f"\nWhat would help, the best first (by where the experts would be that are not {where}, then by the "
        "share that is):",
        soft_wrap=True,
    )
    now = report.chosen
    rows = [(now.share, now.experts_lie, "as it is")]
    rows += [(each.share, each.experts_lie, each.change) for each in report.advice[:MOST_ADVICE]]
    console.print("  share  the others  change")
    for share, lie, change in rows:
        console.print(f"  {percent(share):>5}  {place(share, lie):<10}  {change}", soft_wrap=True)


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
        budget = as_option(fit.host_bytes)
        return (
            f"It runs from the disk: there is {left}, {fit.share:.0%} of them. Give --host-budget {budget}."
        )
    if device is None:
        return f"It fits: there is {left} in memory, all of them."
    if fit.experts_lie == "device":
        return f"It fits on the device: there is {left}, all of them."
    return f"It runs with experts in host memory: there is {left} on the device, {fit.share:.0%} of them."


def as_option(size: int) -> str:
    """Returns a number of bytes as an option takes it, rounded down.

    >>> as_option(19 * 2**30 + 2**29), as_option(700 * 2**20 + 9), as_option(9)
    ('19.5GiB', '700MiB', '9')
    """
    if size >= 4 * 2**30:
        return f"{size * 10 // 2**30 / 10:g}GiB"
    return f"{size // 2**20}MiB" if size >= 2**20 else str(size)


def place(share: float, experts_lie: str) -> str:
    """Returns where the experts are that have no room."""
    return "-" if share == 1 and experts_lie in ("device", "host") else experts_lie


def show_times(found: Expected, console: Console) -> None:
    """Prints expected times."""
    decode, prefill = found.decode_error, found.prefill_error
    console.print(
        f"Expected with policy {found.policy} and {found.experts:,} experts on the device, by the simulator. "
        f"Where it was compared with a machine, nine of ten decode steps were within {decode:.0%}, and "
        f"prefills within {prefill:.0%}; that was {found.error_source}:",
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


def show_bounds(found: Bounds, console: Console) -> None:
    """Prints what bytes alone say of decode steps; without a link, the host is the only way."""
    console.print(
        f"\nEach further token at best, by bytes: {found.basis}. A profile of `layerscope calibrate` and "
        "recorded routing give better figures, with --profile.",
        soft_wrap=True,
    )
    ways = 1 if found.link is None else 3
    rows = [
        (
            str(each.batch),
            f"{each.experts:.3g}",
            gib(each.read_bytes),
            *("-" if time_s is None else in_unit(1e3 * time_s, "ms") for time_s in times[:ways]),
        )
        for each in found.steps
        for times in [(each.host_s, each.link_s, each.both_s)]
    ]
    headings = (
        "requests",
        "experts\na layer",
        "read",
        "computed\nby the host",
        "copied to\nthe device",
        "both\nat once",
    )
    console.print(table(headings[: 3 + ways], rows))
    told = {"The host reads its memory": found.host, "The link": found.link}
    for name, rate in told.items():
        if rate is None:
            continue
        speed = "" if rate.bytes_per_s is None else f"{rate.bytes_per_s / 1e9:.3g} GB/s, "
        console.print(f"{name}: {speed}{rate.told}.", soft_wrap=True)


def in_unit(value: float, unit: str) -> str:
    """Returns a number to three digits, with its unit."""
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"


def bar(seconds: float, error: float, scale: float, unit: str) -> str:
    """Returns a time, and between which times its error puts what is measured.

    >>> bar(0.02, 0.25, 1e3, "ms")  # a quarter more than 16, a quarter less than 26.7
    '20 ms (16 to 26.7)'
    """
    # The error is relative to what is measured: what is simulated is from 1 - error to 1 + error times that.
    values = (scale * seconds / factor for factor in (1 + error, 1, 1 - error))
    low, middle, high = (f"{value:.3g}" if value < 999.5 else f"{value:,.0f}" for value in values)
    return f"{middle} {unit} ({low} to {high})"
