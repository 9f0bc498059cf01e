"""A lower bound on the time of a run, whatever the policy.

It is the Lagrangian dual of a relaxation. A run's layers t = (s, l), one after the other, take

    time_t >= other + max(device_t, host_t)

with device_t the sum of device_ms(n) over the experts computed on the device and host_t that of host_ms(n)
over the others. What is computed on the device must be present: kept since the layer's last turn, or copied
since. Every plan that `check_plan` lets through, run by any engine with one link, one device and one host
that each do one thing at a time, keeps to

    for each t: transfer_ms * (experts copied for turns up to t) <= time_1 + ... + time_t       price m_t
    for each t: present in layer l at t, and kept in all other layers then <= slots             price v_t
    max(device_t, host_t) >= (1 - x) host_t + x device_t for any x in 0..1                      share x_t

Relaxed are: experts may be copied and computed in parts at no loss; a copy takes no room before its turn and
may be begun before anything is known of it; the order of work within a layer; waiting of any kind. Whatever
prices m, v >= 0 and shares x are taken, the least of

    time_1 + time_2 + ... + prices times what exceeds the constraints

over all schedules is no more than the true least time, since a true schedule exceeds nothing. That least
parts into one small shortest path for each expert, from step to step, over "present" and "absent". Good
prices are found by gradient ascent, but the value is a lower bound at any. With few experts in a layer the
third constraint is not used: every way to share the layer out is looked at, and that what is computed on the
device is present has a price instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.geometry import of_part
from layerscope_jax.scheduling.plan import ExpertId, Geometry
from layerscope_jax.support.jax_settings import with_promotion

ROUNDS = 1000

FEW = 8
"""Maximum number of experts of a layer for which every assignment is tried, without fractions of experts."""


def lower_bound_ms(
    counts: np.ndarray,
    tokens: int | Sequence[int],
    geometry: Geometry,
    costs: HardwareProfile,
    resident: Iterable[ExpertId] | None = None,
    rounds: int = ROUNDS,
) -> float:
    """Returns a lower bound on the time (ms) of all steps together under any policy; see the module.

    Args:
        counts: [S, L, E] tokens routed to each expert.
        tokens: tokens of every step, or of each.
        geometry: geometry of the model, with the budget's slots.
        costs: of the machine.
        resident: experts on the device at the beginning; None for the best choice.
        rounds: rounds of gradient ascent on the prices; more rounds raise the bound and never make it wrong.

    Raises:
        ValueError: if `counts` does not fit `geometry`.
    """
    problem, unit = problem_of(counts, tokens, geometry, costs, resident)
    # Double precision: rounding must not lift a bound above the truth.
    with jax.enable_x64(True), with_promotion():
        arrays = {name: jnp.asarray(part) for name, part in problem.items()}
        return unit * float(_best(arrays, rounds, geometry.num_experts <= FEW))


def problem_of(
    counts: np.ndarray,
    tokens: int | Sequence[int],
    geometry: Geometry,
    costs: HardwareProfile,
    resident: Iterable[ExpertId] | None = None,
) -> tuple[dict[str, np.ndarray], float]:
    """Returns what the dual function is of, and its unit of time (ms); arguments as of `lower_bound_ms`."""
    if counts.ndim != 3 or counts.shape[1:] != (geometry.num_layers, geometry.num_experts):
        raise ValueError(
            f"expected counts [S, {geometry.num_layers}, {geometry.num_experts}] of the geometry, "
            f"got {list(counts.shape)}"
        )
    steps, layers, experts = counts.shape
    # If parts slow each other down, the shorter of both times is the bound.
    ways = [costs] if costs.alone is None else [costs, costs.alone]
    table = lambda times: np.array([0.0] + [times(n) for n in range(1, int(counts.max()) + 1)])  # noqa: E731
    present = np.full((layers, experts), resident is None)
    for layer, expert in resident or ():
        present[layer, expert] = True
    # In units of an average layer's host time, so that one learning rate serves all machines.
    host = np.min([table(way.host_ms) for way in ways], 0)[counts]
    device = np.min([table(way.device_ms) for way in ways], 0)[counts]
    each = [tokens] * steps if isinstance(tokens, int) else tokens
    other = np.array([min(way.layer_ms(count) for way in ways) for count in each])
    unit = max(1e-9, float(host.sum()) / (steps * layers))
    problem = {
        "host": host / unit,
        "device": device / unit,
        "other": other[:, None] / unit,
        "transfer": np.float64(min(way.transfer_ms for way in ways) / unit),
        "slots": np.float64(geometry.slots),
        "present": present,
    }
    return problem, unit


def least_decode_s(
    demand: Sequence[dict[int, int]], geometry: Geometry, costs: HardwareProfile, devices: int = 1
) -> float:
    """Returns a lower bound on the time (s) of decode steps under any policy.

    Args:
        demand: recorded demand of each layer of each step.
        geometry: geometry of the model and of the budget of a device.
        costs: of the machine.
        devices: how many share the experts; together they take no less than the one that, with the whole
            host for itself, takes longest.
    """
    layers, experts = geometry.num_layers, geometry.num_experts
    counts = np.zeros((len(demand) // layers, layers, experts), int)
    for turn, tokens in enumerate(demand):
        counts[turn // layers, turn % layers, list(tokens)] = list(tokens.values())
    each = counts[:, 0].sum(1) // geometry.experts_per_token
    parts, own = np.split(counts, devices, axis=-1), of_part(geometry, experts // devices)
    costs = costs.alone or costs
    return max(lower_bound_ms(part, each.tolist(), own, costs) for part in parts) / 1e3


Prices = dict[str, jax.Array]
"""`link` [S, L]: m summed from each t to the end, falling, within 0..1; `room` [S, L]: v; `share` [S, L]: x,
or `presence` [S, L, E] if every assignment of a layer is tried."""


def value(
    problem: dict[str, jax.Array], prices: Prices, paths: Callable[..., jax.Array] | None = None
) -> jax.Array:
    """Returns the value of the dual function.

    Args:
        problem: of `problem_of`.
        prices: of the constraints.
        paths: gives the least costs of experts; those of who knows the future if None.
    """
    weight, room = 1.0 - prices["link"], prices["room"]
    if "share" in prices:
        share = prices["share"]
        absent = (weight * (1.0 - share))[:, :, None] * problem["host"]
        present = jnp.minimum((weight * share)[:, :, None] * problem["device"], absent)
        layers = weight * problem["other"]
    else:
        presence = prices["presence"]
        absent, present = jnp.zeros_like(presence), -presence
        on_device = jnp.asarray(_subsets(presence.shape[-1]))  # [2^E, E]
        device = problem["device"] @ on_device.T  # [S, L, 2^E]
        host = problem["host"] @ (1.0 - on_device).T
        ways = weight[:, :, None] * jnp.maximum(device, host) + presence @ on_device.T
        layers = weight * problem["other"] + ways.min(-1)
    least = (paths or _paths)(problem, prices, absent, present)
    return layers.sum() + least.sum() - problem["slots"] * room.sum()


def _subsets(experts: int) -> np.ndarray:
    """Returns every set of experts as a row [2^E, E] of ones and zeros."""
    return ((np.arange(2**experts)[:, None] >> np.arange(experts)) & 1).astype(np.float64)


def _paths(problem: dict[str, jax.Array], prices: Prices, absent: jax.Array, present: jax.Array) -> jax.Array:
    """Returns the least cost [L, E] of each expert over all steps, if a turn costs `absent` or `present`."""
    room = prices["room"]
    # Keeping an expert of layer l from its turn in step s to that in s + 1 takes room in the turns between.
    until = jnp.cumsum(room, 1)
    before = until - room
    after = until[:, -1:] - until
    keep = after + jnp.concatenate([before[1:], jnp.zeros_like(room[:1])])

    def turn(later: tuple[jax.Array, jax.Array], now: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
        """Returns the least cost from this turn on, for experts absent and for experts present before it."""
        gone, held = later
        absent, present, copy, room, keep = now
        through = room[:, None] + present + jnp.minimum(gone, keep[:, None] + held)
        without = absent + gone
        return (jnp.minimum(without, copy[:, None] + through), jnp.minimum(without, through)), None

    nothing = jnp.zeros_like(absent[0])
    turns = (absent, present, problem["transfer"] * prices["link"], room, keep)
    (gone, held), _ = jax.lax.scan(turn, (nothing, nothing), turns, reverse=True)
    return jnp.where(problem["present"], jnp.minimum(gone, before[0][:, None] + held), gone)


@functools.partial(jax.jit, static_argnames=("rounds", "whole"))
def _best(problem: dict[str, jax.Array], rounds: int, whole: bool) -> jax.Array:
    """Returns the highest value of the dual function during gradient ascent."""
    steps, layers, experts = problem["host"].shape
    shape = (steps, layers)

    def prices(raw: dict[str, jax.Array]) -> Prices:
        # The prices m_t add up to at most one.
        parts = jax.nn.softmax(jnp.append(raw["link"].reshape(-1), raw["idle"]))[:-1]
        link = jnp.minimum(jnp.cumsum(parts[::-1])[::-1].reshape(shape), 1.0)
        positive = {"link": link, "room": jnp.exp(raw["room"])}
        if "share" in raw:
            return positive | {"share": jax.nn.sigmoid(raw["share"])}
        return positive | {"presence": problem["host"] * jax.nn.sigmoid(raw["presence"])}

    raw = {
        "link": jnp.full(shape, -jnp.log(steps * layers)),
        "idle": jnp.ones(()),
        "room": jnp.full(shape, jnp.log(0.05 / layers)),
    }
    if whole:
        raw["presence"] = jnp.zeros((*shape, experts))
    else:
        raw["share"] = jnp.zeros(shape)
    return highest(lambda raw: value(problem, prices(raw)), raw, rounds)


def highest(value_of: Callable[[Any], jax.Array], raw: Any, rounds: int) -> jax.Array:
    """Returns the highest value of a dual function of `raw`, which prices are made of, by gradient ascent."""
    update = optax.adam(optax.cosine_decay_schedule(0.1, rounds))

    def climb(carry: Any, _: None) -> tuple[Any, None]:
        raw, state, best = carry
        loss, slope = jax.value_and_grad(lambda raw: -value_of(raw))(raw)
        changes, state = update.update(slope, state)
        return (optax.apply_updates(raw, changes), state, jnp.maximum(-loss, best)), None

    (_, _, best), _ = jax.lax.scan(climb, (raw, update.init(raw), jnp.array(-jnp.inf)), length=rounds)
    return best
