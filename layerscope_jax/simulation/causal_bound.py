"""A lower bound on what policies can reach that do not know the future.

The bound of `runtime.lower_bound` knows it: it keeps just those experts that come next. Here the demand of a
layer is drawn in every step anew, each of its recorded ones as likely as the others, independent of all that
was before. A policy knows the law, and the demand of the turns up to some layers ahead, so no less than
perfect forecasts of so many layers tell; of what comes later, it knows how often each expert is asked for.

It is the dual of the same relaxation, with prices that are set before anything is known: of room one for each
turn, of the link one for the whole run, and for the presence of experts (or the share of the device) one for
each demand. Whatever the prices, the expected time of a policy is no less than the expected least of

    time_1 + time_2 + ... + prices times what exceeds the constraints

over all ways to decide on each expert alone. That is a small dynamic program from the last step to the
first: an expert that was there is kept, at the price of its room, or not; some layers before its next turn,
when its demand is known, it may still be let go; an absent one may then be copied.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layerscope_jax.runtime.lower_bound import FEW, ROUNDS, Prices, highest, problem_of, value
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.scheduling.plan import Geometry
from layerscope_jax.support.jax_settings import with_promotion


def causal_bound_ms(
    counts: np.ndarray,
    tokens: int,
    geometry: Geometry,
    costs: HardwareProfile,
    look_ahead: int,
    rounds: int = ROUNDS,
) -> float:
    """Returns a lower bound on the expected time (ms) of S steps under policies that do not know the future.

    Args:
        counts: [S, L, E] tokens routed to each expert: what a layer may be asked for in a step.
        tokens: tokens of a step.
        geometry: geometry of the model, with the budget's slots.
        costs: of the machine.
        look_ahead: layers after this one whose demand is known.
        rounds: rounds of gradient ascent on the prices; more rounds raise the bound and never make it wrong.

    Raises:
        ValueError: if `counts` does not fit `geometry`.
    """
    problem, unit = problem_of(counts, tokens, geometry, costs)
    with jax.enable_x64(True), with_promotion():
        arrays = {name: jnp.asarray(part) for name, part in problem.items()}
        return unit * float(_best(arrays, min(look_ahead, geometry.num_layers - 1), rounds))


def _expected(
    look_ahead: int, problem: dict[str, jax.Array], prices: Prices, absent: jax.Array, present: jax.Array
) -> jax.Array:
    """Returns the least expected cost [L, E] of each expert over all steps.

    Args:
        absent, present: [S, L, E] costs of a turn by demand; each is as likely.
    """
    room, copy = prices["room"], problem["transfer"] * prices["link"][0, 0]
    layers = room.shape[1]
    # The room of the turns between a layer's last turn and this one: of those from which on its demand is
    # known, and of all before them.
    until = jnp.concatenate([jnp.zeros(1), jnp.cumsum(room.reshape(-1))])
    now = np.arange(room.size)
    known = (until[now] - until[np.maximum(now - look_ahead, 0)]).reshape(room.shape)
    blind = (until[now] - until[np.maximum(now - layers + 1, 0)]).reshape(room.shape) - known

    def turn(later: Any, step: Any) -> tuple[Any, None]:
        """Returns the expected cost from this turn on of an expert: let go, kept, or there at no price."""
        gone, held, blind, _ = later
        room, known, before = (part[:, None] for part in step)
        through = room + present + jnp.minimum(gone, blind + held)
        new = jnp.minimum(absent + gone, copy + through)
        kept = jnp.minimum(new, known + through)
        there = jnp.minimum(absent + gone, through)
        return (new.mean(0), kept.mean(0), before, there.mean(0)), None

    nothing = jnp.zeros_like(absent[0])
    first = (nothing, nothing, nothing[:, :1], nothing)
    (gone, _, _, there), _ = jax.lax.scan(turn, first, (room, known, blind), reverse=True)
    return jnp.minimum(gone, there)  # whatever is there at first


@functools.partial(jax.jit, static_argnames=("look_ahead", "rounds"))
def _best(problem: dict[str, jax.Array], look_ahead: int, rounds: int) -> jax.Array:
    """Returns the highest value of the dual function during gradient ascent."""
    steps, layers, experts = problem["host"].shape
    shape = (steps, layers)
    whole = experts <= FEW

    def prices(raw: dict[str, jax.Array]) -> Prices:
        set_before = {
            "link": jnp.broadcast_to(jax.nn.sigmoid(raw["link"]), shape),
            "room": jnp.exp(raw["room"]),
        }
        if whole:
            return set_before | {"presence": problem["host"] * jax.nn.sigmoid(raw["of demand"])}
        return set_before | {"share": jax.nn.sigmoid(raw["of demand"])}

    raw = {
        "link": jnp.zeros(()),
        "room": jnp.full(shape, jnp.log(0.05 / layers)),
        "of demand": jnp.zeros((*shape, experts) if whole else shape),
    }
    return highest(
        lambda raw: value(problem, prices(raw), functools.partial(_expected, look_ahead)), raw, rounds
    )
