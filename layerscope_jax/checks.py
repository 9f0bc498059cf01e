"""What is refused for its type, before anything is done with it."""

from __future__ import annotations

from typing import Any

import jax

from layerscope_jax.checkpoints import Model
from layerscope_jax.config import OffloadConfig


def check_parts(model: Any, config: Any, device: Any, host_device: Any, copy: Any) -> None:
    """Refuses what no engine is made of.

    Raises:
        ValueError: naming what is of a wrong type.
    """
    problems = []

    def expect(fits: bool, name: str, expected: str, got: Any) -> None:
        if not fits:
            problems.append(f"{name} must be {expected}, got {repr(got)[:60]}")

    expect(isinstance(model, Model), "model", "a Model, as layerscope_jax.load gives one", model)
    expect(config is None or isinstance(config, OffloadConfig), "config", "an OffloadConfig or None", config)
    for name, found in {"device": device, "host_device": host_device}.items():
        expect(found is None or isinstance(found, jax.Device), name, "one of jax.devices() or None", found)
    expect(callable(copy), "copy", "a function as jax.device_put", copy)
    if problems:
        raise ValueError("; ".join(problems))


def check_options(on_token: Any, **switches: Any) -> None:
    """Refuses options of a call that are none.

    Args:
        on_token: None, or to be called.
        **switches: to be True or False.

    Raises:
        ValueError: naming each.
    """
    problems = [
        f"{name} must be True or False, got {repr(value)[:60]}"
        for name, value in switches.items()
        if not isinstance(value, bool)
    ]
    if on_token is not None and not callable(on_token):
        problems.append(f"on_token must be a function of a Token, or None, got {repr(on_token)[:60]}")
    if problems:
        raise ValueError("; ".join(problems))
