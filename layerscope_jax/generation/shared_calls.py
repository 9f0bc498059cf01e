"""Calls that several processes make of one engine together (`jax.distributed`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from layerscope_jax.generation.calls import Call
from layerscope_jax.generation.requests import Request, with_seed
from layerscope_jax.offload.partition import Partition
from layerscope_jax.runtime.processes import agree, gathered, spans_processes, together


def call_of_all(
    partition: Partition | None, requests: Sequence[Request], make: Callable[[Sequence[Request]], Call]
) -> Call:
    """Returns the call that `make` makes of requests; processes that share a model make the same, or none.

    Requests without a seed get one that all processes draw together.

    Raises:
        ValueError: if another process was given other requests, or they became other tokens there.
        Exception: what `make` raises, here or in another process; see `together`.
    """
    if not spans_processes(partition):
        return make(requests)
    agree("the prompts of a call", {"number of prompts": len(requests)})
    agree("the prompts of a call", {f"prompt {n}": each for n, each in enumerate(requests)})
    drawn = np.array([with_seed(request).seed for request in requests], np.uint32)
    seeds = gathered(drawn)[0]
    with together(partition, "the call"):
        call = make([replace(each, seed=int(seed)) for each, seed in zip(requests, seeds, strict=True)])
    agree("the prompts of a call", {f"tokens of prompt {state.index}": state.prompt for state in call.states})
    return call
