"""What numba compiles for, which is not always this CPU: its settings, and instructions that it may use."""

from __future__ import annotations

import functools

from llvmlite import binding
from numba import config

SETTINGS = (
    "CPU_NAME",
    "CPU_FEATURES",
    "ENABLE_AVX",
    "OPT",
    "LOOP_VECTORIZE",
    "SLP_VECTORIZE",
    "DISABLE_INTEL_SVML",
    "BOUNDSCHECK",
    "DEBUGINFO_DEFAULT",
)
"""Numba's settings that change what it compiles, by their names without `NUMBA_`."""


def describe() -> str:
    """All that decides what numba makes of one source."""
    settings = {name: str(getattr(config, name, None)) for name in SETTINGS}
    return f"{binding.get_process_triple()} {binding.get_host_cpu_name()} {sorted(of_host())} {settings}"


@functools.cache
def of_host() -> frozenset[str]:
    """The instructions that this CPU and system have, by LLVM's names; none where LLVM cannot tell."""
    try:
        return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)
    except RuntimeError:
        return frozenset()


def told() -> frozenset[str] | None:
    """The instructions that `NUMBA_CPU_FEATURES` names, none of a generic CPU; None if neither is told."""
    features = config.CPU_FEATURES
    if features is None:
        return None
    return frozenset(name[1:] for name in features.split(",") if name.startswith("+"))


@functools.cache
def features() -> frozenset[str]:
    """The instructions, by LLVM's names, that a function which numba compiles may use on this CPU.

    A compiler that is told of an instruction which it may not use ends the process.
    """
    named = told()
    result = of_host() if named is None else named & of_host()
    if named is None and not config.ENABLE_AVX:
        return frozenset(name for name in result if not name.startswith("avx"))
    return result


@functools.cache
def refusal() -> str | None:
    """Why nothing can be compiled as numba is set; None if it can."""
    if config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
    name = config.CPU_NAME
    if name not in (None, "generic", binding.get_host_cpu_name()) and config.CPU_FEATURES is not None:
        # LLVM then takes whatever that CPU has; without a list numba says what this one lacks.
        return f"NUMBA_CPU_NAME names {name}, and NUMBA_CPU_FEATURES does not say what of it this CPU lacks"
    foreign = (told() or frozenset()) & lacking()
    if foreign:
        return f"NUMBA_CPU_FEATURES names {', '.join(sorted(foreign))}, which this CPU lacks"
    return None


def lacking() -> frozenset[str]:
    """The instructions that LLVM knows and this CPU lacks."""
    try:
        return frozenset(name for name, has in binding.get_host_cpu_features().items() if not has)
    except RuntimeError:
        return frozenset()
