"""Small recorded routing, and a profile of its model, for what simulates."""

import numpy as np
from helpers import PROFILE

from layerscope_jax import MachineProfile
from layerscope_jax.profiling.machine_profile import ModelShape
from layerscope_jax.simulation.routing import Routing, StoredForecast

S, R, L, E, K, P, W = 4, 5, 3, 6, 2, 7, 2


def small_routing():
    """Of random choices; the stored predictor "llapor" is sure of the truth with one expert of two wrong."""
    rng = np.random.default_rng(0)
    chosen = rng.random((P + S, R, L, E)).argsort(-1)[..., :K].astype(np.uint8)
    flat = np.concatenate([chosen[P:].swapaxes(1, 2).reshape(S * L, R, K), np.zeros((W, R, K), np.uint8)])
    flat[S * L :, :, 1] = 1
    ahead = np.stack([flat[1 + w : 1 + w + S * L] for w in range(W)], 2).reshape(S, L, R, W, K)
    guessed = ahead.swapaxes(1, 2).copy()
    guessed[..., 1] = (guessed[..., 0] + 1) % E
    return Routing(
        header={
            "format": 2,
            "geometry": {"num_layers": L, "num_experts": E, "experts_per_token": K},
            "domains": ["prose"] * R,
            "name": "small",
        },
        decode_experts=chosen[P:],
        prefill_experts=chosen[:P].swapaxes(0, 1).copy(),
        prefill_lengths=np.array([7, 1, 3, 5, 2]),
        forecasts={"llapor": StoredForecast(guessed, np.full(guessed.shape, 255, np.uint8))},
    )


def small_profile(**changes):
    shape = ModelShape(
        num_layers=L,
        num_experts=E,
        experts_per_token=K,
        hidden_size=8,
        moe_intermediate_size=4,
        dtype="float32",
    )
    options = {"name": "small", "costs": PROFILE, "model": shape, "machine": {}, "slots": 9} | changes
    return MachineProfile(**options)
