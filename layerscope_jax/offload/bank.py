"""Expert bank: every routed expert of a model in pinned host memory, never written after loading."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from layerscope_jax.formats import ExpertFormat, PlainFormat, plain_of
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.experts import BiasedWeights, weights_type
from layerscope_jax.offload.memory import ALIGNED, Memory
from layerscope_jax.offload.parcels import MOST_BYTES, in_parcel
from layerscope_jax.offload.partition import Partition
from layerscope_jax.scheduling.plan import ExpertId
from layerscope_jax.support import numa


def host_sharding(device: jax.Device | None = None) -> jax.sharding.Sharding:
    """Returns the sharding of pinned host memory, from which copies to `device` are asynchronous."""
    return jax.sharding.SingleDeviceSharding(device or jax.devices()[0], memory_kind="pinned_host")


def device_sharding(device: jax.Device | None = None) -> jax.sharding.Sharding:
    """Returns the sharding of a device's memory (the default device's if None)."""
    return jax.sharding.SingleDeviceSharding(device or jax.devices()[0], memory_kind="device")


@dataclass(frozen=True)
class ExpertBank:
    """All routed experts in host memory, each as the arrays of one format, which are copied one by one.

    One copy in RAM serves device and host: the arrays are copied to the device, and `views` are NumPy views
    of the same buffers for the host's kernels.

    Attributes:
        layers: `[L][E]` each expert's arrays, L the MoE layers: an `Expert` of the format, in `pinned_host`
            memory; or, on a CPU, NumPy arrays that JAX could not take over without a copy, because they lie
            where a file is mapped.
        format: format of the experts; by default the plain format of the first expert's matrices.
        dtype: dtype of the inputs and outputs of experts; by default that of the plain format.
        parcels: `[L][E]` each expert in one array of bytes, of which its arrays are views
            (`layerscope_jax.offload.parcels`); None where each array is copied by itself.

    >>> config = ModelConfig(family="olmoe", vocab_size=32, hidden_size=8, num_layers=2, num_heads=2,
    ...     num_kv_heads=1, head_dim=4, num_experts=4, experts_per_token=2, moe_intermediate_size=4,
    ...     normalize_top_k=True)
    >>> bank = ExpertBank.build(config, lambda expert, name, shape: np.zeros(shape, np.float32))
    >>> bank[ExpertId(1, 3)].down.shape, bank[ExpertId(1, 3)].down.sharding.memory_kind
    ((8, 4), 'pinned_host')
    >>> bank.expert_bytes, bank.total_bytes
    (384, 3072)
    """

    layers: tuple[tuple[Any, ...], ...]
    format: ExpertFormat = None  # type: ignore[assignment]
    dtype: np.dtype = None  # type: ignore[assignment]
    parcels: tuple[tuple[jax.Array, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.format is None:
            if isinstance(self.layers[0][0], BiasedWeights):
                raise ValueError(
                    "a bank of experts with biases needs format=, which knows their activation: "
                    "format_named(...).for_body(config.expert_body)"
                )
            object.__setattr__(self, "format", plain_of(self.layers[0][0]))
        if self.dtype is None:
            if not isinstance(self.format, PlainFormat):
                raise ValueError(
                    f"a bank of experts in the format {self.format.name!r} needs dtype=, the dtype of the "
                    "activations"
                )
            object.__setattr__(self, "dtype", self.format.dtype)

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        read: Callable[[ExpertId, str, tuple[int, ...]], np.ndarray],
        device: jax.Device | None = None,
        format: ExpertFormat | None = None,
        in_place: bool = False,
        packed_for: np.dtype | None = None,
        partition: Partition | None = None,
        as_parcels: bool | None = None,
    ) -> ExpertBank:
        """Makes a bank, array by array, from `read(expert, "gate" | "up" | "down" | "bias", shape)`.

        Only one matrix (with a format, one expert) exists twice at a time. Without a format, the bank on a
        CPU may share the memory of the array that `read` returns, which must not be written afterwards.

        Args:
            config: sizes and numbers of the experts.
            read: returns a matrix, in the dtype of activations.
            device: device that the experts are copied to; None for the default device.
            format: format to pack experts into; None to keep the matrices as they are read.
            in_place: whether matrices that JAX could only copy stay the NumPy arrays that `read` returns;
                on a CPU only, which computes from them all the same.
            packed_for: dtype of activations, where `read` returns matrices that are packed in `format`
                already: objects with their `arrays`. None where they are to be packed.
            partition: devices that the experts are copied to, each to its owner, instead; the bank is of
                those that this process holds, numbered from 0.
            as_parcels: whether each expert is as a parcel; None for what suits the device and their size.
        """
        puts, shapes = putting_each(config, device, partition, in_place), config.expert_shapes()
        put_packs = {put: in_blocks(put) for put in puts.values()}
        dtype: np.dtype | None = None
        weights = weights_type(config.expert_body)
        form = None if format is None else format.for_body(config.expert_body)

        if as_parcels is None:
            size = (
                config.expert_bytes(2)
                if form is None
                else form.expert_bytes(config.hidden_size, config.moe_intermediate_size)
            )
            as_parcels = suits_parcels(device if partition is None else partition.first, size)
        parcels: dict[ExpertId, jax.Array] = {}

        def build(expert: ExpertId) -> Any:
            put = puts[expert.expert]
            if as_parcels:
                # Copies, because a reader may reuse its memory for the next matrix.
                built, parcels[expert] = in_parcel(made(expert, np.array, np.array), put)
                return built
            built = made(expert, put, put_packs[put])
            if not in_place:
                keep_near(expert.expert, built)
            return built

        def made(expert: ExpertId, put: Put, put_pack: Put) -> Any:
            nonlocal dtype
            if form is None:
                return weights(*[put(read(expert, name, shape)) for name, shape in shapes.items()])
            if packed_for is not None:
                parts = [read(expert, name, shape) for name, shape in shapes.items()]
                return put_packed(form, put, parts)
            copies: Any = [np.array(read(expert, name, shape)) for name, shape in shapes.items()]
            dtype = np.dtype(copies[0].dtype)
            return packed(form, put_pack, weights(*copies))

        layers = tuple(
            tuple(build(ExpertId(layer, expert)) for expert in puts) for layer in range(config.num_moe_layers)
        )
        whole = by_layer(parcels, config.num_moe_layers, puts) if parcels else None
        if form is None:
            form = plain_of(layers[0][0]).for_body(config.expert_body)
        return cls(layers, form, dtype if packed_for is None else packed_for, whole)  # type: ignore[arg-type]

    def converted(self, format: ExpertFormat) -> ExpertBank:
        """Returns a bank of the same experts in another format, for activations of the same dtype.

        Both banks are in memory until this one is freed.

        Raises:
            ValueError: if the format does not have what these experts compute.
        """
        format = format.for_body(self.format.body)
        sizes = self.sizes

        @functools.cache
        def put_at(sharding: jax.sharding.Sharding) -> tuple[Put, Put]:
            put = putting(sharding)
            return put, in_blocks(put)

        parcels: dict[ExpertId, jax.Array] = {}

        def build(expert: ExpertId) -> Any:
            sharding = self._sharding_of(expert)
            put, put_pack = put_at(sharding)
            if not suits_parcels(next(iter(sharding.device_set)), format.expert_bytes(*sizes)):
                built = packed(format, put_pack, self.unpacked(expert))
                keep_near(expert.expert, built)
                return built
            built, parcels[expert] = in_parcel(packed(format, np.asarray, self.unpacked(expert)), put)
            return built

        numbers = range(self.num_experts)
        layers = tuple(
            tuple(build(ExpertId(layer, index)) for index in numbers) for layer in range(len(self.layers))
        )
        whole = by_layer(parcels, len(layers), numbers) if parcels else None
        return ExpertBank(layers, format, self.dtype, whole)

    def _sharding_of(self, expert: ExpertId) -> jax.sharding.Sharding:
        """Returns where an expert's arrays are, or are to be if they are mapped from a file."""
        first = self[expert][0] if self.parcels is None else self.parcels[expert.layer][expert.expert]
        return first.sharding if isinstance(first, jax.Array) else host_sharding(jax.devices("cpu")[0])

    def in_parcels(self) -> ExpertBank:
        """Returns a bank of the same experts, each copied as a parcel; both are in memory meanwhile."""
        found = {e: in_parcel(self[e], putting(self._sharding_of(e))) for e in self}
        count, numbers = len(self.layers), range(self.num_experts)
        layers = by_layer({expert: built for expert, (built, _) in found.items()}, count, numbers)
        parcels = by_layer({expert: parcel for expert, (_, parcel) in found.items()}, count, numbers)
        return ExpertBank(layers, self.format, self.dtype, parcels)

    @property
    def arrays_per_expert(self) -> int:
        """Number of arrays of an expert that are copied one by one."""
        return 1 if self.parcels is not None else len(self.format.buffers(*self.sizes))

    def parcel(self, expert: ExpertId) -> Any:
        """Returns an expert as it is copied to the device: its parcel, or its arrays."""
        return self[expert] if self.parcels is None else self.parcels[expert.layer][expert.expert]

    def chunks(self, expert: ExpertId) -> Sequence[jax.Array]:
        """Returns the arrays of an expert that are copied to the device, one by one."""
        return self[expert] if self.parcels is None else (self.parcel(expert),)

    def part(self, experts: range) -> ExpertBank:
        """Returns a bank of some experts of each layer, numbered from 0, in the same memory."""
        some = slice(experts.start, experts.stop)
        parcels = None if self.parcels is None else tuple(layer[some] for layer in self.parcels)
        return ExpertBank(tuple(layer[some] for layer in self.layers), self.format, self.dtype, parcels)

    def repeated(self, times: int) -> ExpertBank:
        """Returns a bank of as many times the experts, in the same memory: for timing alone."""
        parcels = None if self.parcels is None else tuple(times * layer for layer in self.parcels)
        return ExpertBank(tuple(times * layer for layer in self.layers), self.format, self.dtype, parcels)

    def __getitem__(self, expert: ExpertId) -> Any:
        return self.layers[expert.layer][expert.expert]

    def __contains__(self, expert: object) -> bool:
        return (
            isinstance(expert, ExpertId)
            and 0 <= expert.layer < len(self.layers)
            and 0 <= expert.expert < self.num_experts
        )

    def __iter__(self) -> Iterator[ExpertId]:
        for layer, experts in enumerate(self.layers):
            for index in range(len(experts)):
                yield ExpertId(layer, index)

    def views(self, expert: ExpertId) -> tuple[np.ndarray, ...]:
        """Returns NumPy views of an expert's arrays, in order; no copies if the backend shares memory."""
        return tuple(map(_view, self[expert]))

    def unpacked(self, expert: ExpertId) -> Any:
        """Returns the arrays of an expert, unpacked, in `dtype` or in that of a plain format."""
        packed = self.format.Expert(*self.views(expert))
        if isinstance(self.format, PlainFormat):
            return packed
        return weights_type(self.format.body)(
            *(np.asarray(array, self.dtype) for array in self.format.unpack(packed))
        )

    def stacked(self, layer: int, device: jax.Device | None = None) -> Any:
        """Returns one layer's experts on a device, unpacked and stacked along a leading axis E."""
        sharding = device_sharding(device)
        experts = [self.unpacked(ExpertId(layer, index)) for index in range(len(self.layers[layer]))]
        return weights_type(self.format.body)(
            *(jax.device_put(np.stack(list(arrays)), sharding) for arrays in zip(*experts, strict=True))
        )

    @property
    def num_experts(self) -> int:
        """Number of experts in a layer."""
        return len(self.layers[0])

    @property
    def sizes(self) -> tuple[int, int]:
        """D and F of the experts."""
        return self.format.sizes(self.layers[0][0])

    @property
    def expert_bytes(self) -> int:
        """Size (bytes) of one expert, in memory and on the link."""
        return self.format.expert_bytes(*self.sizes)

    @property
    def total_bytes(self) -> int:
        return self.expert_bytes * sum(len(experts) for experts in self.layers)


