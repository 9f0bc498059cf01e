"""What of a checkpoint fits where on a machine, and what would help: `layerscope fit` without printing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from layerscope_jax.checkpoints.dense_weights import DENSE_FORMATS
from layerscope_jax.checkpoints.description import Description
from layerscope_jax.checkpoints.parameters import ROUTED, int8_saves
from layerscope_jax.checkpoints.safetensors_io import dtype_named
from layerscope_jax.cli.fit_times import Expected
from layerscope_jax.formats import ExpertFormat, PlainFormat, format_named, quantised
from layerscope_jax.formats.quantised import ENCODINGS
from layerscope_jax.generation.device_memory import DeviceNeeds, device_needs
from layerscope_jax.models.config import ModelConfig

HOST_MARGIN = 2**30
"""Host memory (bytes) that experts leave free: for Python, JAX and the system."""

IN_FLOAT32 = 4
"""Bytes of a number in caches on a CPU (`layerscope_jax.models.cache`)."""

LARGER = 1.1
"""Factor by which a device's memory grows until a model fits."""

LITTLE = 0.01
"""Shares of experts that differ by less are not worth advice."""

ORDER = {"nowhere": 0, "disk": 1, "host": 2, "device": 3}
"""Where experts may lie, the best last."""

MOST_TAKEN = 0.95
"""Share of a device's memory that JAX can take if nothing else needs it."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A machine's memory.

    Attributes:
        device: name of the accelerator; None for a CPU alone, whose memory is the host's.
        device_bytes: bytes of its memory that JAX can give; None with `device`.
        device_told: where that figure comes from.
        taken: share of the whole device's memory that this is; None if it is not known.
        host_bytes: bytes of host memory that can be taken.
        host_told: where that figure comes from.
    """

    device: str | None
    device_bytes: int | None
    device_told: str | None
    host_bytes: int
    host_told: str
    taken: float | None = None


class Asked(NamedTuple):
    """What is asked of the engine: see `OffloadConfig`."""

    max_num_seqs: int
    context: int
    prefill_chunk_size: int


@dataclass(frozen=True, kw_only=True)
class FormatFit:
    """Where the experts fit in one format.

    Attributes:
        format: its name.
        expert_bytes, total_bytes: of one expert, and of all.
        left_bytes: bytes left for experts on the device, or in host memory on a CPU.
        share: share of the experts that fit there.
        experts_lie: "device", "host", "disk", or "nowhere" if they fit into no memory that they can be run
            from; experts on the device are in host memory too.
    """

    format: str
    expert_bytes: int
    total_bytes: int
    left_bytes: int
    share: float
    experts_lie: str


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A change, and the share of the experts that would fit on the device with it."""

    change: str
    share: float


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What fits where.

    Attributes:
        checkpoint, family, dtype: the model, and the dtype of what is no expert.
        memory: the machine's.
        max_num_seqs, context, prefill_chunk_size: what is asked of the engine.
        needs: bytes that it takes beside its experts, part by part.
        chosen: fit in the checkpoint's own format.
        formats: fit in each format, the own one first.
        refused: format -> why the experts cannot have it.
        times: expected times; None if they are left out.
        no_times: why they are left out; None if they are not.
        advice: what would help, most first.
    """

    checkpoint: str
    family: str
    dtype: str
    memory: Memory
    max_num_seqs: int
    context: int
    prefill_chunk_size: int
    needs: DeviceNeeds
    chosen: FormatFit
    formats: tuple[FormatFit, ...]
    refused: dict[str, str]
    times: Expected | None = None
    no_times: str | None = None
    advice: tuple[Advice, ...] = ()

    @property
    def runs(self) -> bool:
        """Whether the checkpoint can be run as it is."""
        return self.chosen.experts_lie != "nowhere"

    def to_json(self) -> dict[str, Any]:
        """Returns the report as an object for JSON."""
        totals = {"total": self.needs.total, "workspace": self.needs.workspace}
        return asdict(self) | {"runs": self.runs, "needs": asdict(self.needs) | totals}


