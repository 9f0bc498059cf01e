"""Options that several commands share, and what they open: checkpoint, predictor, profile."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from layerscope_jax.checkpoints import hub
from layerscope_jax.checkpoints.identity import ModelIdentity
from layerscope_jax.checkpoints.model import Model, load
from layerscope_jax.cli import demo
from layerscope_jax.cli.args import arg
from layerscope_jax.formats import format_named
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
    arg(
        metavar="CHECKPOINT",
        help="A Hugging Face folder, a name on the Hugging Face hub ('organisation/name', downloaded into "
        "its cache), or 'shipped' for the model in the package.",
    ),
]
Revision = Annotated[
    str | None,
    arg(metavar="REVISION", help="Branch, tag or commit of a checkpoint on the hub; by default main."),
]
DeviceBudget = Annotated[
    str | None,
    arg(
        metavar="SIZE",
        help="Device memory for experts, such as '2GiB'; 'auto' for what weights, caches and steps leave "
        "free; None for all experts.",
    ),
]
HostBudget = Annotated[
    str | None,
    arg(
        metavar="SIZE",
        help="Host memory for experts, such as '16GiB'; the others stay in the checkpoint's files and are "
        "read when they are needed. By default all are loaded.",
    ),
]
PrefillChunkSize = Annotated[
    int,
    arg(
        metavar="INT",
        help="Maximum tokens of a prefill step. Fewer take less memory; a longer prompt then takes several "
        "steps, in each of which experts that are not resident are copied or read again.",
    ),
]
PolicyName = Annotated[
    str,
    arg(
        metavar="POLICY", help=f"Decides which experts are copied and where each is computed: {POLICY_NAMES}."
    ),
]
LinkBandwidth = Annotated[
    str | None,
    arg(metavar="SIZE", help="Limits copies to the device to this many bytes per second, such as '500MB'."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    arg(help="Converts the weights; without it they keep their dtype."),
]

Json = Annotated[bool, arg(help="Print one JSON document to standard output instead.")]

TimelineFile = Annotated[
    Path | None,
    arg(
        metavar="FILE",
        help="Write a timeline there: what device, host, link and disk did when, for `layerscope report`, "
        "Perfetto and chrome://tracing (docs/timeline.md).",
    ),
]

ExpertFormat = Annotated[
    str | None,
    arg(
        metavar="FORMAT",
        help="Stores the experts in this format, such as int8, int4, mxfp4 or fp8; without it, as the "
        "checkpoint does.",
    ),
]

DenseFormat = Annotated[
    Literal["int8"] | None,
    arg(
        help="Stores the matrices of dense layers in this format: attention, shared experts, dense networks "
        "and the head; without it, as the checkpoint does.",
    ),
]


PrefixCache = Annotated[
    bool,
    arg(
        help="Let a prompt begin with what was computed for an earlier one with the same first tokens. Where "
        "XLA computes, its tokens then agree to rounding."
    ),
]


def folder_of(checkpoint: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Returns the folder of a checkpoint, downloaded if need be, or of the shipped model."""
    return hub.folder_of(demo.SHIPPED if checkpoint == SHIPPED else checkpoint, revision, weights=weights)


def open_model(
    checkpoint: str,
    dtype: str | None = None,
    revision: str | None = None,
    expert_format: str | None = None,
    dense_format: str | None = None,
    host_budget: str | None = None,
    devices: int | None = None,
) -> Model:
    """Loads a checkpoint, or the shipped model; within a host budget its experts stay on the disk."""
    if devices is not None and host_budget is not None:
        raise ValueError("--devices cannot be given together with --host-budget; leave one of them out")
    experts: Literal["memory", "disk"] = "memory" if host_budget is None else "disk"
    return load(
        folder_of(checkpoint, revision),
        dtype=dtype,
        format=known_format(expert_format),
        dense_format=dense_format,
        experts=experts,
        devices=devices,
    )


def known_format(name: str | None) -> str | None:
    """Returns the name of a format, if it is one, or None."""
    with option("--expert-format"):
        return None if name is None else format_named(name).name


class Aloud(logging.Handler):
    """Prints the library's log messages to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextmanager
def heard() -> Iterator[None]:
    """Prints the library's log messages, from INFO up, within the `with` block."""
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
    """Opens a predictor by its name or folder; "shipped" is the one that ships with the shipped model.

    The shipped one is used only on request: on the device it takes a third of the bytes of all experts of so
    small a model, and the experts make better use of the room.
    """
    if predictor is None or predictor in PREDICTORS:
        return predictor
    import predictor as trained  # imported late, because it imports Optax

    with option("--predictor"):
        if predictor != SHIPPED and not Path(predictor).is_dir():
            raise ValueError(
                f"{predictor}: expected a trained predictor's folder, or one of "
                f"{', '.join(sorted(PREDICTORS))}, {SHIPPED}; found no such folder"
            )
        return trained.shipped() if predictor == SHIPPED else trained.load(predictor)


def own_predictor(folder: Path) -> Path:
    """The folder of a model's own predictor, which `layerscope predictor train` writes."""
    return folder / "predictor"


def measured_predictor(folder: Path, model: Model) -> Predictor | str | None:
    """Returns what was measured to be best for the model of a folder.

    None if nothing was measured, or if that was of the model with other weights or in another dtype.
    """
    own = own_predictor(folder)
    if not own.is_dir():
        return None
    from predictor.verdict import chosen  # imported late, because it imports Optax

    with option("--predictor"):
        best = chosen(own)
    if best is None or isinstance(best, str):
        return best
    try:
        ModelIdentity.of(model).check(best.model, f"the predictor in {own}")
    except ValueError as error:
        say(f"{error}; it is not used")
        return None
    return best


def open_profile(profile: str | None) -> MachineProfile | None:
    """Loads a profile from a file or by its name; None for none."""
    if profile is None:
        return None
    with option("--profile"):
        return MachineProfile.load(profile)


def files(given: tuple[tuple[Path, ...], ...]) -> tuple[Path, ...]:
    """Returns the files of an option that takes several and may be repeated.

    >>> [str(file) for file in files(((Path("a"), Path("b")), (Path("c"),)))]
    ['a', 'b', 'c']
    """
    return tuple(file for some in given for file in some)