Put = Callable[[np.ndarray], Any]
"""Puts an array into the memory that experts are kept in."""


def by_layer(found: Mapping[ExpertId, Any], layers: int, experts: Iterable[int]) -> tuple[Any, ...]:
    """Returns what belongs to experts as `[L][E]`."""
    numbers = list(experts)
    return tuple(tuple(found[ExpertId(layer, expert)] for expert in numbers) for layer in range(layers))


def suits_parcels(device: jax.Device | None, expert_bytes: int) -> bool:
    """Whether experts go to a device as a parcel: to accelerators, unless they are large."""
    return (device or jax.devices()[0]).platform != "cpu" and expert_bytes <= MOST_BYTES


def held_experts(config: ModelConfig, partition: Partition | None) -> range:
    """Returns the experts of a layer that this process holds."""
    return range(config.num_experts) if partition is None else partition.held


def putting_each(
    config: ModelConfig, device: jax.Device | None, partition: Partition | None, in_place: bool
) -> dict[int, Callable[[np.ndarray], jax.Array | np.ndarray]]:
    """Returns what puts arrays into host memory, for each expert of a layer that this process holds.

    Args:
        config: of the model.
        device: device that all experts are copied to.
        partition: devices that each is copied to by its owner, instead.
        in_place: as of `putting`.
    """
    owners = {e: device if partition is None else partition.owner(e) for e in held_experts(config, partition)}
    puts = {owner: putting(host_sharding(owner), in_place) for owner in set(owners.values())}
    return {expert: puts[owner] for expert, owner in owners.items()}


