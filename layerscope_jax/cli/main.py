"""The command line `layerscope`: `demo`, `generate`, and the table of all commands."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console
from tyro.conf import FlagCreatePairsOff, UseAppendAction

from layerscope_jax.checkpoints.generation_defaults import read_generation_defaults
from layerscope_jax.cli import demo, demo_view
from layerscope_jax.cli.args import arg
from layerscope_jax.cli.calibrate import Calibrate
from layerscope_jax.cli.chat import Talk
from layerscope_jax.cli.commands import Command, union, with_added
from layerscope_jax.cli.complete import Live, complete, summary
from layerscope_jax.cli.completion import Completion
from layerscope_jax.cli.convert import Convert
from layerscope_jax.cli.doctor import Doctor
from layerscope_jax.cli.fit import Fit
from layerscope_jax.cli.groups import Grouped
from layerscope_jax.cli.inspect import Inspect
from layerscope_jax.cli.options import (
    POLICY_NAMES,
    PREDICTOR_HELP,
    SHIPPED,
    Checkpoint,
    HostBudget,
    Json,
    Revision,
    TimelineFile,
    heard,
    known_format,
    open_model,
    open_predictor,
)
from layerscope_jax.cli.perplexity import PerplexityOf
from layerscope_jax.cli.predictors import Predictors
from layerscope_jax.cli.ray_options import RayOptions
from layerscope_jax.cli.report import Report
from layerscope_jax.cli.request_options import RequestOptions
from layerscope_jax.cli.serve import Serve
from layerscope_jax.cli.simulate import Simulate
from layerscope_jax.cli.trace import Record
from layerscope_jax.config import OffloadConfig
from layerscope_jax.distributed.tables import read_rows
from layerscope_jax.engine import Engine
from layerscope_jax.generation.batch_files import CompletionFile
from layerscope_jax.generation.chat import Chat
from layerscope_jax.generation.lines import Lines, model_name
from layerscope_jax.generation.prompt_files import Row
from layerscope_jax.generation.requests import Request
from layerscope_jax.support import exits, interrupts
from layerscope_jax.support.compile_cache import use_compilation_cache
from layerscope_jax.support.exits import say
from layerscope_jax.support.option_errors import option, writing


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the shipped model with everything resident, then within a budget under each policy.

    Prints the texts, the statistics of each policy, and whether all runs gave the same tokens; exits with 1
    if a run whose numerics are not 'fast' gave different tokens.

    Examples:
        layerscope demo
        layerscope demo --policy lru host-only auto --budget-share 0.5
        layerscope demo --json > demo.json
    """

    checkpoint: Checkpoint = SHIPPED
    revision: Revision = None
    policy: Annotated[
        tuple[str, ...],
        arg(
            metavar="POLICY ...",
            aliases=("--policies",),
            help=f"Policies to compare: some of {POLICY_NAMES}.",
        ),
    ] = ("on-demand", "lru", "host-only", "fiddler", "fate", "auto")
    predictor: Annotated[
        str | None,
        arg(
            metavar="PREDICTOR",
            help=f"Forecasts experts, for policies that use a predictor. {PREDICTOR_HELP} Default: gate.",
        ),
    ] = None
    max_new_tokens: Annotated[int, arg(help="Tokens to generate for each prompt.")] = 24
    budget_share: Annotated[float, arg(help="Share of the experts' bytes that the device may hold.")] = 0.25
    emulated_link_bandwidth: Annotated[
        str | None,
        arg(
            metavar="SIZE",
            help="Bytes per second to which copies to the device are limited; None for no limit. With the "
            "default, an expert of the shipped model takes as long to copy as one of Qwen3-30B-A3B over PCIe "
            "4.0.",
        ),
    ] = "50MB"
    host_budget: HostBudget = None
    timeline: TimelineFile = None
    json: Json = False

    def run(self) -> int:
        """Returns the exit code."""
        exits.need_output()
        model = open_model(self.checkpoint, None, self.revision)
        with nullcontext() if self.timeline is None else writing("--timeline", self.timeline):
            report = demo.compare(
                model,
                demo.read_demo_prompts(),
                policies=self.policy,
                max_new_tokens=self.max_new_tokens,
                budget_share=self.budget_share,
                emulated_link_bandwidth=self.emulated_link_bandwidth,
                predictor=open_predictor(self.predictor) or "gate",
                host_budget=self.host_budget,
                timeline=self.timeline,
            )
        if self.json:
            print(json.dumps(report))
        else:
            demo_view.show(report, Console(highlight=False))
        return 0 if report["exact"] else 1


