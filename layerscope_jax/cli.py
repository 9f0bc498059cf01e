"""The command line, `layerscope`: every refusal is one line that says what to do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.conf import FlagCreatePairsOff, UseAppendAction, arg, subcommand

from layerscope_jax import demo, demo_view
from layerscope_jax.batch_files import Completions, Row, check_prompts, completion, read_prompts
from layerscope_jax.calibrate_cli import Calibrate
from layerscope_jax.cli_options import (
    POLICY_NAMES,
    SHIPPED,
    Checkpoint,
    DeviceBudget,
    Dtype,
    LinkBandwidth,
    PolicyName,
    folder_of,
    heard,
    open_model,
    say,
)
from layerscope_jax.compilations import use_compilation_cache
from layerscope_jax.complete import Live, complete, summary
from layerscope_jax.config import OffloadConfig
from layerscope_jax.engine import Engine, make_policy
from layerscope_jax.fingerprint import fingerprint
from layerscope_jax.generation import Request
from layerscope_jax.machine_profile import MachineProfile
from layerscope_jax.prediction import PREDICTORS, Predictor
from layerscope_jax.simulate_cli import Simulate

PREDICTOR_HELP = f"One of {', '.join(sorted(PREDICTORS))}, the folder of a trained one, or 'shipped'."


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run the shipped model with everything resident, then within a budget under each policy.

    Prints the texts, what each policy cost, and whether all gave the same tokens; exits with 1 if one
    with exact numerics gave others.
    """

    json: Annotated[bool, arg(help="Print one JSON object instead.")] = False
    checkpoint: Annotated[str, arg(metavar="FOLDER", help="Another model: a Hugging Face folder.")] = SHIPPED
    policies: Annotated[
        tuple[str, ...], arg(metavar="POLICY ...", help=f"Policies to compare: some of {POLICY_NAMES}.")
    ] = ("on-demand", "lru", "host-only", "fiddler", "fate", "auto")
    predictor: Annotated[
        str | None,
        arg(metavar="PREDICTOR", help=f"Of policies that use one. {PREDICTOR_HELP} By default gate."),
    ] = None
    max_new_tokens: Annotated[int, arg(help="Tokens to generate for each prompt.")] = 24
    budget_share: Annotated[float, arg(help="Share of the experts' bytes that the device may hold.")] = 0.25
    link_bandwidth: Annotated[
        str | None,
        arg(
            metavar="SIZE",
            help="Bytes a second that copies to the device are paced to; None leaves them as fast as they "
            "go. At the default an expert of the shipped model takes as long as one of Qwen3-30B-A3B over "
            "PCIe 4.0.",
        ),
    ] = "50MB"

    def run(self) -> int:
        """Returns the exit code."""
        model = open_model(self.checkpoint)
        report = demo.compare(
            model,
            demo.read_demo_prompts(),
            policies=self.policies,
            max_new_tokens=self.max_new_tokens,
            budget_share=self.budget_share,
            link_bandwidth=self.link_bandwidth,
            predictor=open_predictor(self.predictor) or "gate",
        )
        if self.json:
            print(json.dumps(report))
        else:
            demo_view.show(report, Console(highlight=False))
        return 0 if report["exact"] else 1


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue prompts, given one by one or in a file."""

    checkpoint: Checkpoint
    prompt: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="TEXT", help="A prompt; may be given many times.")
    ] = ()
    prompts: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help='Many prompts: JSON lines {"prompt": text or [token ids]}, each with an "id" (else its '
            "number, from 0) and settings of its own (max_new_tokens, temperature, top_k, top_p, seed, "
            "stop_tokens).",
        ),
    ] = None
    out: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help='Where a line {"id", "prompt", "text", "tokens", "finish", "settings", "model"} goes as '
            'soon as a prompt is complete, with an "error" where it could not be; a file left half done is '
            "gone on with, if checkpoint and settings are the same. Without it they go to standard output.",
        ),
    ] = None
    device_budget: DeviceBudget = None
    policy: PolicyName = "auto"
    predictor: Annotated[
        str | None,
        arg(metavar="PREDICTOR", help=f"Forecasts experts for policies that prefetch. {PREDICTOR_HELP}"),
    ] = None
    profile: Annotated[
        str | None,
        arg(
            metavar="FILE",
            help="What `layerscope calibrate` measured, for policies that weigh costs; without it they are "
            "measured roughly before the first token.",
        ),
    ] = None
    max_new_tokens: Annotated[int, arg(help="At most so many tokens for each prompt.")] = 64
    temperature: Annotated[float, arg(help="Of sampling; 0 takes the likeliest token each time.")] = 0.0
    top_k: Annotated[int, arg(help="Sample from so many of the likeliest tokens; 0 for all.")] = 0
    top_p: Annotated[
        float, arg(help="Sample from the fewest tokens that reach this probability together.")
    ] = 1.0
    seed: Annotated[int, arg(help="Of sampling.")] = 0
    batch_size: Annotated[
        int,
        arg(
            help="How many prompts run at once; when some end, others take their places. Batches of another "
            "shape round differently, which can part a prompt's tokens, in bfloat16 above all."
        ),
    ] = 32
    link_bandwidth: LinkBandwidth = None
    dtype: Dtype = None
    numerics: Annotated[
        Literal["exact", "fast"],
        arg(
            help="'exact' gives the same bits under every budget and policy; 'fast' is faster where "
            "everything is resident on an accelerator, and agrees to rounding."
        ),
    ] = "exact"
    bound: Annotated[
        bool,
        arg(help="Also say which share of the least possible time was reached, by this machine's costs."),
    ] = False

    def run(self) -> int:
        """Returns the exit code."""
        config = OffloadConfig(
            device_budget=self.device_budget,
            policy=self.policy,
            link_bandwidth=self.link_bandwidth,
            numerics=self.numerics,
            predictor=open_predictor(self.predictor),
            profile=None if self.profile is None else MachineProfile.load(self.profile),
        )
        make_policy(self.policy)
        rows = self._rows()
        if self.out is None:
            return 1 if self._complete(rows, config, None) else 0
        with Completions(self.out, rows, self._model()) as file:
            left = [row for row in rows if row.id not in file.done]
            failed = len(file.failed)
            if file.done:
                say(f"{self.out} has {len(file.done)} of {len(rows)} completions already")
            try:
                if left:
                    failed += self._complete(left, config, file)
            except KeyboardInterrupt:
                say(f"interrupted; the same command goes on with {self.out}")
                raise
        if file.failed:
            say(f"{len(file.failed)} of the completions in {self.out} had ended with an error before")
        return 1 if failed else 0

    def _model(self) -> str:
        """What is to generate, for the lines of completions."""
        return fingerprint(folder_of(self.checkpoint)) + (f" as {self.dtype}" if self.dtype else "")

    def _rows(self) -> list[Row]:
        if bool(self.prompt) == (self.prompts is not None):
            got = "both" if self.prompt else "neither"
            raise ValueError(f"expected either --prompt TEXT or --prompts FILE, got {got}")
        if self.batch_size < 1:
            raise ValueError(f"batch-size must be 1 or more, got {self.batch_size}")
        settings: dict[str, Any] = {
            name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
        }
        Request(prompt="", **settings)  # refuses what is out of range
        if self.prompts is None:
            return [
                Row(index, Request(prompt=prompt, **settings), f"--prompt {prompt[:40]!r}")
                for index, prompt in enumerate(self.prompt)
            ]
        if self.out is not None and self.out.resolve() == self.prompts.resolve():
            raise ValueError(f"--out is the file of prompts, {self.prompts}; choose another")
        return read_prompts(self.prompts, settings)

    def _complete(self, rows: list[Row], config: OffloadConfig, file: Completions | None) -> int:
        """Returns how many ended with an error."""
        model = open_model(self.checkpoint, self.dtype)
        check_prompts(rows, model)
        name = self._model()

        def write(row: Row, text: str, tokens: list[int], finish: str, error: str | None = None) -> None:
            line = completion(row, text, tokens, finish, name, error)
            if file is not None:
                file.write(line)
            else:
                sys.stdout.buffer.write(line)
                sys.stdout.flush()

        live = file is None and self.prompts is None
        with Engine(model, config) as engine:
            result = complete(
                engine,
                rows,
                batch_size=self.batch_size,
                on_token=Live(rows) if live else lambda event: None,
                on_row=(lambda *completed: None) if live else write,
                # A bar and lines of output on one terminal would run into each other.
                progress=file is not None or not sys.stdout.isatty(),
                bound=self.bound,
            )
        say(summary(result.stats, model.bank.total_bytes))
        for sentence in dict.fromkeys(result.errors.values()):
            count = sum(error == sentence for error in result.errors.values())
            say(f"error: {count} of {len(rows)} prompts could not be completed: {sentence}")
        return len(result.errors)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Record which experts a model chooses on real text, and the hidden states that they are chosen by.

    A predictor is trained on what is recorded: `python -m predictor.train`.
    """

    checkpoint: Checkpoint
    text: Annotated[
        tuple[Path, ...],
        arg(
            metavar="FILE ...",
            help='JSON lines {"id", "text"}, whose domain is the name of the file, or plain texts, each a '
            "document of the domain named as its folder.",
        ),
    ]
    out: Annotated[Path, arg(metavar="FOLDER", help="For the trace; one that was cut off is gone on with.")]
    heldout_domains: Annotated[
        tuple[str, ...],
        arg(metavar="DOMAIN ...", help="Domains that no predictor may be trained on, only measured."),
    ] = ()
    train_tokens: Annotated[int, arg(help="At most so many of each domain, to train on.")] = 100_000
    heldout_tokens: Annotated[int, arg(help="At most so many of each domain, to measure on.")] = 10_000
    length: Annotated[int, arg(help="Tokens of a passage; at most what the model's context holds.")] = 256
    prompt: Annotated[float, arg(help="Share of a passage that is its prompt, before decode steps.")] = 0.5
    hidden: Annotated[int, arg(help="Components that hidden states are reduced to; 0 records none.")] = 512
    batch_size: Annotated[int, arg(help="Passages that run at once.")] = 16
    device_budget: DeviceBudget = None
    policy: PolicyName = "lru"
    dtype: Dtype = None
    seed: Annotated[int, arg(help="Of the choice and order of passages.")] = 0

    def run(self) -> int:
        """Returns the exit code."""
        from predictor.record import RecordConfig, record

        make_policy(self.policy)
        config = RecordConfig(
            text=self.text,
            out=self.out,
            heldout_domains=self.heldout_domains,
            train_tokens=self.train_tokens,
            heldout_tokens=self.heldout_tokens,
            length=self.length,
            prompt=self.prompt,
            hidden=self.hidden,
            batch_size=self.batch_size,
            offload=OffloadConfig(device_budget=self.device_budget, policy=self.policy),
            seed=self.seed,
        )
        trace = record(open_model(self.checkpoint, self.dtype), config)
        passages = sum(len(chunk.passages) for chunk in trace.chunks)
        say(f"{trace.folder} holds {trace.rows:,} tokens of {passages:,} passages")
        return 0


