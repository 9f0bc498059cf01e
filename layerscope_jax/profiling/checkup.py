"""Whether this machine has what an engine needs: devices, memory, kernels, and copies beside computing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from layerscope_jax.formats import format_named, quantised
from layerscope_jax.formats.quantised import ENCODINGS
from layerscope_jax.kernels.dense import dense_kernels
from layerscope_jax.kernels.host_kernels import KERNELS, kernel_of
from layerscope_jax.kernels.inside import Inside
from layerscope_jax.kernels.registry import REFERENCE, fallbacks
from layerscope_jax.profiling.copies import measured_copies
from layerscope_jax.support import machine, numa, target
from layerscope_jax.support.pinned_memory import BESIDE_GIB, LIMIT, pinned_limit_gib
from layerscope_jax.support.units import gib

State = Literal["ok", "slow", "broken"]

NVIDIA = Path("/proc/driver/nvidia/version")
"""Exists where Linux has the driver of an NVIDIA GPU."""

SIZES = (2048, 768)
"""D and F of the experts that kernels are chosen for: those of Qwen3-30B-A3B."""

NEEDED = {"amx": ("amx-bf16", "amx-tile"), "pairs": ("avx512bf16", "avx512bw"), "loops": ()}
"""Instruction sets that a kernel of `host_kernels.KERNELS` cannot do without."""

SLOW_COPY = 6e9
"""Bytes per second below which a link to an accelerator is slower than PCIe 3 x8."""

LITTLE_OVERLAP = 0.5


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found.

    Attributes:
        name: of what was checked.
        state: "slow" for what works and could be faster, "broken" for what an engine cannot do without.
        told: what was found.
        mend: what to do about it; None if it is "ok".
    """

    name: str
    state: State
    told: str
    mend: str | None = None


Check = Callable[[jax.Device], Iterator[Finding]]


def checkup() -> list[Finding]:
    """Checks this machine, with the default device; takes some seconds.

    A check that fails becomes a finding, and the others are done all the same.
    """
    told = ", ".join(f"{name} {number}" for name, number in machine.versions().items())
    findings = [Finding(name="versions", state="ok", told=told)]
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        mend = "install the JAX of this accelerator (pip install 'jax[cuda13]'), or set JAX_PLATFORMS=cpu"
        return [*findings, Finding(name="devices", state="broken", told=first_line(error), mend=mend)]
    for check in CHECKS:
        try:
            findings += check(device)
        except Exception as error:
            mend = "run `layerscope --debug doctor` for where it failed, and report it"
            name = check.__name__.replace("_", " ")
            findings.append(Finding(name=name, state="broken", told=first_line(error), mend=mend))
    return findings


def devices(device: jax.Device) -> Iterator[Finding]:
    """Checks which backends and devices JAX has."""
    kinds = ", ".join(f"{each.platform} {each.device_kind}" for each in jax.devices())
    if device.platform == "cpu" and NVIDIA.exists():
        mend = "install JAX for it (pip install 'jax[cuda13]'), and leave JAX_PLATFORMS unset"
        told = f"{kinds}: this machine has an NVIDIA GPU that JAX does not use"
        yield Finding(name="devices", state="slow", told=told, mend=mend)
    else:
        yield Finding(name="devices", state="ok", told=kinds)
    try:
        host = machine.cpu_device()
        told = f"{machine.cpu_name()}, {machine.cores()} cores, {len(jax.devices(host.platform))} of JAX"
        yield Finding(name="host", state="ok", told=told)
    except ValueError as error:
        mend = "leave JAX_PLATFORMS unset, or add cpu to it, as in JAX_PLATFORMS=cuda,cpu"
        yield Finding(name="host", state="broken", told=first_line(error), mend=mend)


def memory(device: jax.Device) -> Iterator[Finding]:
    """Checks the kinds of memory, what of it is free, and the limit of pinned host memory."""
    kinds = [each.kind for each in device.addressable_memories()]
    missing = {"device", "pinned_host"} - set(kinds)
    if missing:
        told = f"{', '.join(kinds)}, without {', '.join(sorted(missing))}, in which experts lie"
        mend = "use a device that has it, or a newer JAX"
        yield Finding(name="memory kinds", state="broken", told=told, mend=mend)
    else:
        yield Finding(name="memory kinds", state="ok", told=", ".join(kinds))
    free, total = machine.free_bytes(), machine.memory_bytes()
    of_total = "" if total is None else f" of {gib(total)}"
    rate = machine.read_bytes_per_s()
    told = f"{gib(free)}{of_total} free, read at {rate / 1e9:.3g} GB/s by all cores"
    yield Finding(name="host memory", state="ok", told=told)
    if said := numa.plan(machine.cores()):
        yield Finding(name="NUMA", state="ok", told=said)
    room = machine.device_free_bytes(device)
    if room is None:
        yield Finding(name="device memory", state="ok", told="the host's: nothing is copied, none is limited")
        return
    limit = (device.memory_stats() or {}).get("bytes_limit", room)
    told = f"{gib(room)} of {gib(limit)} free for JAX"
    yield Finding(name="device memory", state="ok", told=told)
    yield pinned(device, free)


