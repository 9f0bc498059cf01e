"""Prints a comparison of policies: a table of decode steps for each batch, one of prefills, refusals."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from layerscope_jax.simulation.comparison import Comparison, Row

DECODE = (
    "step\nms",
    "of\nbound",
    "to\npre-\nsched",
    "hit\nrate",
    "moved\nMB",
    "waste\nMB",
    "device\nbusy",
    "host\nbusy",
    "link\nbusy",
    "fore-\nseen",
    "on\ntime",
)
"""Column headings; moved and waste are of one step. With the policy they take 79 letters."""


DISK = ("host\nhits", "read\nMB", "disk\nbusy")
"""Further headings if experts are on a disk."""


def show(comparison: Comparison, console: Console) -> None:
    """Prints a comparison, at most 80 columns wide for up to four batches; 95 with a disk."""
    budget = f"{comparison.budget_experts} of {comparison.all_experts} experts"
    console.print(
        f"{comparison.profile}: {comparison.source}\n"
        f"Routing {comparison.routing}; the device has room for {budget}, "
        f"{comparison.budget_experts * comparison.expert_bytes / 1e9:.3g} GB"
    )
    if comparison.devices > 1:
        console.print(f"{comparison.devices} devices share the experts; the room is that of each of them")
    if comparison.host_experts is not None:
        console.print(
            f"Host memory has room for {comparison.host_experts} experts, "
            f"{comparison.host_experts * comparison.expert_bytes / 1e9:.3g} GB; the others are on the disk, "
            "which the bound does not know"
        )
    batches = list(dict.fromkeys(row.batch for row in comparison.rows))
    for batch in batches:
        rows = [row for row in comparison.rows if row.batch == batch and row.phase == "decode"]
        console.print(f"\nDecode, batch {batch}, {rows[0].steps} steps; hit rates at {budget}\n")
        console.print(decode_table(rows))
        console.print(
            f"No policy takes less than {1e3 * rows[0].bound_s:.4g} ms a step. "
            f"Without copying ahead none has a hit rate over {rows[0].belady_hit_rate:.1%}."
        )
    if batches:
        console.print("\nPrefill of the batch's prompts, from an empty device\n")
        console.print(prefill_table([row for row in comparison.rows if row.phase == "prefill"]))
    reasons: dict[str, list[str]] = {}
    for policy, reason in comparison.refused.items():
        reasons.setdefault(short(reason, policy), []).append(policy)
    for why, policies in reasons.items():
        console.print(f"\nNot run: {', '.join(policies)}: {why}")


def decode_table(rows: Sequence[Row]) -> Table:
    """Returns the table of decode steps, a line for each policy, the fastest first."""
    disk = any(row.host_hit_rate is not None for row in rows)
    table = _table(("policy", *DECODE, *(DISK if disk else ())))
    for row in sorted(rows, key=lambda row: row.step_s):
        table.add_row(
            row.policy,
            f"{1e3 * row.step_s:.1f}",
            percent(row.share_of_bound, 1),
            times(row.ratio_to_presched),
            percent(row.hit_rate),
            *(f"{size / row.steps / 1e6:.0f}" for size in (row.bytes_moved, row.bytes_wasted)),
            *(percent(share) for share in (row.device_share, row.host_share, row.link_share)),
            percent(row.forecast_recall),
            percent(row.prefetch_on_time),
            *(disk_cells(row) if disk else ()),
        )
    return table


def disk_cells(row: Row) -> tuple[str, str, str]:
    """Returns the cells about the disk; megabytes are of one step."""
    return percent(row.host_hit_rate), f"{row.bytes_read / row.steps / 1e6:.0f}", percent(row.disk_share)


def prefill_table(rows: Sequence[Row]) -> Table:
    """Returns the table of prefills, a line for each policy, ordered by its time for the first batch."""
    by_policy: dict[str, list[Row]] = {}
    for row in rows:
        by_policy.setdefault(row.policy, []).append(row)
    batches = dict.fromkeys(row.batch for row in rows)
    table = _table(
        ("policy", *(heading for batch in batches for heading in (f"batch {batch}\nms", "of\nbound")))
    )
    for policy, cells_of in sorted(by_policy.items(), key=lambda item: item[1][0].step_s):
        cells = ((f"{1e3 * row.step_s:.0f}", percent(row.share_of_bound, 1)) for row in cells_of)
        table.add_row(policy, *(cell for pair in cells for cell in pair))
    return table


def short(reason: str, policy: str) -> str:
    """Returns a refusal's first clause without the policy's name, so that equal refusals can be grouped.

    >>> short("device_budget is too small for policy 'lru': it holds 3 experts (9 bytes); raise it", "lru")
    'device_budget is too small: it holds 3 experts'
    """
    return re.split(r";| \(", reason.replace(f" for policy {policy!r}", ""))[0]


def percent(share: float | None, digits: int = 0) -> str:
    """Formats a share for a table.

    >>> percent(0.964, 1), percent(0.5), percent(None)
    ('96.4%', '50%', '-')
    """
    return "-" if share is None else f"{share:.{digits}%}"


def times(ratio: float | None) -> str:
    """Formats a ratio for a table, in five letters.

    >>> times(1.0026), times(10.1814), times(None)
    ('1.003', '10.18', '-')
    """
    return "-" if ratio is None else f"{ratio:.3f}" if ratio < 9.9995 else f"{ratio:.4g}"


def _table(headings: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", vertical="bottom", no_wrap=True)
    return table
