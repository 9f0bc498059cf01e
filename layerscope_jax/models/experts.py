"""The expert feed-forward network, for many experts at once, and the one combine.

Every path here gives each (token, choice) pair its own output row, `[T, K, D]`, and `combine` adds the K rows
of a token in one fixed order. No path adds into a shared row, so neither the place an expert is computed in
nor the order in which experts finish can change a bit of the result.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from layerscope_jax.models.matrices import Int8Matrix, plain

Activation = Literal["silu", "gelu", "gelu_tanh", "clamped"]


@dataclass(frozen=True)
class ExpertBody:
    """What an expert computes between and beside its three products.

    Attributes:
        activation: of the gate: "silu"; "gelu" (exact); "gelu_tanh" (its approximation); "clamped", gpt-oss's
            `(clip(up) + 1) * clip(gate) * sigmoid(1.702 * clip(gate))`, in which the gate is clipped from
            above and `up` on both sides.
        bias: whether the three products have biases.
        limit: of "clamped": where it clips.
    """

    activation: Activation = "silu"
    bias: bool = False
    limit: float = 7.0

    def gated(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """Returns the hidden row of an expert from both its float32 products.

        >>> ExpertBody().gated(jnp.array([0.0, 1.0]), jnp.array([1.0, 2.0]))
        Array([0.       , 1.4621172], dtype=float32)
        """
        if self.activation == "clamped":
            gate = jnp.minimum(gate, self.limit)
            return (jnp.clip(up, -self.limit, self.limit) + 1) * gate * jax.nn.sigmoid(CLAMPED_SLOPE * gate)
        if self.activation == "silu":
            return jax.nn.silu(gate) * up
        return jax.nn.gelu(gate, approximate=self.activation == "gelu_tanh") * up


CLAMPED_SLOPE = 1.702
"""What the gate is multiplied with in the sigmoid of a clamped expert."""

SWIGLU = ExpertBody()
"""What the experts of most families compute."""


class ExpertWeights(NamedTuple):
    """Three matrices of one expert, or of a stack of them (a leading axis E), as checkpoints hold them."""

    gate: Any  # [..., F, D]
    up: Any  # [..., F, D]
    down: Any  # [..., D, F]


class BiasedWeights(NamedTuple):
    """An expert, or a stack of them, whose products have biases: those of gate, up and down in a row."""

    gate: Any  # [..., F, D]
    up: Any  # [..., F, D]
    down: Any  # [..., D, F]
    bias: Any  # [..., 2 F + D]


def weights_type(body: ExpertBody) -> Any:
    """Returns the class of an expert's weights: `BiasedWeights`, or `ExpertWeights` without biases."""
    return BiasedWeights if body.bias else ExpertWeights


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Products of the rows of `x` [..., K] with those of `w` [N, K]: [..., N] in the dtype of `x`.

    Sums are kept in float32 whatever the inputs, and rounded once. Asking for that is also what keeps XLA off
    its slow bfloat16 path on CPUs; and contracting the last axes of both is what lets it read `w` as it lies:
    of `x @ w.T` it makes a copy of bfloat16 weights in every step.
    """
    return products_of_rows(x, w).astype(x.dtype)


def matmuls(x: jax.Array, *weights: jax.Array | Int8Matrix) -> list[jax.Array]:
    return [matmul(x, plain(one)) for one in weights]


_products: ContextVar[Callable[..., list[jax.Array]]] = ContextVar("products", default=matmuls)


def dense(x: jax.Array, *weights: jax.Array | Int8Matrix) -> list[jax.Array]:
    """`matmul` of `x` [..., K] with each of a layer's own weights [N, K], or what `products_by` set."""
    return _products.get()(x, *weights)


@contextlib.contextmanager
def products_by(products: Callable[..., list[jax.Array]]) -> Iterator[None]:
    """While a program is traced within, its `dense` products are these."""
    before = _products.set(products)
    try:
        yield
    finally:
        _products.reset(before)


