"""Plans on disk: a line of JSON for each layer of each step."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layerscope_jax.scheduling.plan import LayerPlan
from layerscope_jax.support.files import write_file


def save_plans(plans: Iterable[LayerPlan], path: str | Path) -> None:
    """Writes plans as JSON lines, whole or not at all.

    Raises:
        ValueError: if one of them is not a plan, or the file cannot be written.
    """
    path = Path(path)

    def line(number: int, plan: Any) -> str:
        try:
            text = json.dumps(plan.to_json(), default=operator.index)  # NumPy's whole numbers too
            LayerPlan.from_json(json.loads(text))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"plan {number} cannot be kept: {error}; got {str(plan)[:80]}") from error
        return text + "\n"

    def write(file: Path) -> None:
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(line(number, plan) for number, plan in enumerate(plans, 1))

    if path.is_dir() or not path.name:
        raise ValueError(f"{str(path)!r} is a folder: expected the name of a file to keep plans in")
    write_file(path, write)


def load_plans(path: str | Path) -> list[LayerPlan]:
    """Reads plans written by `save_plans`.

    Raises:
        ValueError: if the file is missing or holds no plans, or naming the line that is not one, or that
            decides a layer of a step again.
    """
    remedy = "record_plans=True of `generate` gives plans, `save_plans` writes them"
    try:
        lines = Path(path).read_bytes().splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a file of plans, got {error}; {remedy}") from None
    plans: dict[tuple[int, int], tuple[int, LayerPlan]] = {}
    for number, line in enumerate(lines, 1):
        try:
            plan = LayerPlan.from_json(json.loads(line))
            first, _ = plans.setdefault((plan.step, plan.layer), (number, plan))
            if first != number:
                raise ValueError(f"step {plan.step}, layer {plan.layer} was decided in line {first}")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a plan as `save_plans` writes it, got "
                f"{line[:80].decode(errors='replace')!r}: {str(error)[:200]}"
            ) from None
    if not plans:
        raise ValueError(
            f"{path}, line 1: expected a plan as `save_plans` writes it, got an empty file; where every "
            f"expert fits nothing is decided, record within a smaller device_budget: {remedy}"
        )
    return [plan for _, plan in plans.values()]
