"""Run mixture-of-experts language models whose experts do not fit on the accelerator."""

from layerscope_jax.checkpoints import Model, load, save
from layerscope_jax.comparison import simulate_profile
from layerscope_jax.compilations import use_compilation_cache
from layerscope_jax.config import ModelConfig, OffloadConfig, parse_bytes
from layerscope_jax.engine import Engine
from layerscope_jax.experts.bank import ExpertBank
from layerscope_jax.experts.transfers import TransferError
from layerscope_jax.generation import Request, Result, Token
from layerscope_jax.machine_profile import MachineProfile
from layerscope_jax.models import Decoder, ExpertParam
from layerscope_jax.prediction import PREDICTORS, History, Predictor
from layerscope_jax.scheduling.baselines import POLICIES
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
from layerscope_jax.statistics import RunStats

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
