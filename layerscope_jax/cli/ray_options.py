"""Options of `layerscope generate` for many servers, and how they complete its prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from layerscope_jax.cli.args import arg
from layerscope_jax.cli.engine_options import EngineOptions
from layerscope_jax.cli.options import open_profile
from layerscope_jax.config import OffloadConfig
from layerscope_jax.distributed.crew import START_S
from layerscope_jax.distributed.job import RETRIES, TIMEOUT_S, ClusterUse, complete
from layerscope_jax.distributed.tables import ENDING
from layerscope_jax.distributed.worker import Job
from layerscope_jax.generation.prompt_files import Row
from layerscope_jax.support import exits
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.exits import say
from layerscope_jax.support.files import read_json
from layerscope_jax.support.option_errors import option

OF_A_NODE = ("device_budget", "host_budget", "profile")
"""Options that a node may have for itself."""


@dataclass(frozen=True, kw_only=True)
class RayOptions(EngineOptions):
    """How many servers complete the prompts of a file."""

    ray: Annotated[
        str | None,
        arg(
            metavar="ADDRESS",
            help="Complete the prompts on all servers of a Ray cluster: 'auto' for the one that this machine "
            "is part of, 'host:port' of its head, or 'local' for this machine alone. Needs --out, and the "
            "extra `ray`.",
        ),
    ] = None
    workers: Annotated[
        int | None,
        arg(
            metavar="INT",
            help="With --ray, engines at most; by default one on each accelerator, or on each server without "
            "any.",
        ),
    ] = None
    worker_timeout: Annotated[
        float,
        arg(
            metavar="SECONDS",
            help="With --ray, a worker that has no new token for so long is given up.",
        ),
    ] = TIMEOUT_S
    worker_start_timeout: Annotated[
        float,
        arg(metavar="SECONDS", help="With --ray, how long a worker may take to load the model."),
    ] = START_S
    worker_retries: Annotated[
        int, arg(help="With --ray, how often a prompt whose worker was lost is given to another.")
    ] = RETRIES
    nodes: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help='With --ray, a JSON object for servers that differ: {"name": {"device_budget": "40GiB", '
            '"host_budget": ..., "profile": FILE}}. Others have the options of the command.',
        ),
    ] = None
    prompt_column: Annotated[
        str, arg(metavar="NAME", help="Column of the prompts, if --prompts is a Parquet file.")
    ] = "prompt"

    def check_many(self, out: Path | None, **others: Any) -> None:
        """Refuses options that do not go together with --ray, or without it.

        Args:
            out: of the command.
            **others: options that one engine has and many have not, by name.
        """
        problems = Problems()
        if self.ray is None:
            given = [name for name in ("workers", "nodes") if getattr(self, name) is not None]
            problems.add(*[f"--{name} is for many servers; give --ray ADDRESS too" for name in given])
            if out is not None and out.suffix == ENDING:
                problems.add(f"--out {out}: Parquet files are written with --ray, such as --ray local")
        else:
            if out is None:
                problems.add("--ray needs --out FILE, which an interrupted job is continued from")
            given = [name.replace("_", "-") for name, value in others.items() if value]
            problems.add(*[f"--{name} is for one engine; leave it or --ray out" for name in given])
        problems.raise_any()

    def complete_by_many(
        self, rows: Sequence[Row], out: Path, config: OffloadConfig, template: str | None, as_json: bool
    ) -> int:
        """Completes rows on a cluster; returns the exit code."""
        config = replace(config, expert_format=self.expert_format, dense_format=self.dense_format)
        job = Job(
            checkpoint=self.checkpoint,
            revision=self.revision,
            dtype=self.dtype,
            config=config,
            nodes=self._node_configs(config),
            chat_template=template,
            tuned=self.measured,
        )
        use = ClusterUse(
            self.ray,
            self.workers,
            self.worker_timeout,
            self.worker_retries,
            self.worker_start_timeout,
            progress=True,
        )
        report = complete(rows, out, job, use)
        if report.workers:
            say(report.summary())
        if report.failed:
            say(f"error: {report.failed} of the completions in {out} ended with an error")
        if as_json:
            stats = report.to_json() if report.workers else None
            print(json.dumps({"out": str(out), "failed": report.failed, "stats": stats}))
        return exits.FAILED if report.failed else exits.DONE

    def _node_configs(self, config: OffloadConfig) -> dict[str, OffloadConfig]:
        """Returns the configs of servers that differ.

        Raises:
            ValueError: naming everything that is wrong with the file of them.
        """
        if self.nodes is None:
            return {}
        configs, problems = {}, Problems()
        with option("--nodes"):
            for node, own in read_json(self.nodes, "correct it").items():
                known = isinstance(own, dict) and set(own) <= set(OF_A_NODE)
                problems.expect(known, node, f"an object with some of {', '.join(OF_A_NODE)}", own)
                if known:
                    changes = {**own, "profile": problems.check(open_profile, own.get("profile"), of=node)}
                    if "profile" not in own:
                        del changes["profile"]
                    configs[node] = problems.check(lambda given: replace(config, **given), changes, of=node)
            problems.raise_any(str(self.nodes))
        return configs
