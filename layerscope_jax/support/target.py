"""Target that numba compiles for, which need not be this CPU: settings and permitted instructions."""

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
"""Names, without `NUMBA_`, of numba's settings that change the compiled code."""


def describe() -> str:
    """Returns a description of everything but the source that numba's machine code depends on."""
    settings = {name: str(getattr(config, name, None)) for name in SETTINGS}
    return f"{binding.get_process_triple()} {binding.get_host_cpu_name()} {sorted(of_host())} {settings}"


@functools.cache
def of_host() -> frozenset[str]:
    """Returns LLVM's names of this CPU's instruction sets; empty if LLVM does not know them."""
    try:
        return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)
    except RuntimeError:
        return frozenset()


def told() -> frozenset[str] | None:
    """Returns the instruction sets of `NUMBA_CPU_FEATURES`; empty for a generic CPU; None if unset."""
    features = config.CPU_FEATURES
    if features is None:
        return None
    return frozenset(name[1:] for name in features.split(",") if name.startswith("+"))


@functools.cache
def features() -> frozenset[str]:
    """Returns LLVM's names of the instruction sets that functions compiled by numba may use on this CPU.

    LLVM ends the process if it has to compile an instruction that is not among them.
    """
    named = told()
    result = of_host() if named is None else named & of_host()
    if named is None and not config.ENABLE_AVX:
        return frozenset(name for name in result if not name.startswith("avx"))
    return result


@functools.cache
def refusal() -> str | None:
    """Returns why numba's settings make compiling impossible; None if it is possible."""
    if config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
    name = config.CPU_NAME
    if name not in (None, "generic", binding.get_host_cpu_name()) and config.CPU_FEATURES is not None:
        # LLVM then uses everything that the named CPU has, even what this CPU lacks.
        return f"NUMBA_CPU_NAME names {name}, and NUMBA_CPU_FEATURES does not say what of it this CPU lacks"
    foreign = (told() or frozenset()) & lacking()
    if foreign:
        return f"NUMBA_CPU_FEATURES names {', '.join(sorted(foreign))}, which this CPU lacks"
    return None


def lacking() -> frozenset[str]:
    """Returns the instruction sets that LLVM knows and this CPU lacks."""
    try:
        return frozenset(name for name, has in binding.get_host_cpu_features().items() if not has)
    except RuntimeError:
        return frozenset()
