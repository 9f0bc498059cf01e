"""Parts that families share: norms, linear layers, feed-forward networks, stacks of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.experts import SWIGLU, ExpertBody, dense, weights_type


class ExpertParam(nnx.Param):
    """Weights of routed experts: the part of a model that may live in host memory.

    `nnx.split(model, ExpertParam, ...)` parts them from everything else.
    """


class MatrixParam(nnx.Param):
    """Weights [N, K] of a dense layer, which only products (`dense`) and look-ups of rows read.

    They may be packed: an `Int8Matrix` in the place of the array.
    """


class _NoValues(nnx.Rngs):
    """Random streams that nothing is drawn from: every weight is zero."""


def abstract(make: Callable[[nnx.Rngs], Any]) -> Any:
    """Returns a module with shapes in the place of arrays.

    Nothing random is traced: flax looks through all of the trace at every draw, which for a decoder of sixty
    layers takes half a minute.

    Args:
        make: returns the module, from random streams.
    """
    return nnx.eval_shape(lambda: make(_NoValues(0)))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: jnp.dtype, scale: float = 0.02) -> jax.Array:
    """Random weights, or zeros inside `abstract`."""
    if isinstance(rngs, _NoValues):
        return jnp.zeros(shape, dtype)
    return (scale * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


def rms_norm(x: jax.Array, scale: jax.Array | None, epsilon: float, kind: str = "rms") -> jax.Array:
    """`x / rms(x) * scale` over the last axis, in float32.

    Args:
        x: [..., N].
        scale: [N]; None for none.
        epsilon: added to the mean square.
        kind: as in `ModelConfig.norm`.
    """
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    if scale is None:
        return wide.astype(x.dtype)
    scale = jnp.broadcast_to(scale, x.shape)
    if kind == "rms":
        return scale * wide.astype(x.dtype)
    scale = scale.astype(jnp.float32)
    return (wide * (1.0 + scale if kind == "rms_offset" else scale)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with a scale of its own."""

    def __init__(self, size: int, epsilon: float, dtype: jnp.dtype, kind: str = "rms"):
        self.scale = nnx.Param((jnp.zeros if kind == "rms_offset" else jnp.ones)(size, dtype))
        self.epsilon, self.kind = epsilon, kind

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.epsilon, self.kind)


class LayerNorm(nnx.Module):
    """`(x - mean(x)) / std(x) * scale + bias` over the last axis, in float32."""

    def __init__(self, size: int, epsilon: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.bias = nnx.Param(jnp.zeros(size, dtype))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        scale, bias = (jnp.broadcast_to(p[...].astype(jnp.float32), x.shape) for p in (self.scale, self.bias))
        return (wide * scale + bias).astype(x.dtype)


def norm_of(config: ModelConfig, size: int, dtype: jnp.dtype) -> Any:
    """A norm of the kind that the layers of a model have."""
    if config.norm == "layer":
        return LayerNorm(size, config.norm_eps, dtype)
    return RMSNorm(size, config.norm_eps, dtype, config.norm)


class Linear(nnx.Module):
    """`x @ weight.T (+ bias)`, of a weight [out, in], which may be packed unless `packs` is False."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        packs: bool = True,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        self.weight = (MatrixParam if packs else nnx.Param)(normal(rngs, (outputs, inputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return project(x, self)[0]


def project(x: jax.Array, *linears: Linear) -> list[jax.Array]:
    """What each of some makes of `x`, their products in one go."""
    products = dense(x, *(linear.weight[...] for linear in linears))
    return [
        y if linear.bias is None else y + jnp.broadcast_to(linear.bias[...], y.shape)
        for y, linear in zip(products, linears, strict=True)
    ]


class GatedMLP(nnx.Module):
    """A dense feed-forward network: `(silu(x W_gate) * (x W_up)) W_down`, or with another activation."""

    def __init__(
        self,
        width: int,
        inner: int,
        *,
        body: ExpertBody = SWIGLU,
        bias: bool = False,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        self.body = body
        self.gate = Linear(width, inner, bias=bias, rngs=rngs, dtype=dtype)
        self.up = Linear(width, inner, bias=bias, rngs=rngs, dtype=dtype)
        self.down = Linear(inner, width, bias=bias, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]; gated in float32."""
        gate, up = project(x, self.gate, self.up)
        return self.down(self.body.gated(gate.astype(jnp.float32), up.astype(jnp.float32)).astype(x.dtype))


class Experts(nnx.Module):
    """The routed experts of one MoE layer, stacked along a leading axis E (`ModelConfig.expert_shapes`)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.body = config.expert_body
        for name, shape in config.expert_shapes().items():
            setattr(self, name, ExpertParam(normal(rngs, (config.num_experts, *shape), dtype)))

    def weights(self) -> Any:
        kind = weights_type(self.body)
        return kind(*(getattr(self, name)[...] for name in kind._fields))
