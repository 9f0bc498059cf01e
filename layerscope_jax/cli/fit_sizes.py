"""Where a checkpoint's experts fit on a machine, in each format: the sizes behind `layerscope fit`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from layerscope_jax.checkpoints.dense_weights import DENSE_FORMATS
from layerscope_jax.checkpoints.description import Description
from layerscope_jax.checkpoints.manifest import is_converted
from layerscope_jax.checkpoints.parameters import ROUTED, int8_saves
from layerscope_jax.checkpoints.safetensors_io import dtype_named
from layerscope_jax.formats import ExpertFormat, PlainFormat, format_named
from layerscope_jax.generation.device_memory import DeviceNeeds, device_needs
from layerscope_jax.models.config import ModelConfig

HOST_MARGIN = 2**30
"""Host memory (bytes) that experts leave free: for Python, JAX and the system."""

IN_FLOAT32 = 4
"""Bytes of a number in caches on a CPU (`layerscope_jax.models.cache`)."""


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
        host_bytes: bytes that experts can have of host memory.
        experts_lie: "device", "host", "disk", or "nowhere" if they fit into no memory that they can be run
            from; experts on the device are in host memory too.
    """

    format: str
    expert_bytes: int
    total_bytes: int
    left_bytes: int
    share: float
    host_bytes: int
    experts_lie: str


class Sizes:
    """Sizes of a checkpoint's model in each format.

    Args:
        description: the checkpoint.
        config: its model's shape.
        dense_format: format to pack the matrices of dense layers in; None for the checkpoint's.

    Attributes:
        dense_format: that of the matrices of dense layers; None if they are not packed.
        dense_bytes: of everything but the routed experts.
    """

    def __init__(self, description: Description, config: ModelConfig, dense_format: str | None = None):
        self.description, self.config = description, config
        self.itemsize = dtype_named(description.dtype).itemsize
        dense = sum(count for part, count in description.parameters.items() if part != ROUTED)
        plain, packed = self.itemsize * dense, self.itemsize * dense - int8_saves(config, self.itemsize)
        form = dense_format or description.dense_format
        self.dense_format = form if form in DENSE_FORMATS else None
        self.dense_bytes = plain if self.dense_format is None else packed

    def format(self, name: str) -> ExpertFormat:
        return format_named(name).for_body(self.config.expert_body)

    def expert_bytes(self, name: str) -> int:
        return self.format(name).expert_bytes(self.config.hidden_size, self.config.moe_intermediate_size)

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
            host_bytes=max(0, host),
            experts_lie=where,
        )

    def _can_stay_on_disk(self, name: str) -> bool:
        """Whether experts can be read from the checkpoint's files while the engine runs."""
        if name != self.description.expert_format:
            return False
        return isinstance(self.format(name), PlainFormat) or is_converted(Path(self.description.folder))
