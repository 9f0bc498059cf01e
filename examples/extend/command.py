"""A command of your own, in one file: `layerscope plans FILE` says what recorded plans did.

Install the folder (`pip install examples/extend`): its `pyproject.toml` adds the class below to the entry
points `layerscope.commands`. A command is a dataclass whose fields are its options and whose docstring is its
help; `run` returns the exit code. A `ValueError` that it raises becomes one line on stderr and exit code 2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from layerscope_jax import load_plans


@dataclass(frozen=True, kw_only=True)
class Plans:
    """Summarise recorded plans: experts computed on each side, loaded, prefetched and evicted.

    Examples:
        layerscope plans plans.jsonl
        layerscope plans plans.jsonl --json
    """

    file: Annotated[Positional[Path], arg(metavar="FILE", help="Plans, as `save_plans` writes them.")]
    json: Annotated[bool, arg(help="Print one JSON object instead.")] = False

    def run(self) -> int:
        """Prints the summary and returns the exit code."""
        plans = load_plans(self.file)  # raises ValueError, naming the file, if it holds no plans
        counts = {
            name: sum(len(getattr(plan, name)) for plan in plans)
            for name in ("device", "host", "load", "prefetch", "evict")
        }
        counts = {"steps": len({plan.step for plan in plans}), "layers": len(plans), **counts}
        if self.json:
            print(json.dumps(counts))
        else:
            for name, count in counts.items():
                print(f"{name:9}{count:9,}")
        return 0
