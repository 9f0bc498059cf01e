"""Kernels: what computes experts, dense products, attention and sums, and how others are added."""

from layerscope_jax.kernels.registry import Kernel, Work, register_kernel

__all__ = ["Kernel", "Work", "register_kernel"]
