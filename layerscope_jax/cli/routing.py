"""The command `layerscope predictor routing`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from layerscope_jax.cli.args import arg
from layerscope_jax.cli.options import Json
from layerscope_jax.prediction.traces import Trace
from layerscope_jax.support import exits
from layerscope_jax.support.exits import say
from layerscope_jax.support.option_errors import option, writing


@dataclass(frozen=True, kw_only=True)
class PackRouting:
    """Make recorded routing of a model from its trace, for `layerscope simulate` and `layerscope fit`.

    Requests are the beginnings of held-out passages, with what predictors forecast in their decode steps: the
    next layers' routers ("gate"), and a trained predictor, if one is given.

    Examples:
        layerscope predictor routing build/trace --predictor build/predictor --out routing.npz
        layerscope predictor routing build/trace --out routing.npz --prompt-tokens 8 32 --decode-steps 32
    """

    traces: Annotated[
        Positional[Path],
        arg(
            metavar="TRACE",
            help="Folder that `layerscope trace` wrote; `layerscope predictor train` leaves one in the "
            "predictor's folder, as `trace`.",
        ),
    ]
    out: Annotated[Path, arg(metavar="FILE", help="File for the routing, .npz; an existing one is replaced.")]
    predictor: Annotated[
        Path | None,
        arg(
            metavar="FOLDER",
            help="Trained predictor of the same model; without it, only the gate's forecast is kept.",
        ),
    ] = None
    requests: Annotated[
        int | None,
        arg(metavar="INT", help="Requests; by default as many as the trace has passages for, 4 to 64."),
    ] = None
    decode_steps: Annotated[int, arg(metavar="INT", help="Decode steps of each request.")] = 64
    prompt_tokens: Annotated[
        tuple[int, int], arg(metavar="MIN MAX", help="Fewest and most tokens of a prompt.")
    ] = (16, 64)
    seed: Annotated[int, arg(help="Seed of the choice of passages and of the prompts' lengths.")] = 0
    json: Json = False

    def run(self) -> int:
        """Returns the exit code."""
        from predictor.llapor import LLaPor
        from predictor.routing import Packing, pack

        exits.need_output()
        packing = Packing(
            requests=self.requests,
            decode_steps=self.decode_steps,
            prompt_tokens=self.prompt_tokens,
            seed=self.seed,
        )
        with writing("--out", self.out):
            trace, llapor = Trace.open(self.traces), None
            if self.predictor is not None:
                with option("--predictor"):
                    llapor = LLaPor.load(self.predictor)
            routing = pack(trace, llapor, packing)
            routing.save(self.out)
        recall = routing.header["recall"]
        if self.json:
            found: dict[str, Any] = {
                "routing": str(self.out),
                "requests": routing.requests,
                "decode_steps": routing.steps,
                "forecasts": list(routing.forecasts),
                "recall": recall,
                "recall_tokens": routing.header["recall_tokens"],
            }
            print(json.dumps(found))
            return 0
        for name, means in recall.items():
            shares = ", ".join(f"{100 * share:.1f}" for share in means["this_step"])
            ahead = ", ".join(str(horizon + 1) for horizon in range(len(means["this_step"])))
            say(f"{name}: recall {shares} % {ahead} layers ahead")
        say(
            f"{self.out} holds {routing.requests} requests of {routing.steps} decode steps each, with the "
            f"forecasts of {' and '.join(routing.forecasts)}; `layerscope simulate --trace` and `layerscope "
            "fit --trace` read it"
        )
        return 0
