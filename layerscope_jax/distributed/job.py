"""A job: many prompts completed by many engines, with the file of completions that one engine would write.

The process that runs the job reads the prompts, refuses what no engine could complete, shards the rows by the
length that they are expected to have, gives the shards to workers, and appends each line to the file as it
comes. So all that one machine promises holds for many. The same command continues an interrupted job, row by
row: what is in the file is not computed again. One process writes, so no line is half-written or there twice,
and no other storage than that of the checkpoint need be shared. A job that was begun on one machine can be
continued on many, and the other way round. At the end the lines are put in the order of the prompts.

What it costs: prompts and lines go through one process. Ray Data reads datasets; its `map_batches` does not
run the job, for the reasons in `layerscope_jax.distributed.crew`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from tokenizers import Tokenizer

from layerscope_jax.checkpoints.converted import Converted
from layerscope_jax.checkpoints.generation_defaults import read_generation_defaults
from layerscope_jax.checkpoints.headers import read_configs
from layerscope_jax.checkpoints.hub import folder_of
from layerscope_jax.checkpoints.manifest import is_converted
from layerscope_jax.checkpoints.tokenizer_files import read_tokenizer
from layerscope_jax.config import OffloadConfig
from layerscope_jax.distributed import tables
from layerscope_jax.distributed.cluster import RayCluster, connected
from layerscope_jax.distributed.crew import START_S, Crew
from layerscope_jax.distributed.report import Report, WorkerReport, progress_bar
from layerscope_jax.distributed.shards import expected_tokens, shards_of
from layerscope_jax.distributed.worker import Job, Limits, Worker
from layerscope_jax.generation.batch_files import CompletionFile, digest_of
from layerscope_jax.generation.chat import Chat
from layerscope_jax.generation.lines import Lines, model_name
from layerscope_jax.generation.prompt_files import Row
from layerscope_jax.generation.requests import is_number
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.profiling.machine_profile import MachineProfile
from layerscope_jax.support import interrupts
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.exits import say
from layerscope_jax.support.files import write_file
from layerscope_jax.support.units import is_integer

if TYPE_CHECKING:
    from ray.data import Dataset

TIMEOUT_S = 900.0
"""Time (s) without a new token after which a worker is given up; it has hours to load the model."""

RETRIES = 3
"""How often rows whose worker was lost are given to another."""

ENCODED = 512
"""Rows that are encoded at once, and of which only the lengths are kept."""


class Described(NamedTuple):
    """A checkpoint whose weights are not loaded."""

    config: ModelConfig
    tokenizer: Tokenizer | None

    @classmethod
    def of(cls, folder: Path) -> Described:
        """Reads a folder's configs and tokenizer."""
        if is_converted(folder):
            held = Converted.open(folder)
            config, raw = held.config, held.raw
        else:
            config, raw, _ = read_configs(folder)
        return cls(config, read_tokenizer(folder, config.vocab_size, raw.get("model_type")))


class ClusterUse(NamedTuple):
    """How a job uses a cluster.

    Attributes:
        address: of the cluster, as `layerscope_jax.distributed.cluster.connected` takes it.
        workers: engines at most; None for one on each accelerator, or on each node without any.
        timeout_s: time (s) after which a worker that makes no progress is given up.
        retries: how often a row is given to another worker.
        start_timeout_s: time (s) that a worker has to load the model.
        progress: whether a bar is shown.
    """

    address: str | None = None
    workers: int | None = None
    timeout_s: float = TIMEOUT_S
    retries: int = RETRIES
    start_timeout_s: float = START_S
    progress: bool = False


