"""The command `layerscope report`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from layerscope_jax.cli import report_page
from layerscope_jax.cli.args import arg
from layerscope_jax.cli.options import Json
from layerscope_jax.cli.report_lanes import lanes_svg
from layerscope_jax.cli.report_runs import Run, runs_of
from layerscope_jax.runtime.timeline_files import join_timelines
from layerscope_jax.support import exits
from layerscope_jax.support.exits import say
from layerscope_jax.support.files import is_there, write_file
from layerscope_jax.support.option_errors import option, writing


@dataclass(frozen=True, kw_only=True)
class Report:
    """Make a page of one or more timelines: lanes, hits and forecasts by layer, bytes, where the time went.

    The page needs no network. What is not known of a run is left out of it, and named.

    Examples:
        layerscope report run.json
        layerscope report run.json simulated.json --out both.html --steps 0:3
    """

    files: Annotated[
        Positional[tuple[Path, ...]],
        arg(
            metavar="FILE ...",
            help="Timelines that `layerscope generate`, demo or simulate wrote with --timeline; the runs of "
            "several, such as a measured and a simulated one, are shown side by side.",
        ),
    ]
    out: Annotated[
        Path | None,
        arg(metavar="FILE", help="Write the page there; without it, beside the first timeline, as .html."),
    ] = None
    steps: Annotated[
        str | None,
        arg(
            metavar="FIRST:LAST",
            help="Draw the lanes of these steps only, such as 0:3; without it, as many as a page shows well.",
        ),
    ] = None
    layers: Annotated[
        str | None,
        arg(
            metavar="FIRST:LAST", help="Show the lanes of these layers at first; for --svg, draw only these."
        ),
    ] = None
    svg: Annotated[
        Path | None,
        arg(metavar="FILE", help="Also write the lanes as a picture, for a text."),
    ] = None
    join: Annotated[
        Path | None,
        arg(metavar="FILE", help="Also write all runs into one timeline, for Perfetto or chrome://tracing."),
    ] = None
    json: Json = False

    def run(self) -> int:
        """Returns the exit code."""
        exits.need_output()
        if not self.files:
            raise ValueError("expected one timeline or more, got none; --timeline FILE writes one")
        if missing := [str(file) for file in self.files if not is_there(file)]:
            raise ValueError(f"{', '.join(missing)}: expected what --timeline FILE wrote, found no such file")
        steps, layers = range_of(self.steps, "--steps"), range_of(self.layers, "--layers")
        runs = [run for file in self.files for run in runs_of(file)]
        out = self.out or self.files[0].with_suffix(".html")
        if out.resolve() in {file.resolve() for file in self.files}:
            raise ValueError(f"--out is one of the timelines, {out}; choose another file")
        self._write(runs, out, steps, layers)
        if self.json:
            files = {"page": out, "svg": self.svg, "join": self.join}
            found = {name: None if file is None else str(file) for name, file in files.items()}
            print(json.dumps(found | {"runs": [run.title for run in runs]}))
        else:
            say(f"The page is {out}")
        return exits.DONE

    def _write(
        self, runs: list[Run], out: Path, steps: tuple[int, int] | None, layers: tuple[int, int] | None
    ) -> None:
        with ExitStack() as stack:
            places = {"--out": out, "--svg": self.svg, "--join": self.join}
            for name, file in places.items():
                if file is not None:
                    stack.enter_context(writing(name, file))
            write_file(out, report_page.page(runs, steps, layers))
            if self.svg is not None:
                with option("--svg"):
                    write_file(self.svg, lanes_svg(runs, steps, layers))
            if self.join is not None:
                join_timelines(self.join, self.files)


def range_of(text: str | None, name: str) -> tuple[int, int] | None:
    """Returns the first and the last number of a range.

    Raises:
        ValueError: if it is none.

    >>> range_of("2:5", "--steps"), range_of("3", "--steps"), range_of(None, "--steps")
    ((2, 5), (3, 3), None)
    """
    if text is None:
        return None
    first, _, last = text.partition(":")
    numbers = [part.strip() for part in (first, last or first)]
    if not all(number.isdecimal() for number in numbers) or int(numbers[0]) > int(numbers[1]):
        raise ValueError(f"{name} must be FIRST:LAST, whole numbers from 0, such as 0:3, got {text!r}")
    return int(numbers[0]), int(numbers[1])