def pinned(device: jax.Device, free: int) -> Finding:
    """Returns whether as much host memory can be pinned as is free."""
    limit = pinned_limit_gib()
    if device.platform != "gpu" or free <= limit << 30:
        return Finding(name="pinned memory", state="ok", told=f"up to {limit} GiB for experts")
    needed = (free >> 30) + BESIDE_GIB
    return Finding(
        name="pinned memory",
        state="slow",
        told=f"{limit} GiB may be pinned, and {gib(free)} are free",
        mend=f"for experts of more than {limit} GiB set {LIMIT}={needed} before the program starts; commands "
        "do so themselves",
    )


def kernels(device: jax.Device) -> Iterator[Finding]:
    """Checks what computes experts on the host, and dense layers if the device is the host; compiles it."""
    dtype = np.dtype("bfloat16")
    refused = target.refusal()
    for name in ("bfloat16", *(quantised(kind()).name for kind in ENCODINGS)):
        before = fallbacks()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            chosen = kernel_of(format_named(name), dtype, *SIZES)
        reasons = [reason for reason in fallbacks() if reason not in before]
        reasons = reasons or ([refused] if refused else [])
        yield of_kernel(name, None if chosen is None else chosen.name, reasons)
    if device.platform == "cpu":
        parts = dense_kernels(SIZES[0], dtype, Inside.is_possible(dtype), latent=False)
        told = ", ".join(f"{part} by {kernel}" for part, kernel in parts.items())
        if REFERENCE in parts.values():
            mend = refused or "programs can call this package's loops on Linux only, through numba"
            yield Finding(name="dense kernels", state="slow", told=told, mend=mend)
        else:
            yield Finding(name="dense kernels", state="ok", told=told)


def of_kernel(format: str, chosen: str | None, reasons: list[str]) -> Finding:
    """Returns what is told of the kernel for a format: which one, and why not a faster one.

    >>> of_kernel("int4", "loops", ["no compiler"]).state
    'slow'
    """
    faster = [kernel.name for kernel in reversed(KERNELS)]
    faster = faster[: faster.index(chosen)] if chosen in faster else faster if chosen is None else []
    lacks = sorted({needed for name in faster for needed in NEEDED[name]} - target.features())
    told = f"experts on the host in {format}: {chosen or REFERENCE}"
    if lacks and chosen is not None:
        told += f"; this CPU lacks {', '.join(lacks)}, which a faster one needs"
    name = f"kernel of {format}"
    if reasons:
        return Finding(name=name, state="slow", told=told, mend=f"a kernel was refused: {'; '.join(reasons)}")
    if chosen is None:
        mend = f"XLA computes them, more slowly: a CPU with AVX-512 has loops for {format}"
        return Finding(name=name, state="slow", told=told, mend=mend)
    return Finding(name=name, state="ok", told=told)


def copies(device: jax.Device) -> Iterator[Finding]:
    """Measures copies to the device, alone and while it computes."""
    found = measured_copies(device)
    told = f"{found.bytes_per_s / 1e9:.3g} GB/s from pinned host memory to the device"
    alone = device.platform == "cpu"
    if alone or found.bytes_per_s >= SLOW_COPY:
        yield Finding(name="copies", state="ok", told=told)
    else:
        mend = "see whether the slot has all its lanes (nvidia-smi -q -d PCIE), and end what else copies"
        yield Finding(name="copies", state="slow", told=told, mend=mend)
    told = f"{found.overlap:.0%} of a copy passes while the device computes"
    if alone:
        yield Finding(
            name="overlap", state="ok", told=f"{told}; both take the same cores, so it gains nothing"
        )
    elif found.overlap >= LITTLE_OVERLAP:
        yield Finding(name="overlap", state="ok", told=told)
    else:
        mend = "prefetching gains little: leave CUDA_LAUNCH_BLOCKING and XLA's debugging flags unset"
        yield Finding(name="overlap", state="slow", told=told, mend=mend)


def cache(device: jax.Device) -> Iterator[Finding]:
    """Checks whether compiled programs are kept."""
    folder = kept_in()
    if folder is not None and os.access(folder, os.W_OK):
        yield Finding(name="compilation cache", state="ok", told=str(folder))
    else:
        mend = "set XDG_CACHE_HOME to a folder that can be written to, or unset JAX_ENABLE_COMPILATION_CACHE"
        told = "none: every run compiles its programs anew"
        yield Finding(name="compilation cache", state="slow", told=told, mend=mend)


def kept_in() -> str | None:
    """Returns the folder in which JAX keeps compiled programs; None if it keeps none."""
    return jax.config.values["jax_compilation_cache_dir"]


CHECKS: tuple[Check, ...] = (devices, memory, kernels, copies, cache)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
