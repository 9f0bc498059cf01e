"""Folders that hold something else than a checkpoint in safetensors: what it is, and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

ADAPTER = "adapter_config.json"

CONVERT = (
    "save it as safetensors first (transformers: "
    'AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(another))'
)

FORMATS = (
    ("*.gguf", "weights in GGUF, the format of llama.cpp", "take the checkpoint that they were made from"),
    ("*.bin", "weights as PyTorch pickles them", CONVERT),
    ("*.pt", "weights as PyTorch pickles them", CONVERT),
    ("*.pth", "weights as PyTorch pickles them", CONVERT),
    ("*.h5", "weights for TensorFlow", CONVERT),
    ("*.msgpack", "weights for Flax", CONVERT),
    ("*.onnx", "a graph for ONNX", "take the checkpoint that it was made from"),
)
"""Names of files, what such files hold, and what to do about it."""


def other_format(names: Iterable[str]) -> str | None:
    """Returns what a folder holds instead of a checkpoint in safetensors, and what to do about it.

    Args:
        names: of the folder's files, those in folders within it with their paths.

    Returns:
        None if the folder may be a checkpoint, or holds nothing that is known.

    >>> other_format(["config.json", "model-q4.gguf"])
    'expected safetensors, got weights in GGUF, the format of llama.cpp (model-q4.gguf); take the checkpoint \
that they were made from'
    >>> other_format(["config.json", "model.safetensors", "pytorch_model.bin"]) is None
    True
    """
    files = sorted(name for name in names if "/" not in name)
    if ADAPTER in files:
        return (
            f"expected a model, got an adapter (LoRA, say) that changes another model ({ADAPTER}); merge the "
            "two and save the result (peft: PeftModel.merge_and_unload, then save_pretrained)"
        )
    tensors = [name for name in files if name.endswith((".safetensors", ".safetensors.index.json"))]
    if any(not name.startswith("consolidated") for name in tensors):
        return None
    if tensors:
        return (
            f"expected tensors under the names that transformers gives them, got {tensors[0]}, whose names "
            "are of the model's authors; take a checkpoint for transformers"
        )
    for pattern, what, remedy in FORMATS:
        held = [name for name in files if fnmatch(name, pattern)]
        if held:
            more = f" and {len(held) - 1} more" if len(held) > 1 else ""
            return f"expected safetensors, got {what} ({held[0]}{more}); {remedy}"
    return None


def refuse_other_formats(folder: Path) -> None:
    """Refuses a folder that holds something else than a checkpoint in safetensors.

    Raises:
        ValueError: naming what it holds, and what to do about it.
    """
    with suppress(OSError):  # a folder may be read without being listed
        if (what := other_format(os.listdir(folder))) is not None:
            raise ValueError(f"{folder}: {what}")