def open_predictor(predictor: str | None) -> Predictor | str | None:
    """A predictor from its name or folder, "shipped" being the one that comes with the shipped model.

    That one is not taken without being asked for: on the device it takes a third of what all experts of so
    small a model do, and they make better use of the room.
    """
    if predictor is None or predictor in PREDICTORS:
        return predictor
    import predictor as trained  # not before it is needed: it brings Optax along

    return trained.shipped() if predictor == SHIPPED else trained.load(predictor)


def main(args: Sequence[str] | None = None) -> int:
    """Runs `layerscope` and returns its exit code: 2 with one line on stderr for input that it refuses."""
    args = sys.argv[1:] if args is None else list(args)
    if isinstance(sys.stdout, TextIOWrapper):  # no letter that a terminal lacks may end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    if args == ["--version"]:
        print(", ".join(f"{name} {number}" for name, number in demo.versions().items()))
        return 0
    command: Demo | Generate | Record | Calibrate | Simulate = tyro.cli(
        Annotated[Demo, subcommand("demo")]  # type: ignore[arg-type]
        | Annotated[Generate, subcommand("generate")]
        | Annotated[Record, subcommand("trace")]
        | Annotated[Calibrate, subcommand("calibrate")]
        | Annotated[Simulate, subcommand("simulate")],
        prog="layerscope",
        description=(
            "Run mixture-of-experts language models whose experts do not fit on the accelerator. "
            "`layerscope --version` tells the versions."
        ),
        args=args or ["--help"],
        config=(FlagCreatePairsOff,),
    )
    with suppress(OSError, RuntimeError):  # no home, or a read-only one: each run compiles anew
        use_compilation_cache()
    try:
        with heard():
            return command.run()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has gone: end quietly, also when Python flushes it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, MemoryError, RuntimeError) as error:  # RuntimeError: JAX's, and of copies
        say("error: " + " ".join(described(error).split()))
        return 2


def described(error: Exception) -> str:
    """What went wrong, without the number that OSError puts before it; for lack of memory, what to change."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    what = str(error).partition("\n")[0] if isinstance(error, RuntimeError) else str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in what:
        return f"out of memory: {what or 'none is left'}; give a smaller --device-budget or --batch-size"
    return what or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
