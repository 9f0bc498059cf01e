"""The host tier: every routed expert of a model, in pinned host memory, never written after load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.experts import ExpertWeights
from layerscope_jax.scheduling.plan import ExpertId


def host_sharding(device: jax.Device | None = None) -> jax.sharding.Sharding:
    """Pinned host memory beside `device` (the default device if None): copies from it are asynchronous."""
    return jax.sharding.SingleDeviceSharding(device or jax.devices()[0], memory_kind="pinned_host")


def device_sharding(device: jax.Device | None = None) -> jax.sharding.Sharding:
    """The memory of `device` itself (the default device if None)."""
    return jax.sharding.SingleDeviceSharding(device or jax.devices()[0], memory_kind="device")


@dataclass(frozen=True)
class ExpertBank:
    """All routed experts in host memory; three separate arrays each, so that each crosses the link alone.

    One copy in RAM serves both tiers of computing: `weights` is what is copied to the device, `views` are
    NumPy views of the same buffers for the host's kernels.

    Attributes:
        layers: [L][E] weights of each expert, L the MoE layers, in `pinned_host` memory.

    >>> config = ModelConfig(family="olmoe", vocab_size=32, hidden_size=8, num_layers=2, num_heads=2,
    ...     num_kv_heads=1, head_dim=4, num_experts=4, experts_per_token=2, moe_intermediate_size=4,
    ...     normalize_top_k=True)
    >>> bank = ExpertBank.build(config, lambda expert, name, shape: np.zeros(shape, np.float32))
    >>> bank[ExpertId(1, 3)].down.shape, bank[ExpertId(1, 3)].down.sharding.memory_kind
    ((4, 8), 'pinned_host')
    >>> bank.expert_bytes, bank.total_bytes
    (384, 3072)
    """

    layers: tuple[tuple[ExpertWeights, ...], ...]

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        read: Callable[[ExpertId, str, tuple[int, int]], np.ndarray],
        device: jax.Device | None = None,
    ) -> ExpertBank:
        """Fills a bank matrix by matrix from `read(expert, "gate" | "up" | "down", shape)`.

        Only one matrix at a time exists beside its pinned copy. On a CPU the bank may share the memory of the
        array that `read` returns, which must not be written afterwards.
        """
        sharding = host_sharding(device)

        def matrix(expert: ExpertId, name: str, shape: tuple[int, int]) -> jax.Array:
            # Blocking here keeps the sources of unfinished copies from piling up in memory.
            return jax.block_until_ready(jax.device_put(read(expert, name, shape), sharding))

        shapes = config.expert_shapes()
        return cls(
            tuple(
                tuple(
                    ExpertWeights(**{name: matrix(ExpertId(layer, e), name, s) for name, s in shapes.items()})
                    for e in range(config.num_experts)
                )
                for layer in range(config.num_moe_layers)
            )
        )

    def __getitem__(self, expert: ExpertId) -> ExpertWeights:
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
        """NumPy views of an expert's buffers (gate, up, down): no copy where the backend shares memory."""
        return tuple(map(_view, self[expert]))

    def stacked(self, layer: int, device: jax.Device | None = None) -> ExpertWeights:
        """A copy on the device of one layer's experts as [E, D, F], [E, D, F], [E, F, D]."""
        sharding = device_sharding(device)
        return ExpertWeights(
            *(
                jax.device_put(np.stack(list(map(_view, name))), sharding)
                for name in zip(*self.layers[layer], strict=True)
            )
        )

    @property
    def num_experts(self) -> int:
        """Experts in a layer."""
        return len(self.layers[0])

    @property
    def dtype(self) -> jnp.dtype:
        return self.layers[0][0].gate.dtype

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's three matrices."""
        return sum(matrix.nbytes for matrix in self.layers[0][0])

    @property
    def total_bytes(self) -> int:
        return self.expert_bytes * sum(len(experts) for experts in self.layers)


def _view(matrix: jax.Array) -> np.ndarray:
    """Of the array's only buffer. An array itself would keep what a backend had to copy for NumPy."""
    return np.asarray(matrix.addressable_data(0))
