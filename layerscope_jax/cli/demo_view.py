"""Prints the demo's report: texts, a table, whether tokens were the same, and a summary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

SHOWN_PROMPT, SHOWN_TEXT = 48, 90  # characters


def show(report: dict[str, Any], console: Console) -> None:
    """Prints a report that `layerscope_jax.cli.demo.compare` returned."""
    model = report["model"]
    console.print(
        f"{model['family']}, {model['layers']} layers of {model['experts']} experts, "
        f"{model['experts_per_token']} a token; experts take {megabytes(model['total_expert_bytes'])} MB "
        f"in {model['dtype']}, {report['budget_share']:.0%} of them fit on the device ({report['device']})\n"
    )
    for row in report["prompts"]:
        console.print(excerpt(row["domain"], row["prompt"], row["text"]))
    console.print(table(report["runs"]))
    console.print(verdict(report), end="\n\n")
    console.print(sentence(report))


def excerpt(domain: str, prompt: str, text: str) -> Text:
    """Returns the end of a prompt, dimmed, and the beginning of its continuation: about two lines."""
    prompt, text = (" ".join(part.split()) for part in (prompt, text))
    if len(prompt) > SHOWN_PROMPT:
        prompt = "... " + prompt[-SHOWN_PROMPT:].partition(" ")[2]
    if len(text) > SHOWN_TEXT:
        text = text[:SHOWN_TEXT].rpartition(" ")[0] + " ..."
    return Text.assemble((f"{domain}: ", "bold"), (f"{prompt} ", "dim"), ("| ", "cyan"), text)


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """Returns the table of runs, a line each, at most 80 columns wide without a disk."""
    reads = any(run["bytes_read"] for run in runs)
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column("policy", vertical="bottom", no_wrap=True)
    for header in (
        "tokens\n/s",
        "TTFT\nms",
        "TPOT\nms",
        "hit\nrate",
        "budget\nMB",
        "moved\nMB",
        "device\nbusy",
        "host\nbusy",
        "link\nbusy",
        *(("host\nhits", "read\nMB", "disk\nbusy") if reads else ()),
    ):
        grid.add_column(header, justify="right", vertical="bottom", no_wrap=True)
    for run in runs:
        grid.add_row(
            run["policy"]
            + (", one jit" if run["mode"] == "whole" else "")
            + (f", {run['predictor']}" if run["predictor"] else ""),
            f"{run['tokens_per_s']:.1f}",
            f"{1e3 * run['ttft_s']:.0f}",
            f"{1e3 * run['tpot_s']:.0f}",
            f"{run['hit_rate']:.0%}",
            megabytes(run["budget_bytes"]),
            megabytes(run["bytes_moved"]),
            *(f"{run[f'{part}_share']:.0%}" for part in ("device", "host", "link")),
            *(disk_cells(run) if reads else ()),
        )
    return grid


def disk_cells(run: dict[str, Any]) -> tuple[str, str, str]:
    """Returns the cells about the disk: hit rate of host memory, bytes read, busy share."""
    if run["host_hit_rate"] is None:
        return "-", "-", "-"
    return f"{run['host_hit_rate']:.0%}", megabytes(run["bytes_read"]), f"{run['disk_share']:.0%}"


def verdict(report: dict[str, Any]) -> Text:
    """Says whether every run gave the same tokens, and whether compilation is in the figures."""
    runs = report["runs"]
    tokens = sum(len(row["tokens"]) for row in report["prompts"])
    if not report["exact"]:
        layers = (run for run in runs if run["mode"] == "layers")
        others = ", ".join(run["policy"] for run in layers if not run["same_tokens"])
        same = Text(f"Tokens differ from those of everything resident: {others}. ", style="red")
    elif all(run["same_tokens"] for run in runs):
        same = Text(f"All {len(runs)} runs gave the same {tokens} tokens. ", style="green")
    else:
        same = Text(f"All runs gave the same {tokens} tokens; ", style="green")
        same += Text("one jit rounds differently and gave some other tokens. ")
    late = [run["policy"] for run in runs if run["programs_compiled"]]
    how = "Each was warmed up first, so no compilation is in the figures."
    if late:
        how = f"Compilation is in the figures of {', '.join(late)}, because every run had new shapes."
    return same + Text(how)


def sentence(report: dict[str, Any]) -> str:
    """Returns the summary: the fastest policy, the one that moves most, and how good forecasts were."""
    policies = [run for run in report["runs"] if run["policy"] != "resident"]
    if not policies:
        return "Everything was resident; name some with --policy to see what a budget costs."
    best = max(policies, key=lambda run: run["tokens_per_s"])
    most = max(policies, key=lambda run: run["bytes_moved"])
    summary = (
        f"With {report['budget_share']:.0%} of the experts' bytes on the device, {best['policy']} is fastest "
        f"with {best['tokens_per_s']:.0f} tokens/s"
    )
    if most["bytes_moved"]:
        rate = megabytes(int(most["bytes_moved"] / most["total_s"]))
        link = report["emulated_link_bandwidth"]
        summary += (
            f"; {most['policy']} moves most, {megabytes(most['bytes_moved'])} MB at {rate} MB/s "
            f"({f'the link is paced to {link}/s' if link else 'the link is not paced'} and "
            f"{most['link_share']:.0%} busy) for {most['tokens_per_s']:.0f} tokens/s"
        )
    recalls = [
        f"{run['forecast_recall']:.0%} by {run['predictor']} under {run['policy']}"
        for run in policies
        if run["forecast_recall"] is not None
    ]
    if recalls:
        summary += f"; forecast of each layer's experts: {', '.join(recalls)}"
    if report["platform"] == "cpu":
        summary += (
            ". A CPU stands in for the device, so computing on the host looks better than beside an "
            "accelerator"
        )
    return summary + "."


def megabytes(size: int) -> str:
    """Returns bytes in MB, with a digit after the point below 100 MB.

    >>> megabytes(4_720_000), megabytes(336_100_000), megabytes(0)
    ('4.7', '336', '0')
    """
    return f"{size / 1e6:.0f}" if size >= 1e8 or not size else f"{size / 1e6:.1f}"
