"""What no policy can beat: Belady's hit rate, and a lower bound on the time of a run.

The bound is the Lagrangian dual of a relaxation. A run's layers t = (s, l), one after the other, take

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
prices are found by gradient ascent, but the value is a lower bound at any.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.plan import ExpertId, Geometry

ROUNDS = 1000


def belady_hit_rate(counts: np.ndarray, slots: int, resident: Iterable[ExpertId] = ()) -> float:
    """Highest hit rate that any replacement can reach, if nothing is copied before it is asked for.

    What is needed again farthest in the future leaves (Belady, "A study of replacement algorithms for a
    virtual-storage computer", IBM Systems Journal 5(2), 1966). Here a whole layer is asked for at a time, and
    what was asked for need not be kept: after each layer's turn, of the experts that were there and those
    that were asked for, the ones stay whose next use comes soonest.

    Args:
        counts: [S, L, E] tokens routed to each expert.
        slots: how many experts the budget holds.
        resident: experts on the device at the beginning.

    Returns:
        Active experts that are resident when their layer's turn comes, by all active experts; 1 if none is.

    >>> counts = np.array([[[1, 0, 0]], [[0, 1, 1]], [[1, 0, 1]]])  # one layer, three steps
    >>> belady_hit_rate(counts, slots=1), belady_hit_rate(counts, slots=2)
    (0.2, 0.4)
    """
    steps, layers, experts = counts.shape
    never = steps * layers
    # The turn of each expert's next use, from every step on.
    turn = np.arange(never).reshape(steps, layers, 1)
    uses = np.concatenate([np.where(counts > 0, turn, never), np.full((1, layers, experts), never)])
    following = np.minimum.accumulate(uses[::-1])[::-1]
    kept: dict[tuple[int, int], int] = {}
    farthest: list[
        tuple[int, tuple[int, int]]
    ] = []  # heap; entries that `kept` disagrees with are out of date

    def keep(expert: tuple[int, int], use: int) -> None:
        if use < never:
            kept[expert] = use
            heapq.heappush(farthest, (-use, expert))

    def shrink() -> None:
        while len(kept) > slots:
            use, expert = heapq.heappop(farthest)
            if kept.get(expert) == -use:
                del kept[expert]

    for layer, expert in set(resident):
        keep((layer, expert), int(following[0, layer, expert]))
    shrink()
    hits = asked = 0
    for step, layer in np.ndindex(steps, layers):
        for expert in np.flatnonzero(counts[step, layer]).tolist():
            asked += 1
            hits += kept.pop((layer, expert), None) is not None
            keep((layer, expert), int(following[step + 1, layer, expert]))
        shrink()
    return hits / asked if asked else 1.0


def lower_bound_ms(
    counts: np.ndarray,
    tokens: int,
    geometry: Geometry,
    costs: HardwareProfile,
    resident: Iterable[ExpertId] | None = None,
    rounds: int = ROUNDS,
) -> float:
    """Least time that any policy could take for all steps together, in milliseconds; see the module.

    Args:
        counts: [S, L, E] tokens routed to each expert.
        tokens: of a step.
        geometry: of the model, with the budget's slots.
        costs: of the machine.
        resident: experts on the device at the beginning; None for those that it would be best to have.
        rounds: of gradient ascent on the prices; more make the bound higher, never wrong.

    Raises:
        ValueError: if `counts` is of another geometry.
    """
    if counts.ndim != 3 or counts.shape[1:] != (geometry.num_layers, geometry.num_experts):
        raise ValueError(
            f"expected counts [S, {geometry.num_layers}, {geometry.num_experts}] of the geometry, "
            f"got {list(counts.shape)}"
        )
    steps, layers, experts = counts.shape
    table = lambda times: np.array([0.0] + [times(n) for n in range(1, int(counts.max()) + 1)])  # noqa: E731
    present = np.full((layers, experts), resident is None)
    for layer, expert in resident or ():
        present[layer, expert] = True
    # In units of an average layer's host time, so that one learning rate serves all machines.
    host, device = table(costs.host_ms)[counts], table(costs.device_ms)[counts]
    unit = max(1e-9, float(host.sum()) / (steps * layers))
    problem = {
        "host": host / unit,
        "device": device / unit,
        "other": np.float64(costs.layer_ms(tokens) / unit),
        "transfer": np.float64(costs.transfer_ms / unit),
        "slots": np.float64(geometry.slots),
        "present": present,
    }
    # Double precision: rounding must not lift a bound above the truth.
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        return unit * float(_best({name: jnp.asarray(part) for name, part in problem.items()}, rounds))


def _value(problem: dict[str, jax.Array], link: jax.Array, room: jax.Array, share: jax.Array) -> jax.Array:
    """The dual at prices [S, L]; `link` is m summed from each t to the end: falling, within 0..1."""
    weight = 1.0 - link
    on_host = (weight * (1.0 - share))[:, :, None] * problem["host"]
    on_device = jnp.minimum((weight * share)[:, :, None] * problem["device"], on_host)
    # Keeping an expert of layer l from its turn in step s to that in s + 1 takes room in the turns between.
    until = jnp.cumsum(room, 1)
    before = until - room
    after = until[:, -1:] - until
    keep = after + jnp.concatenate([before[1:], jnp.zeros_like(room[:1])])

    def turn(later: tuple[jax.Array, jax.Array], now: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
        """The least cost [L, E] from here on, of what is absent before its turn and of what is present."""
        absent, held = later
        on_host, on_device, copy, room, keep = now
        through = room[:, None] + on_device + jnp.minimum(absent, keep[:, None] + held)
        without = on_host + absent
        return (jnp.minimum(without, copy[:, None] + through), jnp.minimum(without, through)), None

    nothing = jnp.zeros_like(problem["host"][0])
    turns = (on_host, on_device, problem["transfer"] * link, room, keep)
    (absent, held), _ = jax.lax.scan(turn, (nothing, nothing), turns, reverse=True)
    paths = jnp.where(problem["present"], jnp.minimum(absent, before[0][:, None] + held), absent)
    return (weight * problem["other"]).sum() + paths.sum() - problem["slots"] * room.sum()


@functools.partial(jax.jit, static_argnames="rounds")
def _best(problem: dict[str, jax.Array], rounds: int) -> jax.Array:
    """The highest value that was met on the way up."""
    steps, layers, _ = problem["host"].shape

    def prices(raw: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        # m_t as shares of at most one.
        parts = jax.nn.softmax(jnp.append(raw["link"].reshape(-1), raw["idle"]))[:-1]
        link = jnp.cumsum(parts[::-1])[::-1].reshape(steps, layers)
        return jnp.minimum(link, 1.0), jnp.exp(raw["room"]), jax.nn.sigmoid(raw["share"])

    update = optax.adam(optax.cosine_decay_schedule(0.1, rounds))
    shape = (steps, layers)
    raw = {
        "link": jnp.full(shape, -jnp.log(steps * layers)),
        "idle": jnp.ones(()),
        "room": jnp.full(shape, jnp.log(0.05 / layers)),
        "share": jnp.zeros(shape),
    }
    value = lambda raw: -_value(problem, *prices(raw))  # noqa: E731

    def climb(carry: Any, _: None) -> tuple[Any, None]:
        raw, state, best = carry
        loss, slope = jax.value_and_grad(value)(raw)
        changes, state = update.update(slope, state)
        return (optax.apply_updates(raw, changes), state, jnp.maximum(-loss, best)), None

    (_, _, best), _ = jax.lax.scan(climb, (raw, update.init(raw), jnp.array(-jnp.inf)), length=rounds)
    return best