def ffn(x: jax.Array, weights: ExpertWeights | BiasedWeights, body: ExpertBody = SWIGLU) -> jax.Array:
    """An expert's output: `(silu(x W_gate) * (x W_up)) W_down`, or what its body has in the place of SwiGLU.

    Args:
        x: [..., M, D].
        weights: of one expert, or of stacks with the same leading axes.
        body: activation, and whether `weights` have biases.

    Returns:
        [..., M, D] in the dtype of `x`; sums, biases and activation are in float32.
    """
    gate, up = _sums(x, weights.gate), _sums(x, weights.up)
    if not isinstance(weights, BiasedWeights):
        return _sums(body.gated(gate, up).astype(x.dtype), weights.down).astype(x.dtype)
    width, inner = x.shape[-1], gate.shape[-1]
    bias = weights.bias.astype(jnp.float32)[..., None, :]  # [..., 1, 2 F + D]
    gate = gate + jnp.broadcast_to(bias[..., :inner], gate.shape)
    up = up + jnp.broadcast_to(bias[..., inner:-width], up.shape)
    down = _sums(body.gated(gate, up).astype(x.dtype), weights.down)
    return (down + jnp.broadcast_to(bias[..., -width:], down.shape)).astype(x.dtype)


def _sums(x: jax.Array, weights: jax.Array) -> jax.Array:
    """`products_of_rows`, of two dtypes or of one."""
    if x.dtype != weights.dtype:
        x, weights = x.astype(jnp.float32), weights.astype(jnp.float32)
    return products_of_rows(x, weights)


