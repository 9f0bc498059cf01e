"""What a `config.json` says of quantised weights: by which method, and how its tensors are to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerscope_jax.models.config_values import shown
from layerscope_jax.support.checks import Problems

METHODS = ("awq", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4")
"""Values of `quant_method` whose checkpoints can be read."""

WEIGHTS = (("int", 4), ("int", 8), ("float", 4), ("float", 8))
"""Types and bits of weights that compressed-tensors may have."""


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are quantised. Which of them are, the tensors say.

    Attributes:
        method: `quant_method`.
        block: rows and columns of an FP8 block, where config.json gives them.
        zeros: whether groups of GPTQ or AWQ have zero points.
        reorders: whether the groups of GPTQ may be of inputs that are not neighbours (`desc_act`).
        zero_offset: what is added to a stored zero point: 1 in the first version of GPTQ.
    """

    method: str
    block: tuple[int, int] | None = None
    zeros: bool = False
    reorders: bool = False
    zero_offset: int = 0


def read_quantisation(given: Any) -> Quantisation | None:
    """Reads a `quantization_config`; None where there is none.

    Raises:
        ValueError: naming everything in it that is not supported.

    >>> read_quantisation({"quant_method": "fp8", "weight_block_size": [128, 128]}).block
    (128, 128)
    >>> read_quantisation({"quant_method": "bitsandbytes"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: quantization_config.quant_method: expected one of awq, ..., mxfp4, got 'bitsandbytes'; ...
    """
    if given is None:
        return None
    problems = Problems()

    def expect(key: str, supported: tuple[Any, ...], default: Any = None) -> None:
        value = given.get(key, default)
        if (value.lower() if isinstance(value, str) else value) not in supported:
            problems.add(
                f"quantization_config.{key}: expected {' or '.join(map(shown, supported))}, "
                f"got {shown(given.get(key))}"
            )

    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if method not in METHODS:
        raise ValueError(
            f"quantization_config.quant_method: expected one of {', '.join(METHODS)}, got "
            f"{shown(method if isinstance(given, Mapping) else given)}; use the original checkpoint, or one "
            "quantised by one of these methods"
        )
    block = given.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        problems.add(f"quantization_config.weight_block_size: expected two sizes, got {shown(block)}")
    if method == "fp8":
        expect("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    if method in ("awq", "gptq"):
        expect("bits", (4,))
    if method == "awq":
        expect("version", ("gemm",), "gemm")
    if method == "gptq":
        expect("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    if method == "modelopt":
        expect("quant_algo", ("nvfp4", "fp8"))
    if method == "compressed-tensors":
        _check_groups(given.get("config_groups"), problems)
    problems.raise_any(remedy="use the original checkpoint, or one quantised so")
    first = method == "gptq" and given.get("checkpoint_format", "gptq") == "gptq"
    zeros = given.get("zero_point", True) if method == "awq" else not given.get("sym", True)
    return Quantisation(
        method,
        None if block is None else (block[0], block[1]),
        zeros=bool(zeros),
        reorders=bool(given.get("desc_act")),
        zero_offset=int(first),
    )


def _check_groups(groups: Any, problems: Problems) -> None:
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        kind = (weights.get("type"), weights.get("num_bits")) if isinstance(weights, Mapping) else None
        if kind not in WEIGHTS:
            known = ", ".join(f"{kind} of {bits} bits" for kind, bits in WEIGHTS)
            problems.add(f"quantization_config.config_groups.{name}: expected {known}, got {shown(weights)}")
