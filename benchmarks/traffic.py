"""Routing to simulate with: the one recorded for a profile's model, or where there is none, made-up one."""

from __future__ import annotations

import numpy as np

from layerscope_jax.profiling.machine_profile import MachineProfile
from layerscope_jax.scheduling.geometry import RoutedExperts
from layerscope_jax.simulation.routing import PROFILES, Routing
from layerscope_jax.simulation.routing_files import FORMAT

MADE_UP = "made up"
PROMPT = 32
"""Tokens of a made-up prompt."""

STAYS = 0.7
"""Correlation of a made-up token's preferences with those of the token before."""


def traffic(profile: MachineProfile, requests: int, steps: int) -> tuple[Routing, str]:
    """Routing of so many requests or more, and what it is called.

    Raises:
        ValueError: if what was recorded is too little.
    """
    if profile.routing is None or not (PROFILES / f"{profile.routing}.npz").is_file():
        return made_up(profile.model, requests, steps, seed=0), MADE_UP
    routing = Routing.shipped(profile.routing)
    if routing.requests < requests or routing.steps < steps:
        raise ValueError(
            f"the routing {profile.routing!r} is of {routing.requests} requests and {routing.steps} decode "
            f"steps, fewer than {requests} and {steps}"
        )
    return routing, profile.routing


def made_up(model: RoutedExperts, requests: int, steps: int, seed: int) -> Routing:
    """Experts are more or less popular, requests have favourites, and tokens take after the one before."""
    random = np.random.default_rng(seed)
    layers, experts, choices = model.num_layers, model.num_experts, model.experts_per_token
    popular = random.normal(size=(layers, experts))
    likes = popular + random.normal(size=(requests, layers, experts))
    mood = random.normal(size=likes.shape)
    tokens = np.zeros((PROMPT + steps, requests, layers, choices), np.uint8)
    for token in tokens:
        mood = STAYS * mood + np.sqrt(1 - STAYS**2) * random.normal(size=likes.shape)
        token[:] = np.argpartition(-(likes + mood), choices, -1)[..., :choices]
    return Routing(
        header={"format": FORMAT, "geometry": model.counts(), "domains": [MADE_UP] * requests},
        decode_experts=tokens[PROMPT:],
        prefill_experts=np.ascontiguousarray(tokens[:PROMPT].swapaxes(0, 1)),
        prefill_lengths=np.full(requests, PROMPT),
        forecasts={},
    )
