"""Many servers, one job: prompts of a file or a dataset, completed by engines on the nodes of a Ray cluster.

Its names are imported when they are first used, and Ray when a job begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerscope_jax.support.lazy import importer

if TYPE_CHECKING:
    from layerscope_jax.distributed.job import generate
    from layerscope_jax.distributed.report import Report, WorkerReport

__all__ = ["Report", "WorkerReport", "generate"]


if not TYPE_CHECKING:
    __getattr__ = importer(__name__, {"job": ("generate",), "report": ("Report", "WorkerReport")})