def putting(
    sharding: jax.sharding.Sharding, in_place: bool = False
) -> Callable[[np.ndarray], jax.Array | np.ndarray]:
    """Returns what puts an array into the memory that a sharding names.

    Args:
        sharding: of the memory.
        in_place: whether an array that JAX could only copy stays as it is.
    """

    def put(array: np.ndarray) -> jax.Array | np.ndarray:
        if in_place and array.flags.c_contiguous and array.ctypes.data % ALIGNED:
            return array
        # Waits, so that the sources of unfinished copies do not accumulate in memory.
        return jax.block_until_ready(jax.device_put(array, sharding))

    return put


def keep_near(expert: int, arrays: Iterable[jax.Array | np.ndarray]) -> None:
    """Moves an expert to the NUMA node whose threads compute it, where that is possible.

    Neither files that are mapped are moved, which other processes share, nor what an accelerator's driver
    has pinned.
    """
    if numa.nodes():
        ours = [array for array in arrays if isinstance(array, jax.Array)]
        views = [_view(array) for array in ours if next(iter(array.devices())).platform == "cpu"]
        numa.keep_near(expert, views)


def in_blocks(put: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], Any]:
    """Returns what passes copies of arrays through `put`, in memory that is taken in large blocks.

    Processors read large pages faster, which few packed arrays are large enough for.
    """
    memory = Memory()

    def put_copy(array: np.ndarray) -> Any:
        copy = memory.take(array.nbytes).view(array.dtype).reshape(array.shape)
        copy[...] = array
        return put(copy)

    return put_copy


def packed(format: ExpertFormat, put: Callable[[np.ndarray], Any], matrices: Any) -> Any:
    """Returns an expert packed in a format, with each array passed through `put`.

    Raises:
        ValueError: if the packed arrays are not those that the format declares.
    """
    expert = format.Expert(*map(put, format.pack(*matrices)))  # type: ignore[arg-type]
    format.check(expert)
    return expert


def put_packed(format: ExpertFormat, put: Callable[[np.ndarray], Any], parts: Iterable[Any]) -> Any:
    """Returns an expert whose matrices are packed already, with each array passed through `put`.

    Args:
        format: of the expert.
        put: of each array.
        parts: objects with the `arrays` of a matrix, in order; biases as arrays.
    """
    arrays: list[np.ndarray] = []
    for part in parts:
        arrays += [np.asarray(part, np.float32)] if isinstance(part, np.ndarray) else part.arrays
    expert = format.Expert(*map(put, arrays))
    format.check(expert)
    return expert


def _view(matrix: jax.Array | np.ndarray) -> np.ndarray:
    """Returns a NumPy view of the array's buffer; a view of the array itself would keep any copy alive."""
    return matrix if isinstance(matrix, np.ndarray) else np.asarray(matrix.addressable_data(0))
