"""What experts compute between their products, in compiled loops: biases and activations of rows of sums.

An activation is a number at run time, and chosen once a row: one form of a loop computes experts of any body.
"""

from __future__ import annotations

from typing import get_args

import numpy as np

from layerscope_jax.kernels.numbers import ONE, as_input, exp, rounded, silu, widened
from layerscope_jax.models.experts import CLAMPED_SLOPE, Activation, ExpertBody
from layerscope_jax.support.njit import njit

ACTIVATIONS: tuple[str, ...] = get_args(Activation)
SILU, GELU, GELU_TANH, CLAMPED = map(ACTIVATIONS.index, ("silu", "gelu", "gelu_tanh", "clamped"))

# The upper tail of the normal distribution: Q(t) = e^(-t^2 / 2) times a polynomial, without a constant, of
# w = 1 / (1 + NEARER t). It was fitted to erfc over 0 <= t <= FAR, where its relative error is 2e-8.
FAR, NEARER, HALF, NOTHING = np.float32(15), np.float32(0.21), np.float32(0.5), np.float32(0)
Q1, Q2, Q3 = np.float32(0.0837184748), np.float32(0.0849594918), np.float32(0.0699269870)
Q4, Q5, Q6 = np.float32(0.1221379617), np.float32(-0.0877530527), np.float32(0.3407401145)
Q7, Q8, Q9 = np.float32(-0.3228639179), np.float32(0.2800783831), np.float32(-0.0709444310)

# tanh(u) = 2 / (1 + e^(-2u)) - 1, and 2u = x (LINEAR + CUBIC x^2).
LINEAR, CUBIC = np.float32(1.5957691216), np.float32(0.0713548163)
SLOPE = np.float32(CLAMPED_SLOPE)


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def gelu(x):
    """`x` times the normal distribution's share below it, of a float32: `max(x, 0) - |x| Q(|x|)`."""
    t = abs(x)
    if t > FAR:
        t = FAR
    w = ONE / (ONE + NEARER * t)
    p = (((Q9 * w + Q8) * w + Q7) * w + Q6) * w + Q5
    p = (((p * w + Q4) * w + Q3) * w + Q2) * w + Q1
    above = x if x > NOTHING else NOTHING
    return above - t * (p * w * exp(-HALF * t * t))


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def gelu_tanh(x):
    """The approximation of `gelu` by tanh, of a float32."""
    return x / (ONE + exp(-x * (LINEAR + CUBIC * x * x)))


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def clamped(gate, up, limit):
    """gpt-oss's gated number, of two float32: `ExpertBody.gated`."""
    if gate > limit:
        gate = limit
    if up > limit:
        up = limit
    if up < -limit:
        up = -limit
    return (up + ONE) * gate / (ONE + exp(-SLOPE * gate))


@njit(cache=True, nogil=True)
def gate_row(gates, ups, count, activation, limit):
    """A row of gated numbers, in the place of `gates`, of any activation but silu."""
    if activation == CLAMPED:
        for f in range(np.uint64(count)):
            gates[f] = clamped(gates[f], ups[f], limit)
    elif activation == GELU:
        for f in range(np.uint64(count)):
            gates[f] = gelu(gates[f]) * ups[f]
    else:
        for f in range(np.uint64(count)):
            gates[f] = gelu_tanh(gates[f]) * ups[f]


@njit(cache=True, nogil=True)
def activate(gates, ups, inner, outputs, weights, activation, limit):
    """A row of gated numbers, rounded to the type of `outputs`, as an input of products with `weights`.

    `gates` may be overwritten. Of an index that may be negative the compiler makes no vectors.

    Args:
        gates, ups: sums in float32.
        inner: is written.
        activation: one of the numbers above.
        limit: of `clamped`, float32.
    """
    if activation == SILU:
        for f in range(np.uint64(len(inner))):
            inner[f] = as_input(rounded(silu(gates[f]) * ups[f], outputs), weights)
        return
    gate_row(gates, ups, len(inner), activation, limit)
    for f in range(np.uint64(len(inner))):
        inner[f] = as_input(rounded(gates[f], outputs), weights)


@njit(cache=True, nogil=True)
def biases(address, width, hidden):
    """How many biases an expert has: none where their address is 0."""
    return 2 * hidden + width if address else 0


@njit(cache=True, nogil=True)
def add_bias(sums, bias, first, last):
    """Adds a part of an expert's biases to each row of sums; nothing where the expert has none.

    Args:
        sums: [M, N] float32, N at least `last - first`.
        bias: [2 F + D] of the type of weights, or [0].
        first, last: where the part begins and ends.
    """
    if len(bias) == 0:
        return
    part = bias[first:last]
    for m in range(len(sums)):
        row = sums[m]
        for n in range(np.uint64(len(part))):
            row[n] += widened(part[n])


def facts_of(body: ExpertBody) -> tuple[int, np.float32]:
    """Returns what loops are told of a body: the number of its activation, and its limit.

    >>> facts_of(ExpertBody("clamped"))
    (3, np.float32(7.0))
    """
    return ACTIVATIONS.index(body.activation), np.float32(body.limit)