def generate(
    prompts: str | Path | Dataset,
    *,
    model: str | Path,
    out: str | Path,
    config: OffloadConfig | None = None,
    address: str | None = None,
    workers: int | None = None,
    nodes: Mapping[str, OffloadConfig] | None = None,
    column: str = "prompt",
    chat: bool = False,
    chat_template: str | None = None,
    generation_config: Literal["auto", "none"] = "auto",
    dtype: str | None = None,
    revision: str | None = None,
    timeout_s: float = TIMEOUT_S,
    retries: int = RETRIES,
    start_timeout_s: float = START_S,
    progress: bool = False,
    **settings: Any,
) -> Report:
    """Completes many prompts with many engines, one on each accelerator or node of a Ray cluster.

    Each row is in `out` once, in the order of the prompts, whatever workers were lost; the same call
    continues a job that was interrupted. With numerics="exact" the tokens are those of one engine, on nodes
    that compute alike.

    Args:
        prompts: file of lines as `layerscope generate --prompts` reads it, Parquet file or folder of them, or
            a dataset of Ray Data.
        model: checkpoint, as of `layerscope_jax.load`; every node reads it from this path or the hub.
        out: file of completions: lines of JSON or, if its name ends in .parquet, a Parquet file.
        config: how engines are run. A budget of "auto" is each node's own; `expert_format` and `dense_format`
            are those in which workers load the model.
        address: "local", "auto" or "host:port"; None for "local". Not used if Ray is connected already.
        workers: engines at most; None for one on each accelerator, or on each node without any.
        nodes: node's name -> config that is used there instead, with a budget or a profile of its own.
        column: of the prompts, in a table.
        chat: whether a prompt that is text is what a user says.
        chat_template: Jinja text; None for the checkpoint's own.
        generation_config: "auto" for the sampling settings that the checkpoint recommends.
        dtype, revision: as of `layerscope_jax.load`.
        timeout_s: time (s) without a new token after which a worker is given up.
        retries: how often a row is given to another worker, after one that completed none of its rows was
            lost. Rows that lose several are parted until it is known which of them it is.
        start_timeout_s: time (s) that a worker has to load the model.
        progress: whether to show a bar on stderr.
        **settings: fields of `Request` for prompts that do not set them.

    Returns:
        What was done, and by which worker.

    Raises:
        ValueError: for bad input, naming the row, the option or the node; what is complete stays in `out`.
        LostWorkers: if a row loses more than `retries` workers, or no worker is left.
        OSError: if `out` cannot be written.

    Example::

        report = layerscope_jax.distributed.generate(
            "prompts.parquet", model="path/to/checkpoint", out="completions.parquet", address="auto"
        )
        print(report.summary())
    """
    folder = folder_of(model, revision)
    defaults = read_generation_defaults(folder) if generation_config == "auto" else {}
    rows = tables.read_rows(prompts, settings, column=column, chat=chat, defaults=defaults or {})
    job = Job(
        checkpoint=str(model),
        revision=revision,
        dtype=dtype,
        config=config or OffloadConfig(),
        nodes=nodes or {},
        chat_template=chat_template,
    )
    return complete(
        rows, Path(out), job, ClusterUse(address, workers, timeout_s, retries, start_timeout_s, progress)
    )


def complete(rows: Sequence[Row], out: Path, job: Job, use: ClusterUse, kind: type = Worker) -> Report:
    """Completes rows that are not in `out` yet, by workers of a kind.

    Raises:
        ValueError, LostWorkers, OSError: as `generate`.
    """
    check(job, use)
    folder = folder_of(job.checkpoint, job.revision)
    templated = any(row.request.messages is not None for row in rows)
    with_template = Chat(folder, job.chat_template) if templated else None
    if Path(job.checkpoint).exists():
        job = replace(job, checkpoint=str(folder.resolve()))  # workers run in other folders
    config = job.config
    name = model_name(folder, job.dtype, config.expert_format, config.dense_format, with_template)
    job = replace(job, config=with_profile(config), templated=templated, model=name)
    job = replace(job, nodes={node: with_profile(own) for node, own in job.nodes.items()})
    is_table = out.suffix == tables.ENDING
    digest = digest_of(rows, name) if is_table else ""
    if is_table:
        tables.check_rows(rows)
        if out.exists():
            return complete_already(out, len(rows), digest)
    with CompletionFile(out.with_name(f"{out.name}.jsonl") if is_table else out, rows, name) as file:
        interrupts.promise(f"interrupted; the same command continues {out}")
        report = _completed(rows, file, job, use, kind, Described.of(folder), folder)
        if is_table:
            tables.write_table(out, rows, file.in_order(), digest)
            file.path.unlink()
        elif out.is_file():  # no device, which holds no lines
            put_in_order(file)
    return replace(report, out=out)