@dataclass(frozen=True, kw_only=True)
class Generate(RequestOptions, RayOptions):
    """Continue prompts, given one by one or in a file.

    Examples:
        layerscope generate shipped --prompt "Call me Ishmael."
        layerscope generate path/to/checkpoint --prompts prompts.jsonl --out continuations.jsonl
        layerscope generate shipped --prompt "def main():" --device-budget 8MB --policy fate --json
        layerscope generate path/to/checkpoint --prompts prompts.parquet --out out.parquet --ray auto
    """

    prompt: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="TEXT", help="A prompt; can be given several times.")
    ] = ()
    prompts: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help='File of prompts, one JSON object {"prompt": text or [token ids]} or {"messages": [...]} '
            'per line. Optional keys: "id" (default: the row\'s number, from 0), settings for this prompt '
            "(max_new_tokens, temperature, stop, ...), which no option may contradict, and "
            '"metadata", which is ignored. Lines of OpenAI\'s batch API are answered as there. Or a Parquet '
            "file with such columns.",
        ),
    ] = None
    out: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help='File of completions. A line {"id", "prompt", "text", "token_ids", "finish_reason", '
            '"settings", "model"} is appended as soon as a prompt is complete, with an "error" if it '
            "failed. The same "
            "command continues an interrupted file, if checkpoint and settings are unchanged. FILE.lock "
            "keeps other runs from writing to it. Without --out the lines go to standard output.",
        ),
    ] = None
    bound: Annotated[
        bool,
        arg(
            help="Also print the lower bound on the decode time, by this machine's costs, as a share of the "
            "time taken."
        ),
    ] = False
    timeline: TimelineFile = None
    json: Annotated[
        bool,
        arg(help="Print one JSON document at the end: the statistics, and without --out the completions."),
    ] = False

    def run(self) -> int:
        """Returns the exit code."""
        if self.json:
            exits.need_output()
        others = {"prompt": self.prompt, "bound": self.bound, "timeline": self.timeline}
        self.check_many(self.out, **others, devices=self.devices)
        config = self.engine_config()
        template = self.template()
        rows = self._rows({})
        if self.generation_config == "auto" and (defaults := read_generation_defaults(self.folder)):
            rows = self._rows(defaults)
            said = ", ".join(f"{name} {value}" for name, value in defaults.items())
            say(f"{self.checkpoint} recommends {said}; --generation-config none turns that off")
        if self.ray is not None and self.out is not None:
            return self.complete_by_many(rows, self.out, config, template, self.json)
        with nullcontext() if self.timeline is None else writing("--timeline", self.timeline):
            return self._run(rows, config, template)

    def _run(self, rows: list[Row], config: OffloadConfig, template: str | None) -> int:
        """Completes the rows that are not done yet; returns the exit code."""
        if self.out is None:
            exits.need_output()
            done = self._complete(rows, config, None, template)
            if self.json:
                print(json.dumps({"completions": done.lines, "failed": done.failed, "stats": done.stats}))
            return exits.FAILED if done.failed else exits.DONE
        model = self._model(rows, template)
        with option("--out"):
            completions = CompletionFile(self.out, rows, model)
        interrupts.promise(f"interrupted; the same command continues {self.out}")
        with completions as file:
            left = [row for row in rows if row.id not in file.done]
            failed, stats = len(file.failed), None
            if file.done:
                say(f"{self.out} has {len(file.done)} of {len(rows)} completions already")
            if left:
                done = self._complete(left, config, file, template)
                failed, stats = failed + done.failed, done.stats
        if file.failed:
            say(f"{len(file.failed)} of the completions in {self.out} ended with an error in an earlier run")
        if self.json:
            print(json.dumps({"out": str(self.out), "failed": failed, "stats": stats}))
        return exits.FAILED if failed else exits.DONE

    def _model(self, rows: Sequence[Row], template: str | None) -> str:
        """Returns the model's name in the lines of completions: its fingerprint, dtype, format of experts and
        chat template."""
        is_chat = any(row.request.messages is not None for row in rows)
        chat = Chat(self.folder, template) if is_chat else None
        return model_name(self.folder, self.dtype, known_format(self.expert_format), self.dense_format, chat)

    def _rows(self, defaults: dict[str, Any]) -> list[Row]:
        if bool(self.prompt) == (self.prompts is not None):
            got = "both" if self.prompt else "neither"
            raise ValueError(f"expected either --prompt TEXT or --prompts FILE, got {got}")
        settings = self.settings()
        if self.prompts is None:
            return [
                Row(index, self.request(prompt, defaults | settings), f"--prompt {prompt[:40]!r}")
                for index, prompt in enumerate(self.prompt)
            ]
        if self.out is not None and self.out.resolve() == self.prompts.resolve():
            raise ValueError(f"--out is the file of prompts, {self.prompts}; choose another file")
        with option("--prompts"):
            rows = read_rows(
                self.prompts, settings, column=self.prompt_column, chat=self.chat, defaults=defaults
            )
        named = {row.call.model for row in rows if row.call is not None and row.call.model is not None}
        if named and (others := named - {self.checkpoint, self.folder.name}):
            say(f"{self.checkpoint} answers the requests for {', '.join(sorted(others))[:200]} too")
        return rows

    def _complete(
        self, rows: list[Row], config: OffloadConfig, file: CompletionFile | None, template: str | None
    ) -> Done:
        """Completes the rows."""
        model = self.open_model()
        lines = Lines(
            self._model(rows, template) if file is None else file.model,
            model.tokenizer,
            file,
            kept=self.json and file is None,
        )
        with closing(Chat(model.path, template)) as chat:
            requests = lines.encode(rows, model, chat)
        if not requests:
            return Done(lines.refused, None, lines.kept)
        answered = [row for row, _ in requests]
        config = fitted(self.measured(config, model), [request for _, request in requests])
        live = file is None and self.prompts is None and not self.json
        with Engine(model, config, generation_config="none") as engine:  # the rows have their settings
            result = complete(
                engine,
                answered,
                [request for _, request in requests],
                on_token=Live(answered) if live else lambda event: None,
                on_row=(lambda row, outputs: None) if live else lines.write,
                # A progress bar would garble lines of output on the same terminal.
                progress=file is not None or self.json or not sys.stdout.isatty(),
                bound=self.bound,
                timeline=self.timeline,
            )
        interrupts.check()  # an interrupted run prints no statistics
        say(summary(result.stats, model.bank.total_bytes))
        errors = {one.request: one.error for one in result if one.error is not None}
        for sentence, count in Counter(errors.values()).items():
            say(f"error: {count} of {len(answered)} prompts could not be completed: {sentence}")
        return Done(len(errors) + lines.refused, result.stats.to_json(), lines.kept)


