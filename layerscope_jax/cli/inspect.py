"""The command `layerscope inspect`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from layerscope_jax.checkpoints.description import POSITIONS, Description, describe
from layerscope_jax.cli.options import Checkpoint, Json, Revision, folder_of
from layerscope_jax.cli.profile_view import table
from layerscope_jax.support import exits

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"))


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say what a checkpoint is and needs, from its configs and the headers of its files.

    Of a checkpoint on the hub no weights are downloaded. Exits with 2 if it cannot be run, and says why.

    Examples:
        layerscope inspect path/to/checkpoint
        layerscope inspect Qwen/Qwen3-30B-A3B --json
    """

    checkpoint: Checkpoint
    revision: Revision = None
    json: Json = False

    def run(self) -> int:
        """Returns the exit code."""
        exits.need_output()
        folder = folder_of(self.checkpoint, self.revision, weights=False)
        if not self.json:
            show(describe(folder), Console(highlight=False))
            return exits.DONE
        try:
            print(json.dumps({"supported": True, **describe(folder).to_json()}))
        except ValueError as error:
            print(json.dumps({"supported": False, "folder": str(folder), "refusal": str(error)}))
            return exits.REFUSED
        return exits.DONE


def show(found: Description, console: Console) -> None:
    """Prints a description."""
    total, stored = sum(found.parameters.values()), found.stored
    console.print(f"{Path(found.folder).name}: {found.architecture} (family {found.family})\n")
    windows = f", {found.window_layers} within a window" if found.window_layers else ""
    packed = f", packed as {found.quantization}" if found.quantization else ""
    stops = ", ".join(map(str, found.stop_token_ids)) or "none"
    lines = {
        "layers": f"{found.layers}: {found.moe_layers} MoE, {found.dense_layers} dense{windows}",
        "experts": f"{found.experts} a MoE layer, {found.experts_per_token} a token, "
        f"{size(found.expert_bytes)} each in {found.expert_format}",
        "attention": found.attention,
        "cache": f"{size(found.cache_bytes)} for {POSITIONS:,} positions in {found.dtype}",
        "context": f"{found.context:,} positions, rotary embedding of {found.rope}",
        "special": ", ".join(found.special) or "nothing",
        "stop ids": stops,
        "tokenizer": found.tokenizer or "none: prompts must be token ids",
        "stored": "no weights in the folder"
        if stored is None
        else ", ".join(
            f"{count:,} tensors of {dtype} ({size(stored.bytes[dtype])})"
            for dtype, count in stored.tensors.items()
        )
        + packed,
    }
    if stored is not None and stored.ignored:
        lines["ignored"] = ", ".join(f"{count:,} tensors ({why})" for why, count in stored.ignored.items())
    for name, text in lines.items():
        console.print(f"{name:<10} {text}", soft_wrap=True)
    rows = [
        (
            part,
            f"{count:,}",
            f"{count / total:.1%}",
            size(stored.bytes_by_part[part]) if stored else "",
            ", ".join(stored.formats_by_part[part]) if stored else "",
        )
        for part, count in found.parameters.items()
    ]
    rows.append(("all", f"{total:,}", "", size(sum(stored.bytes_by_part.values())) if stored else "", ""))
    share = f"{found.active_parameters / total:.1%}"
    rows.append(("of a token", f"{found.active_parameters:,}", share, "", ""))
    console.print()
    console.print(table(("part", "parameters", "share", "stored", "in"), rows))


def size(count: int) -> str:
    """Returns a number of bytes as text.

    >>> size(61_064_245_248), size(9_437_184), size(9216)
    ('61.1 GB', '9.4 MB', '9.2 KB')
    """
    unit, name = next((pair for pair in UNITS if count >= pair[0]), UNITS[-1])
    return f"{count / unit:,.1f} {name}"
