"""How fast decode steps may be at best, from the bytes that they read alone, for `layerscope fit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerscope_jax.cli.fit_sizes import FormatFit
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.profiling.machine_profile import MachineProfile
from layerscope_jax.support import machine
from layerscope_jax.support.units import gib

BASIS = (
    "a bound from bytes alone, and no simulation: the time in which the weights that a decode step needs "
    "from host memory can be read. Arithmetic, KV caches and what a device reads of its own memory are left "
    "out, and experts are taken to be chosen evenly, where uneven choices need fewer"
)

MEASURED = "measured just now, by all cores; other work at the same time lowers it"

HOST_UNKNOWN = (
    "the speed at which the host reads its memory is not known of the machine; give --host-bandwidth, or run "
    "this command on the machine without --host-memory"
)

NEITHER = (
    "neither the speed at which the host reads its memory nor that of the link is known of the machine; "
    "give --host-bandwidth and --link, or run this command on the machine without --device-memory and "
    "--host-memory"
)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A speed.

    Attributes:
        bytes_per_s: bytes a second; None if it is not known.
        told: where it comes from, or why it is not known.
    """

    bytes_per_s: float | None
    told: str


@dataclass(frozen=True, kw_only=True)
class StepBound:
    """What a decode step takes at least, by the bytes that it reads from host memory.

    Attributes:
        batch: number of requests.
        experts: distinct experts that a layer needs, as expected of even choices.
        read_bytes: bytes that are read from host memory.
        host_s: time (s) for the host to read them, which then computes what it read; None if its speed is
            not known.
        link_s: time (s) to copy them to the device instead; None if the link's speed is not known.
        both_s: time (s) if host and link share them as well as can be; None if either is not known.
    """

    batch: int
    experts: float
    read_bytes: int
    host_s: float | None
    link_s: float | None
    both_s: float | None


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What bytes alone say of decode steps.

    Attributes:
        host, link: the speeds; None for no link.
        steps: for each batch.
        basis: what the figures are, and what they are not.
    """

    host: Rate
    link: Rate | None
    steps: tuple[StepBound, ...]
    basis: str = BASIS


def bounds(
    config: ModelConfig,
    fit: FormatFit,
    dense_bytes: int,
    batches: Sequence[int],
    host: Rate | None,
    link: Rate | None,
) -> Bounds | str:
    """Returns what decode steps take at least, or why that cannot be said.

    Args:
        config: the model's shape.
        fit: where its experts are.
        dense_bytes: of all other weights that a step reads from host memory; 0 if they are on a device.
        batches: numbers of requests.
        host: speed at which the host reads its memory; None to measure it here and now.
        link: speed of copies to the device; None if there is none.
    """
    if fit.experts_lie == "nowhere":
        return "the model does not fit"
    if fit.experts_lie == "disk":
        return "experts would be read from the disk, whose speed is not known"
    if fit.experts_lie == "device":
        return "a step reads the device's memory alone, whose speed is not known"
    away = 1 - fit.share if link is not None else 1.0
    held = dense_bytes + away * fit.total_bytes
    if held < machine.MOST_BYTES:
        return (
            f"the {gib(int(held))} that steps read from host memory may lie in the processor's caches, whose "
            "speed is not measured"
        )
    if host is None:
        host = Rate(bytes_per_s=machine.read_bytes_per_s(), told=MEASURED)
    rates = [host] if link is None else [host, link]
    speeds = [rate.bytes_per_s for rate in rates if rate.bytes_per_s is not None]
    if not speeds:
        return HOST_UNKNOWN if link is None else NEITHER
    steps = []
    for batch in batches:
        experts = distinct(config.num_experts, config.experts_per_token, batch)
        size = dense_bytes + away * experts * config.num_moe_layers * fit.expert_bytes
        steps.append(
            StepBound(
                batch=batch,
                experts=experts,
                read_bytes=int(size),
                host_s=host.bytes_per_s and size / host.bytes_per_s,
                link_s=None if link is None else link.bytes_per_s and size / link.bytes_per_s,
                both_s=size / sum(speeds) if len(speeds) == 2 else None,
            )
        )
    return Bounds(host=host, link=link, steps=tuple(steps))


def distinct(experts: int, choices: int, tokens: int) -> float:
    """Returns how many experts of a layer are needed, as expected if tokens choose evenly.

    >>> distinct(8, 2, 1), distinct(8, 2, 2)  # the second token's two are new with 6 of 8 each
    (2.0, 3.5)
    """
    return experts * (1 - (1 - choices / experts) ** tokens)


def host_rate(given: int | None, profile: MachineProfile | None, *, is_here: bool) -> Rate | None:
    """Returns the speed at which the host reads its memory; None if it can be measured here.

    Args:
        given: bytes a second, if they were given.
        profile: of the machine, if there is one.
        is_here: whether the machine is this one.
    """
    if given is not None:
        return Rate(bytes_per_s=given, told="as given")
    if profile is not None:
        memory = profile.details.get("memory")
        measured = memory.get("host_read_bytes_per_s") if isinstance(memory, dict) else None
        if isinstance(measured, int | float) and measured > 0:
            return Rate(bytes_per_s=float(measured), told="as the profile has it")
        return Rate(bytes_per_s=None, told="not known: the profile does not have it")
    return None if is_here else Rate(bytes_per_s=None, told="not known: --host-bandwidth gives it")


def link_rate(given: int | None, profile: MachineProfile | None) -> Rate:
    """Returns the speed of copies to the device.

    Args:
        given: bytes a second, if they were given.
        profile: of the machine, if there is one.
    """
    if given is not None:
        return Rate(bytes_per_s=given, told="as given")
    costs = None if profile is None else profile.costs.alone or profile.costs
    if profile is not None and costs is not None and costs.transfer_ms > 0:
        speed = 1e3 * profile.model.expert_bytes / costs.transfer_ms
        return Rate(bytes_per_s=speed, told="as the profile has it")
    return Rate(bytes_per_s=None, told="not known: --link gives it")