class Done(NamedTuple):
    """What came of some prompts: how many ended with an error, the statistics, and the lines kept."""

    failed: int
    stats: dict[str, Any] | None
    lines: list[dict[str, Any]]


def fitted(config: OffloadConfig, requests: Sequence[Request]) -> OffloadConfig:
    """Returns the config with room for no more and no longer requests than there are, with token ids."""
    longest = max(len(request.prompt or ()) + request.max_new_tokens for request in requests)
    most = min(config.max_num_seqs, sum(request.n for request in requests))
    return replace(config, context=longest, max_num_seqs=most)


COMMANDS = {
    "demo": Demo,
    "generate": Generate,
    "chat": Talk,
    "serve": Serve,
    "perplexity": PerplexityOf,
    "inspect": Inspect,
    "fit": Fit,
    "doctor": Doctor,
    "convert": Convert,
    "trace": Record,
    "predictor": Predictors,
    "calibrate": Calibrate,
    "simulate": Simulate,
    "report": Report,
    "completion": Completion,
}
"""Commands of this package; other packages add theirs, see `layerscope_jax.cli.commands`."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs `layerscope` and returns its exit code; see `layerscope_jax.support.exits`."""
    return exits.run(_run, args)


def _run(args: list[str]) -> int | None:
    if args == ["--version"]:
        print(", ".join(f"{name} {number}" for name, number in demo.versions().items()))
        return 0
    command = parsed(args)
    with suppress(OSError, RuntimeError):  # no home, or a read-only one: each run compiles anew
        use_compilation_cache()
    interrupts.check()  # Ctrl-C may have come during the imports
    with heard():
        return command.run()


ABOUT = f"""\
Run mixture-of-experts language models whose experts do not fit on the accelerator.

Examples:
    layerscope demo
    layerscope generate shipped --prompt "Call me Ishmael."
    layerscope generate --help

`layerscope --version` prints the versions; --debug, before or after a command, adds the traceback to errors.
{exits.EXIT_CODES}
"""
"""What `layerscope --help` begins with."""


def parsed(args: list[str]) -> Command:
    """Returns the command of a command line, with its options.

    Raises:
        SystemExit: after help was printed, with 0; if the command line is wrong, with 2.
    """
    commands = with_added(COMMANDS, args)
    found: Any = tyro.cli(
        union(commands, in_full=args[:1] != [] and args[0] in commands),
        prog="layerscope",
        description=ABOUT,
        args=args or ["--help"],
        config=(FlagCreatePairsOff,),
    )
    return found.flat() if isinstance(found, Grouped) else found
