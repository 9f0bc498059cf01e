"""A worker: one engine on a node, which completes shards and says so as it goes.

What it says are values (`Identity`, `Beat`, `Failure`), so that the job need not ask how Ray wraps an error.
Everything heavy is imported when the model is loaded: a worker that shares a node with others first takes its
part of the cores, because thread pools are as large as the cores that there are when they are made.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from layerscope_jax.distributed.placing import Place
from layerscope_jax.support import exits
from layerscope_jax.support.errors import MachineError, ReadError

if TYPE_CHECKING:
    from pathlib import Path

    from layerscope_jax.checkpoints.model import Model
    from layerscope_jax.config import OffloadConfig
    from layerscope_jax.generation.prompt_files import Row

BEAT_S = 1.0
"""Time (s) between two signs of life of a worker whose steps go on."""

MEMORY_KEPT = 0.95
"""Share of a profile's memory that a node must have: kernels keep different amounts to themselves."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker of a job is told.

    Attributes:
        checkpoint: folder, or name on the hub.
        revision, dtype: as of `layerscope_jax.load`.
        config: how engines are run, and the formats of the model.
        nodes: what replaces `config` on some nodes, by their names.
        chat_template: text of the template in place of the checkpoint's; None for that.
        templated: whether some prompts are made by a template.
        model: name of what generates, in the lines of completions.
        tuned: completes the config for a model that is loaded.
    """

    checkpoint: str
    revision: str | None = None
    dtype: str | None = None
    config: OffloadConfig
    nodes: Mapping[str, OffloadConfig] = field(default_factory=dict)
    chat_template: str | None = None
    templated: bool = False
    model: str = ""
    tuned: Callable[[OffloadConfig, Model], OffloadConfig] | None = None

    def config_on(self, names: Sequence[str]) -> OffloadConfig:
        """Returns the config of a node that is known by some names."""
        return next((self.nodes[name] for name in names if name in self.nodes), self.config)


@dataclass(frozen=True)
class Limits:
    """What a job needs of an engine.

    Attributes:
        context: positions of its longest request.
        max_num_seqs: samples that run at once at most.
    """

    context: int
    max_num_seqs: int


@dataclass(frozen=True)
class Identity:
    """What a worker runs: all workers of a job must agree in it.

    Attributes:
        model: what must be the same on all nodes, by its name in messages.
        computes: what numbers are computed by: device, processor, versions. Where it differs, so may the last
            bits of logits.
        pid: the worker's process.
    """

    model: dict[str, str]
    computes: str
    pid: int


@dataclass(frozen=True)
class Beat:
    """A sign of life.

    Attributes:
        lines: number of each row that is complete now, its line, and whether it ended with an error.
        tokens: new tokens since the last beat.
        experts, hits: experts that were needed, and those that were resident; of a whole shard, at its end.
    """

    lines: tuple[tuple[int, bytes, bool], ...] = ()
    tokens: int = 0
    experts: int = 0
    hits: int = 0


@dataclass(frozen=True)
class Failure:
    """Why a worker could not go on.

    Attributes:
        text: what to tell the user.
        is_refusal: whether what the user gave is wrong, which no other worker would mend.
        details: the traceback.
    """

    text: str
    is_refusal: bool = False
    details: str = ""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Returns what an error says."""
        of_here = isinstance(error, (ReadError, OSError, MachineError))
        refused = exits.code_of(error) == exits.REFUSED and not of_here
        text = exits.described(error)
        text = f"{type(error).__name__}: {text}" if exits.is_fault(error) else text
        return cls(text, refused, "".join(traceback.format_exception(error)))


