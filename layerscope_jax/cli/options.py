"""What several commands of `layerscope` share: options, opening a checkpoint, saying something."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from layerscope_jax.checkpoints.model import Model, load
from layerscope_jax.cli import demo
from layerscope_jax.prediction.predictors import PREDICTORS, Predictor
from layerscope_jax.profiling.machine_profile import MachineProfile
from layerscope_jax.scheduling.registry import policy_names
from layerscope_jax.support.exits import say
from layerscope_jax.support.option_errors import option

SHIPPED = "shipped"
POLICY_NAMES = ", ".join(policy_names())
PREDICTOR_HELP = f"One of {', '.join(sorted(PREDICTORS))}, the folder of a trained one, or 'shipped'."

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


class Aloud(logging.Handler):
    """Prints to stderr what the library logs."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextmanager
def heard() -> Iterator[None]:
    """Within, what the library says of its work is printed."""
    logger, handler = logging.getLogger("layerscope_jax"), Aloud()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def open_predictor(predictor: str | None) -> Predictor | str | None:
    """A predictor from its name or folder, "shipped" being the one that comes with the shipped model.

    That one is not taken without being asked for: on the device it takes a third of what all experts of so
    small a model do, and they make better use of the room.
    """
    if predictor is None or predictor in PREDICTORS:
        return predictor
    import predictor as trained  # not before it is needed: it brings Optax along

    with option("--predictor"):
        return trained.shipped() if predictor == SHIPPED else trained.load(predictor)


def open_profile(profile: str | None) -> MachineProfile | None:
    """The profile in a file or of a name, if there is to be one."""
    if profile is None:
        return None
    with option("--profile"):
        return MachineProfile.load(profile)