def products_of_rows(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Of `x` [..., M, K] and `weights` [N, K], or [..., N, K] with the same leading axes: [..., M, N]."""
    batch = tuple(range(weights.ndim - 2))
    axes = ((x.ndim - 1,), (weights.ndim - 1,)), (batch, batch)
    return jax.lax.dot_general(x, weights, axes, preferred_element_type=jnp.float32)


def combine(hidden: jax.Array, outputs: jax.Array, weights: jax.Array) -> jax.Array:
    """Adds a token's weighted expert outputs to its hidden state, choice by choice.

    Args:
        hidden: [T, D] the residual stream.
        outputs: [T, K, D] unweighted expert outputs.
        weights: [T, K] router weights, float32.

    >>> combine(jnp.zeros((1, 2)), jnp.ones((1, 3, 2)), jnp.array([[0.5, 0.25, 0.25]]))
    Array([[1., 1.]], dtype=float32)
    """
    total = jnp.zeros(hidden.shape, jnp.float32)
    for choice in range(outputs.shape[1]):
        total += weights[:, choice, None] * outputs[:, choice].astype(jnp.float32)
    return hidden + total.astype(hidden.dtype)


def block_rows(assignments: int, num_experts: int, most: int = 64) -> int:
    """Rows of a block in `stacked_ffn`: about half an expert's mean share, a power of two in 2..`most`.

    Larger blocks read each expert's weights fewer times; smaller ones waste fewer padded rows. One row is
    avoided: XLA's CPU matrix-vector product is several times slower than the product with two rows.
    """
    share = max(1, assignments // (2 * num_experts))
    return min(most, max(2, 1 << (share.bit_length() - 1)))


@functools.partial(jax.jit, inline=True, static_argnames="body")
def stacked_ffn(
    x: jax.Array, experts: jax.Array, weights: ExpertWeights | BiasedWeights, body: ExpertBody = SWIGLU
) -> jax.Array:
    """Output of every token's chosen experts, all experts resident in one stack; differentiable.

    Sorts the T x K assignments by expert and pads each expert's rows to whole blocks, so that the work is one
    batched product over blocks of equal size and no token is dropped (the block layout of MegaBlocks,
    arXiv 2211.15841).

    Args:
        x: [T, D] inputs of the experts.
        experts: [T, K] chosen experts, int32 in 0..E-1.
        weights: stacks with a leading axis E.
        body: of the experts.

    Returns:
        [T, K, D] unweighted outputs.
    """
    tokens, choices = experts.shape
    num_experts = weights.gate.shape[0]
    assignments = tokens * choices
    rows = block_rows(assignments, num_experts)
    # sum over experts of ceil(n_e / rows) can not pass either of these.
    blocks = min(assignments, (assignments + num_experts * (rows - 1)) // rows)

    chosen = experts.reshape(-1)  # [A]
    # Expert and index in one key: XLA's CPU sort of plain integers is five times faster than argsort.
    packed = jnp.sort(chosen * assignments + jnp.arange(assignments, dtype=jnp.int32))
    in_order, order = packed // assignments, packed % assignments
    counts = jnp.bincount(chosen, length=num_experts)
    blocks_of = (counts + rows - 1) // rows
    last_block = jnp.cumsum(blocks_of)
    first_row = (last_block - blocks_of) * rows
    first_rank = jnp.cumsum(counts) - counts
    row_in_order = first_row[in_order] + jnp.arange(assignments) - first_rank[in_order]
    row_of = jnp.zeros(assignments, jnp.int32).at[order].set(row_in_order.astype(jnp.int32))
    source = jnp.full(blocks * rows, assignments, jnp.int32).at[row_of].set(jnp.arange(assignments))
    expert_of = jnp.searchsorted(last_block, jnp.arange(blocks), side="right")
    expert_of = jnp.minimum(expert_of, num_experts - 1)  # blocks past the last one hold only padding

    padded = _spread(x, source, row_of, choices).reshape(blocks, rows, -1)
    outputs = _of_blocks(padded, weights, expert_of, body)
    return _collect(outputs.reshape(blocks * rows, -1), source, row_of).reshape(tokens, choices, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _of_blocks(
    x: jax.Array, weights: ExpertWeights | BiasedWeights, expert_of: jax.Array, body: ExpertBody
) -> jax.Array:
    """Output of each block of rows `x` [N, M, D] by its expert `expert_of` [N]: [N, M, D]."""
    together = functools.partial(_together, body)
    if weights.gate.dtype != jnp.float32:
        return together(x, weights, expert_of)
    one_by_one = functools.partial(_one_by_one, body)
    return jax.lax.platform_dependent(x, weights, expert_of, cpu=one_by_one, default=together)


def _together(body: ExpertBody, x: jax.Array, weights: Any, expert_of: jax.Array) -> jax.Array:
    """As one batched product, for which each block's weights are copied."""
    return ffn(x, jax.tree.map(lambda w: w[expert_of], weights), body)


def _one_by_one(body: ExpertBody, x: jax.Array, weights: Any, expert_of: jax.Array) -> jax.Array:
    """As one product after the other, which reads the weights where they lie.

    On CPUs in float32 this takes a fifth to a half of the time of `_together`, whose copies are written and
    read again. In bfloat16 it does not: XLA then converts the whole stack before it begins.
    """

    def block(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, expert = args
        pick = functools.partial(jax.lax.dynamic_index_in_dim, index=expert, keepdims=False)
        return ffn(rows, jax.tree.map(pick, weights), body)

    return jax.lax.map(block, (x, expert_of))


def _of_blocks_forward(x: jax.Array, weights: Any, expert_of: jax.Array, body: ExpertBody):
    # Backwards, one by one would add each block's gradient to one of the whole stack.
    return jax.vjp(lambda x, weights: _together(body, x, weights, expert_of), x, weights)


def _of_blocks_backward(body: ExpertBody, pull: Callable[[jax.Array], tuple[Any, Any]], grad: jax.Array):
    return *pull(grad), None


_of_blocks.defvjp(_of_blocks_forward, _of_blocks_backward)


# Both moves below are permutations with padding. XLA would differentiate a gather into a scatter-add, which
# its CPU backend runs row by row; a permutation's transpose is the inverse permutation, again a gather.


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of `x`; zeros where the index is past its end (padding)."""
    return x.at[rows].get(mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x: jax.Array, source: jax.Array, row_of: jax.Array, choices: int) -> jax.Array:
    return _take(x, source // choices)  # padding's source is T * K, so its token is T: past the end


def _spread_forward(x: jax.Array, source: jax.Array, row_of: jax.Array, choices: int):
    return _spread(x, source, row_of, choices), row_of


def _spread_backward(choices: int, row_of: jax.Array, grad: jax.Array):
    return grad[row_of].reshape(-1, choices, grad.shape[-1]).sum(1), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _collect(rows: jax.Array, source: jax.Array, row_of: jax.Array) -> jax.Array:
    return rows[row_of]


def _collect_forward(rows: jax.Array, source: jax.Array, row_of: jax.Array):
    return _collect(rows, source, row_of), source


def _collect_backward(source: jax.Array, grad: jax.Array):
    return _take(grad, source), None, None


_collect.defvjp(_collect_forward, _collect_backward)