def report(description: Description, config: ModelConfig, memory: Memory, asked: Asked) -> FitReport:
    """Returns what of a checkpoint fits where, without times.

    Args:
        description: the checkpoint.
        config: its model's shape.
        memory: the machine's memory.
        asked: what is asked of the engine.
    """
    model = _Model(description, config)
    own = description.expert_format
    fits, refused = [], {}
    for name in dict.fromkeys([own, description.dtype, *(quantised(kind()).name for kind in ENCODINGS)]):
        try:
            fits.append(model.fit(name, memory, asked))
        except ValueError as error:
            refused[name] = str(error)
    made = FitReport(
        checkpoint=description.folder,
        family=description.family,
        dtype=description.dtype,
        memory=memory,
        **asked._asdict(),
        needs=model.needs(own, memory, asked),
        chosen=fits[0],
        formats=tuple(fits),
        refused=refused,
    )
    packed = model.with_packed_dense().fit(own, memory, asked)
    return replace(made, advice=_advice(made, lambda *changed: model.fit(own, *changed), asked, packed))


class _Model:
    """Sizes of a checkpoint's model in each format."""

    def __init__(self, description: Description, config: ModelConfig):
        self.description, self.config = description, config
        self.itemsize = dtype_named(description.dtype).itemsize
        dense = sum(count for part, count in description.parameters.items() if part != ROUTED)
        plain, packed = self.itemsize * dense, self.itemsize * dense - int8_saves(config, self.itemsize)
        self.dense_bytes = packed if description.dense_format in DENSE_FORMATS else plain
        self.packed_dense_bytes = packed

    def format(self, name: str) -> ExpertFormat:
        return format_named(name).for_body(self.config.expert_body)

    def expert_bytes(self, name: str) -> int:
        return self.format(name).expert_bytes(self.config.hidden_size, self.config.moe_intermediate_size)

    def with_packed_dense(self) -> _Model:
        """Returns the same with the matrices of dense layers in int8."""
        changed = copy.copy(self)
        changed.dense_bytes = self.packed_dense_bytes
        return changed

    def needs(self, name: str, memory: Memory, asked: Asked) -> DeviceNeeds:
        """Returns what is taken beside experts; on a CPU with its margin in host memory."""
        alone = memory.device_bytes is None
        needs = device_needs(
            self.config,
            itemsize=IN_FLOAT32 if alone else self.itemsize,
            expert_bytes=self.expert_bytes(name),
            packed=not isinstance(self.format(name), PlainFormat),
            device_bytes=memory.device_bytes or 0,
            dense_bytes=self.dense_bytes,
            **asked._asdict(),
        )
        # Loops of this package compute attention and experts on CPUs, without arrays of scores or rows.
        return replace(needs, attention=0, dispatch=0, margin=HOST_MARGIN) if alone else needs

    def fit(self, name: str, memory: Memory, asked: Asked) -> FormatFit:
        each, needs = self.expert_bytes(name), self.needs(name, memory, asked)
        total = each * self.config.num_moe_layers * self.config.num_experts
        alone = memory.device_bytes is None
        left = (memory.host_bytes if alone else memory.device_bytes or 0) - needs.total
        host = left if alone else memory.host_bytes - HOST_MARGIN
        share = min(1.0, max(0, left) // each * each / total)
        if left < 0 or (total > host and (host < each or not self._can_stay_on_disk(name))):
            where, share = "nowhere", 0.0
        elif total > host:
            where = "disk"
        else:
            where = "device" if share == 1 and not alone else "host"
        return FormatFit(
            format=name,
            expert_bytes=each,
            total_bytes=total,
            left_bytes=max(0, left),
            share=share,
            experts_lie=where,
        )

    def _can_stay_on_disk(self, name: str) -> bool:
        """Whether experts can be read from the checkpoint's files while the engine runs."""
        return name == self.description.expert_format and isinstance(self.format(name), PlainFormat)


def _advice(
    made: FitReport, fit: Callable[[Memory, Asked], FormatFit], asked: Asked, packed: FormatFit
) -> tuple[Advice, ...]:
    """Returns the changes that let more experts fit, those that let the most fit first.

    Args:
        made: the report so far.
        fit: how the experts fit into other memory, or with something else asked.
        asked: what is asked.
        packed: how they fit beside dense weights in int8.
    """
    memory, now = made.memory, made.chosen
    if now.share == 1 and now.experts_lie in ("device", "host"):
        return ()
    changes = {"dense weights in int8 (--dense-format int8)": packed}
    smaller = [other for other in made.formats if other.total_bytes < now.total_bytes]
    if smaller:
        best = max(smaller, key=lambda other: (ORDER[other.experts_lie], other.share, other.total_bytes))
        changes[f"experts in {best.format} (--expert-format {best.format})"] = best
    for name, value in asked._asdict().items():
        if value >= 32 or (name == "max_num_seqs" and value > 1):
            label = f"{name} {value // 2:,} instead of {value:,}"
            changes[label] = fit(memory, asked._replace(**{name: value // 2}))
    less = asked
    while fit(memory, less).left_bytes == 0 and less != lowered(less):
        less = lowered(less)
    if less != asked:
        label = ", ".join(f"{name} {value:,}" for name, value in less._asdict().items())
        changes[label] = fit(memory, less)
    if memory.device_bytes is not None:
        more = replace(memory, device_bytes=memory.device_bytes * 2)
        changes["twice the device's memory"] = fit(more, asked)
    if memory.taken is not None and memory.taken < MOST_TAKEN:
        more = replace(memory, device_bytes=int((memory.device_bytes or 0) / memory.taken * MOST_TAKEN))
        changes[f"XLA_CLIENT_MEM_FRACTION={MOST_TAKEN:g}"] = fit(more, asked)
    if now.experts_lie in ("disk", "nowhere"):
        missing = now.total_bytes + HOST_MARGIN if memory.device else now.total_bytes + made.needs.total
        more = replace(memory, host_bytes=missing)
        changes[f"host memory for all experts, {missing / 2**30:.1f} GiB free"] = fit(more, asked)
    if now.experts_lie == "nowhere" and memory.device_bytes is not None:
        enough = replace(memory, host_bytes=max(memory.host_bytes, now.total_bytes + HOST_MARGIN))
        while fit(enough, asked).experts_lie == "nowhere":
            enough = replace(enough, device_bytes=max(2**20, int((enough.device_bytes or 0) * LARGER)))
        device, host = (
            math.ceil(size / 2**30 * 10) / 10
            for size in ((enough.device_bytes or 0) / (memory.taken or 1), enough.host_bytes)
        )
        label = f"a device with {device:.1f} GiB, and {host:.1f} GiB of free host memory"
        changes[label] = fit(enough, asked)
    better = [
        (ORDER[other.experts_lie], Advice(change=change, share=other.share))
        for change, other in changes.items()
        if ORDER[other.experts_lie] > ORDER[now.experts_lie] or other.share > now.share + LITTLE
    ]
    return tuple(advice for _, advice in sorted(better, key=lambda pair: (-pair[0], -pair[1].share)))


def lowered(asked: Asked) -> Asked:
    """Returns half of everything that is asked for, but for what is hardly anything already.

    >>> lowered(Asked(max_num_seqs=1, context=2048, prefill_chunk_size=300))
    Asked(max_num_seqs=1, context=1024, prefill_chunk_size=256)
    """
    least = Asked(1, min(256, asked.context), min(256, asked.prefill_chunk_size))
    return Asked(*(max(low, value // 2) for low, value in zip(least, asked, strict=True)))
