"""Starting parameters from another model's predictor: what of it can mean the same there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from predictor.llapor import LLaPor
from predictor.network import GroupConfig
from predictor.pca import Basis
from predictor.step import Params, Stack, input_scale


def carried(
    params: Params, stacked: Mapping[str, Stack], basis: Basis, look_ahead: int, source: LLaPor
) -> Params:
    """Initial parameters with those of another predictor in their place, as far as they fit.

    A layer starts from the layer at the same relative depth in the same group of the other predictor. The
    blocks are carried over to any model. Parameters of single experts are carried over if there are as many
    experts, the weight of the routers' forecast among them; those of hidden states if these are as wide:
    through both PCAs, so that a component means the same before and after.

    Args:
        params: initial parameters.
        stacked: the groups of layers.
        basis: PCA of the trace.
        look_ahead: W.
        source: the other predictor.

    Returns:
        Parameters of the same shapes.

    Raises:
        ValueError: if nothing can be carried over, because the networks have other shapes.
    """
    started = dict(params)
    scales = input_scale(basis), input_scale(source.basis)
    as_wide = basis.mean.shape[1] == source.basis.mean.shape[1]
    for name, stack in stacked.items():
        other = source.stacks.get(name)
        if other is None or shape_of(other.config) != shape_of(stack.config):
            continue
        layers = []
        for index, layer in enumerate(stack.layers):
            at = nearest(index, len(stack.layers), len(other.layers))
            theirs = other.layers[at]
            turn = None
            if as_wide:
                turn = basis.components[layer].T @ source.basis.components[theirs]
                turn = turn[: stack.components, : other.components] * (scales[1][theirs] / scales[0][layer])
            layers.append(merged(pick(params[name], index), pick(source.network[name], at), turn, look_ahead))
        started[name] = stack_up(layers)
    if all(started[name] is params[name] for name in params):
        raise ValueError(
            "start_from: expected a predictor whose networks have the same width, blocks and gates in one "
            "group at least, got none; train with its settings of the groups, or from nothing"
        )
    return started


def merged(ours: Any, theirs: Any, turn: np.ndarray | None, look_ahead: int) -> Any:
    """A layer's parameters; see `carried`.

    Args:
        ours, theirs: parameters of a `LayerNetwork`, pure dicts.
        turn: [P, P'] from our scaled components to theirs; None where hidden states have another width.
        look_ahead: W.
    """
    experts, same_experts = ours["gain"].shape[1], ours["gain"].shape[1] == theirs["gain"].shape[1]
    first, bias = ours["input"]["weight"].copy(), ours["input"]["bias"]
    if turn is not None:
        first[: len(turn)] = turn @ theirs["input"]["weight"][: turn.shape[1]]
        bias = theirs["input"]["bias"]
    if same_experts:
        first[-experts:] = theirs["input"]["weight"][-experts:]
    result = {**ours, "input": {"weight": first, "bias": bias}}
    if "blocks" in ours:
        result["blocks"] = theirs["blocks"]
    if same_experts:
        ahead = min(look_ahead, len(theirs["gain"]))
        result["gain"] = np.concatenate([theirs["gain"][:ahead], ours["gain"][ahead:]])
        result["output"] = {
            part: np.concatenate(
                [theirs["output"][part][..., : ahead * experts], array[..., ahead * experts :]], -1
            )
            for part, array in ours["output"].items()
        }
    return result


def nearest(index: int, count: int, others: int) -> int:
    """The place among `others` that lies as deep as `index` among `count`.

    >>> [nearest(index, 4, 7) for index in range(4)]
    [0, 2, 4, 6]
    """
    return round(index * (others - 1) / max(1, count - 1))


def shape_of(group: GroupConfig) -> tuple[int, int, bool]:
    return group.width, group.blocks, group.gated


def pick(tree: Any, index: int) -> Any:
    """One layer of a pure dict of stacked parameters."""
    if isinstance(tree, Mapping):
        return {key: pick(value, index) for key, value in tree.items()}
    return np.asarray(tree[index])


def stack_up(layers: list[Any]) -> Any:
    """Returns stacked parameters from those of each layer of a group; the reverse of `pick`."""
    first = layers[0]
    if isinstance(first, Mapping):
        return {key: stack_up([layer[key] for layer in layers]) for key in first}
    return jnp.stack([jnp.asarray(layer, jnp.float32) for layer in layers])
