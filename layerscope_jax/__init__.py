"""Run mixture-of-experts language models whose experts do not fit on the accelerator.

Names are imported when they are first asked for, so that a command can see to Ctrl-C before it imports JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerscope_jax.lazy import importer

if TYPE_CHECKING:
    from layerscope_jax.checkpoints import Model, load, save
    from layerscope_jax.comparison import simulate_profile
    from layerscope_jax.compilations import use_compilation_cache
    from layerscope_jax.config import OffloadConfig
    from layerscope_jax.engine import Engine
    from layerscope_jax.experts.bank import ExpertBank
    from layerscope_jax.generation import Request, Result, Token
    from layerscope_jax.machine_profile import MachineProfile
    from layerscope_jax.models import Decoder, ExpertParam
    from layerscope_jax.models.config import ModelConfig
    from layerscope_jax.prediction import PREDICTORS, History, Predictor
    from layerscope_jax.scheduling.costs import HardwareProfile, TimeTable
    from layerscope_jax.scheduling.plan import (
        ExpertId,
        Geometry,
        LayerPlan,
        Observation,
        Policy,
        Replay,
    )
    from layerscope_jax.scheduling.plan_files import load_plans, save_plans
    from layerscope_jax.scheduling.registry import POLICIES
    from layerscope_jax.statistics import RunStats
    from layerscope_jax.support.errors import TransferError
    from layerscope_jax.support.units import parse_bytes

_CONTENTS = {
    "checkpoints": ("Model", "load", "save"),
    "comparison": ("simulate_profile",),
    "compilations": ("use_compilation_cache",),
    "config": ("OffloadConfig",),
    "engine": ("Engine",),
    "experts.bank": ("ExpertBank",),
    "generation": ("Request", "Result", "Token"),
    "machine_profile": ("MachineProfile",),
    "models": ("Decoder", "ExpertParam"),
    "models.config": ("ModelConfig",),
    "prediction": ("PREDICTORS", "History", "Predictor"),
    "scheduling.registry": ("POLICIES",),
    "scheduling.costs": ("HardwareProfile", "TimeTable"),
    "scheduling.plan": (
        "ExpertId",
        "Geometry",
        "LayerPlan",
        "Observation",
        "Policy",
        "Replay",
    ),
    "scheduling.plan_files": ("load_plans", "save_plans"),
    "statistics": ("RunStats",),
    "support.errors": ("TransferError",),
    "support.units": ("parse_bytes",),
}
"""Module -> what it gives; the same as the imports above, which type checkers and editors read."""

__all__ = [
    "POLICIES",
    "PREDICTORS",
    "Decoder",
    "Engine",
    "ExpertBank",
    "ExpertId",
    "ExpertParam",
    "Geometry",
    "HardwareProfile",
    "History",
    "LayerPlan",
    "MachineProfile",
    "Model",
    "ModelConfig",
    "Observation",
    "OffloadConfig",
    "Policy",
    "Predictor",
    "Replay",
    "Request",
    "Result",
    "RunStats",
    "TimeTable",
    "Token",
    "TransferError",
    "load",
    "load_plans",
    "parse_bytes",
    "save",
    "save_plans",
    "simulate_profile",
    "use_compilation_cache",
]


if not TYPE_CHECKING:  # with it any name would do
    __getattr__ = importer(__name__, _CONTENTS)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
