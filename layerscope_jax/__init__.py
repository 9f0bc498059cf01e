"""Run mixture-of-experts language models whose experts do not fit on the accelerator.

Names are imported when they are first asked for, so that a command can see to Ctrl-C before it imports JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerscope_jax.support.lazy import importer

if TYPE_CHECKING:
    from layerscope_jax.checkpoints.model import Model, load
    from layerscope_jax.checkpoints.saving import save
    from layerscope_jax.config import OffloadConfig
    from layerscope_jax.engine import Engine
    from layerscope_jax.generation.completions import Completion, Completions, Token, TokenLogprobs
    from layerscope_jax.generation.requests import Request
    from layerscope_jax.models import Decoder, ExpertParam
    from layerscope_jax.models.config import ModelConfig
    from layerscope_jax.offload.bank import ExpertBank
    from layerscope_jax.prediction.bases import PredictorBase
    from layerscope_jax.prediction.predictors import PREDICTORS, History, Predictor
    from layerscope_jax.profiling.machine_profile import MachineProfile
    from layerscope_jax.runtime.statistics import RunStats
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
    from layerscope_jax.scheduling.policy import PolicyBase
    from layerscope_jax.scheduling.registry import POLICIES, register_policy
    from layerscope_jax.simulation.comparison import simulate_profile
    from layerscope_jax.support.compile_cache import use_compilation_cache
    from layerscope_jax.support.errors import ReadError, TransferError
    from layerscope_jax.support.units import parse_bytes

_CONTENTS = {
    "checkpoints.model": (
        "Model",
        "load",
    ),
    "checkpoints.saving": ("save",),
    "config": ("OffloadConfig",),
    "engine": ("Engine",),
    "generation.completions": (
        "Completion",
        "Completions",
        "Token",
        "TokenLogprobs",
    ),
    "generation.requests": ("Request",),
    "models": (
        "Decoder",
        "ExpertParam",
    ),
    "models.config": ("ModelConfig",),
    "offload.bank": ("ExpertBank",),
    "prediction.bases": ("PredictorBase",),
    "prediction.predictors": (
        "PREDICTORS",
        "History",
        "Predictor",
    ),
    "profiling.machine_profile": ("MachineProfile",),
    "runtime.statistics": ("RunStats",),
    "scheduling.costs": (
        "HardwareProfile",
        "TimeTable",
    ),
    "scheduling.plan": (
        "ExpertId",
        "Geometry",
        "LayerPlan",
        "Observation",
        "Policy",
        "Replay",
    ),
    "scheduling.plan_files": (
        "load_plans",
        "save_plans",
    ),
    "scheduling.policy": ("PolicyBase",),
    "scheduling.registry": (
        "POLICIES",
        "register_policy",
    ),
    "simulation.comparison": ("simulate_profile",),
    "support.compile_cache": ("use_compilation_cache",),
    "support.errors": ("ReadError", "TransferError"),
    "support.units": ("parse_bytes",),
}
"""Module -> what it gives; the same as the imports above, which type checkers and editors read."""

__all__ = [
    "POLICIES",
    "PREDICTORS",
    "Completion",
    "Completions",
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
    "PolicyBase",
    "Predictor",
    "PredictorBase",
    "ReadError",
    "Replay",
    "Request",
    "RunStats",
    "TimeTable",
    "Token",
    "TokenLogprobs",
    "TransferError",
    "load",
    "load_plans",
    "parse_bytes",
    "register_policy",
    "save",
    "save_plans",
    "simulate_profile",
    "use_compilation_cache",
]


if not TYPE_CHECKING:  # with it any name would do
    __getattr__ = importer(__name__, _CONTENTS)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