def _completed(
    rows: Sequence[Row],
    file: CompletionFile,
    job: Job,
    use: ClusterUse,
    kind: type,
    described: Described,
    folder: Path,
) -> Report:
    """Completes the rows that a file does not have yet."""
    left = [row for row in rows if row.id not in file.done]
    report = Report(out=file.path, rows=len(rows), done_before=len(file.done), failed=len(file.failed))
    if file.done:
        say(f"{file.path} has {len(file.done)} of {len(rows)} completions already")
    if not left:
        return report
    lines = Lines(job.model, described.tokenizer, file)
    failed = written = shown = 0
    began = time.monotonic()
    with (
        connected(use.address) as ray,
        Crew(
            cluster := RayCluster(ray, job, kind),
            workers=use.workers,
            timeout_s=use.timeout_s,
            retries=use.retries,
            start_timeout_s=use.start_timeout_s,
            exact=job.config.numerics == "exact",
        ) as crew,
    ):
        known = {name for node in cluster.nodes() for name in node.names}
        if unknown := sorted(set(job.nodes) - known):
            say(f"no node is called {', '.join(unknown)}; there are {', '.join(sorted(known))[:200]}")
        crew.hire(len(left))  # they load the model meanwhile
        left, limits, tokens = _encoded(left, lines, described, Chat(folder, job.chat_template), job.config)
        with progress_bar(len(rows), len(rows) - len(left), use.progress) as advance:

            def write(number: int, line: bytes, has_failed: bool) -> None:
                nonlocal failed, written
                file.write(line)
                failed, written = failed + has_failed, written + 1

            def told(tokens: int, workers: int) -> None:  # once a beat, whatever lines it has
                nonlocal shown
                advance(written - shown, tokens, workers)
                shown = written

            if left:
                shards = shards_of(tokens, max(1, crew.places), limits.max_num_seqs)
                crew.work(shards, left, limits, write, told)
        total_s = time.monotonic() - began
        workers = tuple(WorkerReport.of(worker) for worker in crew.all)
    return replace(
        report,
        failed=report.failed + lines.refused + failed,
        new_tokens=sum(worker.new_tokens for worker in workers),
        total_s=total_s,
        workers=workers,
    )


def _encoded(
    rows: Sequence[Row], lines: Lines, described: Described, chat: Chat, config: OffloadConfig
) -> tuple[list[Row], Limits, list[int]]:
    """Returns the rows that can be completed, what they need of an engine, and their expected tokens.

    Workers encode prompts again: lists of all token ids would take many times the memory of the texts.

    Raises:
        ValueError: naming the first row that cannot be encoded.
    """
    kept: list[Row] = []
    tokens: list[int] = []
    context = samples = 1
    try:
        for start in range(0, len(rows), ENCODED):
            interrupts.check()
            for row, request in lines.encode(rows[start : start + ENCODED], described, chat):
                length = len(request.prompt or ())
                kept.append(row)
                tokens.append(expected_tokens(request, length))
                context = max(context, length + request.max_new_tokens)
                samples += request.n
    finally:
        chat.close()
    return kept, Limits(context, min(config.max_num_seqs, samples)), tokens


def check(job: Job, use: ClusterUse) -> None:
    """Refuses options that are out of range, or configs of nodes that would change tokens."""
    problems = Problems()
    workers, retries = use.workers, use.retries
    problems.expect(
        workers is None or (is_integer(workers) and workers >= 1), "workers", "1 or more", workers
    )
    problems.expect(is_integer(retries) and retries >= 0, "retries", "0 or more", retries)
    for name in ("timeout_s", "start_timeout_s"):
        given = getattr(use, name)
        problems.expect(is_number(given) and given > 0, name, "seconds, more than 0", given)
    for node, config in job.nodes.items():
        for field in ("numerics", "expert_format", "dense_format"):
            own, common = getattr(config, field), getattr(job.config, field)
            if own != common:
                problems.add(
                    f"nodes[{node!r}].{field} must be {common!r}, as on the other nodes, got {own!r}"
                )
    problems.raise_any()


def with_profile(config: OffloadConfig) -> OffloadConfig:
    """Returns a config whose profile is read, so that no node need have its file."""
    if not isinstance(config.profile, str | Path):
        return config
    return replace(config, profile=MachineProfile.load(config.profile))


def complete_already(out: Path, rows: int, digest: str) -> Report:
    """Returns the report of a job whose Parquet file there is.

    Raises:
        ValueError: if it is of another job.
    """
    if tables.job_of(out) != digest:
        raise ValueError(
            f"{out}: expected a file that does not exist, or the completions of these prompts by this "
            "checkpoint with these settings, got others; choose another file"
        )
    say(f"{out} has {rows} of {rows} completions already")
    return Report(out=out, rows=rows, done_before=rows, failed=tables.failed_in(out))


def put_in_order(file: CompletionFile) -> None:
    """Puts a complete file in the order of the rows; if there is no room for a copy, it stays as it is."""

    def write(path: Path) -> None:
        with path.open("wb") as ordered:
            for line in file.in_order():
                ordered.write(line)

    try:
        write_file(file.path, write)
    except ValueError as error:
        say(f"{file.path} stays in the order in which rows were completed: {error}")
