"""What the benchmarks share: the machine's record, runs timed in turns, tables and JSON files."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from layerscope_jax import Engine

PACKAGES = ("jax", "jaxlib", "flax", "numpy")
WARM_UPS = 12

Parts = Mapping[str, "float | Sequence[float]"]


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every benchmark."""

    quick: bool = False
    """Tiny sizes: a check that it runs, not a measurement."""
    json: Path | None = None
    """Also write the results to this file."""


@dataclass
class Samples:
    """What one candidate gave.

    Attributes:
        parts: name -> what each round measured, in the order of the rounds.
        warm_ups: calls before the first round.
        compiled: programs that JAX compiled during the rounds. Anything but 0 is in the times.
    """

    parts: dict[str, list[float]] = field(default_factory=dict)
    warm_ups: int = 0
    compiled: int = 0


def measure(
    candidates: Mapping[str, Callable[[], Parts | None]],
    rounds: int,
    warm: int = 1,
    warm_ups: int = WARM_UPS,
) -> dict[str, Samples]:
    """Times candidates in turns, so that a machine that drifts drifts under all of them alike.

    Each is first called until a call compiles no new program. Then in each round every one is called once;
    the one that begins changes from round to round.

    Args:
        candidates: name -> a call that returns once its work is done (`block_until_ready` inside). It gives
            the parts that it timed itself, each a number or several; or None, and the whole call is timed as
            "seconds".
        rounds: timed calls of each.
        warm: calls of each before, at least.
        warm_ups: of each at most, unless `warm` is more; fewer where a call takes long.
    """
    samples = {name: Samples() for name in candidates}
    for name, call in candidates.items():
        for number in range(1, max(warm, warm_ups) + 1):
            before = compiled_programs()
            call()
            samples[name].warm_ups += 1
            if number >= warm and compiled_programs() == before:
                break
    names = list(candidates)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            before = compiled_programs()
            began = time.perf_counter()
            parts = candidates[name]() or {"seconds": time.perf_counter() - began}
            samples[name].compiled += compiled_programs() - before
            for part, values in parts.items():
                new = list(values) if isinstance(values, Sequence) else [values]
                samples[name].parts.setdefault(part, []).extend(new)
    return samples


_compiled: list[float] = []


def compiled_programs() -> int:
    """How many programs XLA has compiled since the first call of this function."""
    if not _compiled:
        from jax import monitoring

        def count(event: str, duration_secs: float, **_: Any) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                _compiled.append(duration_secs)

        monitoring.register_event_duration_secs_listener(count)
        _compiled.append(0.0)
    return len(_compiled) - 1


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and 90th percentile.

    >>> spread([1.0, 2.0, 3.0])
    {'median': 2.0, 'p90': 2.8}
    """
    values = np.asarray(list(values), float)
    return {"median": round(float(np.median(values)), 9), "p90": round(float(np.quantile(values, 0.9)), 9)}


def ratio(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """`spread` of the quotients round by round: both saw the same machine within a round.

    >>> ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    {'median': 2.0, 'p90': 2.0}
    """
    return spread(a / b for a, b in zip(of, to, strict=True))


def run_engine(
    engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[dict[str, float | list[float]], list[list[int]]]:
    """Streams a continuation of every prompt, `new_tokens` long each, with nothing to stop it earlier.

    As many as the engine runs at once are a batch.

    Returns:
        parts: "total" seconds; "first", of each batch until all have their first tokens, which a long prefill
            finds in several steps; "step", of each decode step.
        tokens: of each prompt.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    first: list[float] = []
    steps: list[float] = []
    batch_size = engine.config.max_num_seqs
    missing = [min(batch_size, len(prompts) - start) for start in range(0, len(prompts), batch_size)]
    last = began = time.perf_counter()
    for event in engine.stream(prompts, max_new_tokens=new_tokens, stop_token_ids=()):
        tokens[event.request].append(event.token_id)
        batch, row = divmod(event.request, batch_size)
        if is_first := len(tokens[event.request]) == 1:
            missing[batch] -= 1
        # A batch's first row comes first in every step.
        if (is_first and missing[batch] == 0) or (not is_first and row == 0):
            now = time.perf_counter()
            (first if is_first else steps).append(now - last)
            last = now
    return {"total": time.perf_counter() - began, "first": first, "step": steps}, tokens


def machine() -> dict[str, Any]:
    """What the figures were measured on, and with which versions."""
    import jax

    from layerscope_jax.support.machine import cores, cpu_name

    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": jax.devices()[0].device_kind,
        "load_average": os.getloadavg()[0],
        "versions": versions,
        "commit": git("rev-parse", "HEAD"),
        "changed_since_commit": None if changes is None else bool(changes),
    }


def describe(record: Mapping[str, Any]) -> str:
    """One line for the foot of a table."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return (
        f"{record['cpu']}, {record['cores']} cores, {record['memory_bytes'] / 2**30:.0f} GiB; "
        f"JAX device: {record['device']}; {versions}"
    )


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a Markdown table; every column but the first to the right."""
    table = Table(box=box.MARKDOWN)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row))
    console = Console(width=None if sys.stdout.isatty() else 220)
    console.print(f"\n{title}\n", highlight=False)
    console.print(table)


def finish(options: Common, result: dict[str, Any]) -> dict[str, Any]:
    """Says what `result["machine"]` was, writes the result to a file if that was asked for; returns it."""
    print("\n" + describe(result["machine"]))
    if options.json is not None:
        write_json(options.json, result)
    return result


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result, whole or not at all."""
    from layerscope_jax.support.files import write_file

    write_file(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
