"""What several commands of `layerscope` share: options, opening a checkpoint, saying something."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from layerscope_jax import demo
from layerscope_jax.checkpoints import Model, load
from layerscope_jax.scheduling.baselines import POLICIES

SHIPPED = "shipped"
POLICY_NAMES = ", ".join(sorted(POLICIES))

Checkpoint = Annotated[
    Positional[str],
    arg(metavar="CHECKPOINT", help="A Hugging Face folder, or 'shipped' for the model that comes along."),
]
DeviceBudget = Annotated[
    str | None,
    arg(metavar="SIZE", help="Device memory for experts, '2GiB' say; without it everything is resident."),
]
PolicyName = Annotated[str, arg(metavar="POLICY", help=f"Who moves what within a budget: {POLICY_NAMES}.")]
LinkBandwidth = Annotated[
    str | None,
    arg(metavar="SIZE", help="Bytes a second, '500MB' say, that copies to the device are paced to."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    arg(help="Converts the weights; without it they stay as they are."),
]


def folder_of(checkpoint: str) -> Path:
    return demo.SHIPPED if checkpoint == SHIPPED else Path(checkpoint)


def open_model(checkpoint: str, dtype: str | None = None) -> Model:
    """Loads a checkpoint, or the shipped one."""
    return load(folder_of(checkpoint), dtype=dtype)


def say(text: str) -> None:
    """Prints to stderr."""
    print(text, file=sys.stderr)