class Worker:
    """One engine.

    Args:
        job: what it is for.
        place: where it runs.
    """

    def __init__(self, job: Job, place: Place):
        take_cores(place)
        self._job, self._config, self._place = job, job.config_on(place.node.names), place
        self._model: Model | None = None
        self._engine: Any = None

    def start(self) -> Iterator[Identity | Failure]:
        """Loads the model; says what it is."""
        try:
            yield self._started()
        except Exception as error:
            yield Failure.of(error)

    def run(self, rows: Sequence[tuple[int, Row]], limits: Limits) -> Iterator[Beat | Failure]:
        """Completes rows, each with its number in the job."""
        try:
            yield from self._beats(rows, limits)
        except Exception as error:
            yield Failure.of(error)

    def _started(self) -> Identity:
        check_memory(self._config)
        from layerscope_jax.checkpoints.fingerprint import fingerprint
        from layerscope_jax.checkpoints.hub import folder_of
        from layerscope_jax.checkpoints.model import load
        from layerscope_jax.generation.chat import Chat
        from layerscope_jax.support.compile_cache import use_compilation_cache

        with suppress(OSError, RuntimeError):  # no home, or a read-only one: it compiles anew
            use_compilation_cache()
        job, config = self._job, self._config
        folder = folder_of(job.checkpoint, job.revision)
        check_copies(folder, config, self._place)
        model = self._model = load(
            folder,
            dtype=job.dtype,
            format=config.expert_format,
            dense_format=config.dense_format,
            experts="memory" if config.host_budget is None else "disk",
        )
        if job.tuned is not None:
            self._config = job.tuned(config, model)
        return Identity(
            {
                "checkpoint": fingerprint(folder),
                "dtype": model.bank.dtype.name,
                "experts": model.bank.format.name,
                "dense layers": model.dense_format or "plain",
                "chat template": Chat(folder, job.chat_template).digest() if job.templated else "unused",
            },
            computes_by(model.device.device_kind),
            os.getpid(),
        )

    def _beats(self, rows: Sequence[tuple[int, Row]], limits: Limits) -> Iterator[Beat]:
        """Completes rows; yields a beat a second, and one at the end."""
        from layerscope_jax.engine import Engine
        from layerscope_jax.generation.chat import Chat
        from layerscope_jax.generation.completions import Gathering
        from layerscope_jax.generation.lines import Lines
        from layerscope_jax.generation.requests import with_seed
        from layerscope_jax.runtime.sampling import NO_TOKEN

        model = self._model
        assert model is not None, "run before start"
        if self._engine is None:
            most = min(self._config.max_num_seqs, limits.max_num_seqs)
            config = replace(self._config, context=limits.context, max_num_seqs=most)
            self._engine = Engine(model, config, generation_config="none")  # the rows have their settings
        written = Written()
        lines = Lines(self._job.model, model.tokenizer, written)
        with closing(Chat(model.path, self._job.chat_template)) as chat:
            encoded = lines.encode([row for _, row in rows], model, chat)
        number_of = {row.id: number for number, row in rows}
        requests = [with_seed(request) for _, request in encoded]
        gathering = Gathering(requests)
        ready: list[tuple[int, bytes, bool]] = []
        tokens, last = 0, time.monotonic()
        with closing(self._engine.stream(requests)) as events:
            for event in events:
                tokens += event.token_id != NO_TOKEN
                outputs = gathering.add(event)
                if outputs is not None:
                    row = encoded[event.request][0]
                    lines.write(row, outputs)
                    failed = any(output.error is not None for output in outputs)
                    ready.append((number_of[row.id], written.take(), failed))
                if time.monotonic() - last >= BEAT_S:
                    yield Beat(tuple(ready), tokens)
                    ready, tokens, last = [], 0, time.monotonic()
        meter = self._engine.account.meter
        yield Beat(tuple(ready), tokens, meter.experts, meter.expert_hits)


class Written:
    """Takes what is written, in place of a file."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, line: bytes) -> None:
        self._parts.append(line)

    def take(self) -> bytes:
        """Returns what was written since the last call."""
        line, self._parts = b"".join(self._parts), []
        return line


def take_cores(place: Place) -> None:
    """Keeps this process to its part of the cores, if it shares its node with other engines."""
    if place.of == 1 or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    size = len(cores) // place.of
    first = place.number * size if size else place.number % len(cores)
    os.sched_setaffinity(0, cores[first : first + max(1, size)])


def check_memory(config: OffloadConfig) -> None:
    """Refuses a node with less memory than the machine that its profile was measured on.

    Raises:
        ValueError: if it has less: what fitted there may not fit here.
    """
    from layerscope_jax.profiling.machine_profile import MachineProfile
    from layerscope_jax.support import machine
    from layerscope_jax.support.units import gib

    profile = config.profile
    needed = profile.machine.get("memory_bytes") if isinstance(profile, MachineProfile) else None
    memory = machine.memory_bytes()
    if needed is None or memory is None or memory >= MEMORY_KEPT * needed:
        return
    assert isinstance(profile, MachineProfile)
    raise ValueError(
        f"expected as much memory as the profile {profile.name!r} says, {gib(needed)}, got {gib(memory)}; "
        "give this node a profile of its own, or leave the node out"
    )


def check_copies(folder: Path, config: OffloadConfig, place: Place) -> None:
    """Refuses a node that lacks the memory for the weights of all its engines.

    Beside accelerators each engine has a copy in pinned memory; a machine without any maps the files once.

    Raises:
        ValueError: saying how many engines there would be, and what they take.
    """
    from layerscope_jax.support import machine
    from layerscope_jax.support.units import gib

    memory = machine.memory_bytes()
    if int(place.node.gpus) < 2 or memory is None or config.host_budget or config.expert_format:
        return
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if place.of * size > memory:
        raise ValueError(
            f"its {place.of} accelerators would have an engine each, and each a copy of the weights, "
            f"{gib(size)}, in {gib(memory)} of memory; give a smaller expert_format, a host_budget, or fewer "
            "accelerators to Ray there"
        )


def computes_by(device: str) -> str:
    """Returns what numbers are computed by on this machine."""
    import hashlib
    from importlib.metadata import PackageNotFoundError, version

    import jax
    from llvmlite import binding

    from layerscope_jax.support import target

    features = hashlib.blake2b(target.describe().encode(), digest_size=3).hexdigest()
    try:
        own = version("layerscope-jax")
    except PackageNotFoundError:  # a checkout that is not installed
        own = "unknown"
    return f"{device}, {binding.get_host_cpu_name()} ({features}), jax {jax.__version__}, layerscope {own}"
