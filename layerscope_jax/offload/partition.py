"""Experts parted among devices (expert parallelism): every device owns the same number of each layer's."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "experts"
"""Name of the mesh's axis."""


@dataclass(frozen=True)
class Partition:
    """Which device owns which experts of a layer: device i those from i * n on, n of them.

    Everything but the routed experts is replicated: each device holds all of it, and computes it for every
    token. Devices may belong to several processes, which all run the same calls (`jax.distributed`); a
    process holds the experts of its own devices alone.

    Attributes:
        devices: in the order of their parts; those of one process follow each other.
        num_experts: E, of a layer.

    Raises:
        ValueError: if the devices are not different, of one platform, and a divisor of E in number, or none
            of them belongs to this process.

    >>> partition = Partition((jax.devices()[0],), 8)
    >>> partition.part(0), partition.held
    (range(0, 8), range(0, 8))
    """

    devices: tuple[jax.Device, ...]
    num_experts: int

    def __post_init__(self) -> None:
        count = len(self.devices)
        if not count or len(set(self.devices)) < count:
            raise ValueError(f"devices must be one or more, each of them once, got {list(self.devices)}")
        kinds = sorted({device.platform for device in self.devices})
        if len(kinds) > 1:
            raise ValueError(f"devices must be of one platform, got {', '.join(kinds)}")
        if self.num_experts % count:
            fitting = [n for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]
            raise ValueError(
                f"devices share the {self.num_experts} experts of a layer evenly, which {count} devices "
                f"cannot; use {', '.join(map(str, fitting[:-1]))} or {fitting[-1]}"
            )
        processes = [device.process_index for device in self.devices]
        if processes != sorted(processes):
            raise ValueError(
                "devices of one process must follow each other, as in jax.devices(); got those of "
                f"processes {', '.join(map(str, processes))}"
            )
        if not self.local:
            raise ValueError(
                f"none of the devices {list(self.devices)} belongs to this process ({jax.process_index()})"
            )

    @classmethod
    def over(cls, devices: int | Sequence[jax.Device], num_experts: int) -> Partition:
        """Returns the partition over some devices, or over so many of `jax.devices()`.

        Raises:
            ValueError: if there are not so many, and as of the class.
        """
        if isinstance(devices, int):
            available = jax.devices()
            if isinstance(devices, bool) or not 1 <= devices <= len(available):
                raise ValueError(
                    f"devices must be in 1..{len(available)}, as many as JAX has ({available[0].platform}), "
                    f"got {devices!r}"
                )
            devices = available[:devices]
        return cls(tuple(devices), num_experts)

    @property
    def each(self) -> int:
        """Number of a layer's experts that a device owns."""
        return self.num_experts // len(self.devices)

    @functools.cached_property
    def local(self) -> tuple[int, ...]:
        """Positions of this process's devices among all."""
        here = jax.process_index()
        return tuple(i for i, device in enumerate(self.devices) if device.process_index == here)

    @property
    def first(self) -> jax.Device:
        """This process's first device."""
        return self.devices[self.local[0]]

    def part(self, position: int) -> range:
        """Returns the experts of a device."""
        return range(position * self.each, (position + 1) * self.each)

    @property
    def held(self) -> range:
        """Experts that this process holds."""
        return range(self.part(self.local[0]).start, self.part(self.local[-1]).stop)

    def owner(self, expert: int) -> jax.Device:
        """Returns the device that owns an expert."""
        return self.devices[expert // self.each]

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices as a mesh of one axis."""
        return Mesh(np.array(self.devices), (AXIS,))

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of what every device holds, in device memory."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def split(self) -> NamedSharding:
        """Sharding of arrays whose leading axis the devices share."""
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    def replicate(self, tree: Any) -> Any:
        """Returns arrays, the same in every process, on every device; nothing crosses between processes."""

        def copied(array: Any) -> jax.Array:
            if isinstance(array, jax.Array) and array.sharding == self.replicated:
                return array
            copies = [jax.device_put(array, self.devices[i]) for i in self.local]
            return jax.make_array_from_single_device_arrays(np.shape(array), self.replicated, copies)

        return jax.tree.map(copied, tree)

    def joined(self, rows: Sequence[Any]) -> jax.Array:
        """Returns arrays of this process's devices [R, ...], one each, as one array of all [N * R, ...]."""
        shape = (len(self.devices) * len(rows[0]), *rows[0].shape[1:])
        placed = [jax.device_put(array, self.devices[i]) for i, array in zip(self.local, rows, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, self.split, placed)


def of_device(array: jax.Array, device: jax.Device) -> jax.Array:
    """Returns what a device holds of an array, without a copy."""
    if array.is_fully_addressable and len(array.devices()) == 1:
        return array
    return next(shard.data for shard in array.addressable_shards if shard.device == device)
