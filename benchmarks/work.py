"""The least time of a step's work, part by part: its arithmetic or its reading, whichever takes longer.

At the rates that this machine reaches in a plain product and in plain reading. Copies to a device are no
work, nor are dispatch, planning and books.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bench_host_experts import Reading
from layerscope_jax import ModelConfig
from layerscope_jax.models.cache import cache_bytes
from layerscope_jax.models.experts import matmul
from layerscope_jax.support.machine import cores


@dataclass(frozen=True)
class Rates:
    """What this machine's CPU does at its best.

    Attributes:
        flops: of a large product a second, in the dtype in which that is faster.
        bytes: read from memory a second.
    """

    flops: float
    bytes: float

    @classmethod
    def measured(cls, quick: bool = False) -> Rates:
        size = 128 if quick else 1024
        device = jax.devices("cpu")[0]
        product, best = jax.jit(matmul), np.inf
        for dtype in (jnp.float32, jnp.bfloat16):
            one = jnp.ones((size, size), dtype, device=device)
            jax.block_until_ready(product(one, one))
            for _ in range(7):
                began = time.perf_counter()
                jax.block_until_ready(product(one, one))
                best = min(best, time.perf_counter() - began)
        reading = Reading(cores(), 16 if quick else 256).rates(7)
        return cls(2 * size**3 / best, 1e9 * max(reading))


@dataclass(frozen=True)
class Step:
    """A forward pass, or several that prefill a batch in parts.

    Attributes:
        rows, width: B, S: requests, and tokens of each.
        context: positions that each attends to.
        experts: that are read, all layers and passes together.
        passes: how many.
    """

    rows: int
    width: int
    context: int
    experts: int
    passes: int = 1

    def seconds(
        self, config: ModelConfig, itemsize: int, cache_itemsize: int, rates: Rates
    ) -> dict[str, float]:
        """Of each part: "dense" (projections, routers, head), "attention", "experts".

        Args:
            config: of the model.
            itemsize: bytes of a weight.
            cache_itemsize: bytes of a number in a cache.
            rates: of the machine.
        """
        layers, hidden, width = config.num_layers, config.hidden_size, config.num_heads * config.head_dim
        kept = config.num_kv_heads * config.head_dim  # of keys, and of values
        tokens = self.rows * self.width
        moe = config.num_moe_layers
        all_layers = hidden * (layers * (2 * width + 2 * kept) + moe * config.num_experts)
        all_layers += 3 * hidden * (config.intermediate_size or 0) * (layers - moe)
        head = hidden * config.vocab_size

        def longer(operations: float, read: float) -> float:
            return max(operations / rates.flops, read / rates.bytes)

        return {
            "dense": longer(
                2 * (tokens * all_layers + self.rows * head),
                self.passes * itemsize * (all_layers + head),
            ),
            "attention": longer(
                4 * tokens * self.context * width * layers,
                cache_bytes(config, self.rows, self.context, cache_itemsize),
            ),
            "experts": longer(
                6 * tokens * moe * config.experts_per_token * hidden * config.moe_intermediate_size,
                self.experts * config.expert_bytes(itemsize),
            ),
        }
