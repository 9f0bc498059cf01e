"""What would let more of a model's experts fit, spelled as options of commands: `layerscope fit`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from layerscope_jax.cli.fit_sizes import HOST_MARGIN, Asked, FormatFit, Memory

LARGER = 1.1
"""Factor by which a device's memory grows until a model fits."""

LITTLE = 0.01
"""Shares of experts that differ by less are not worth advice."""

ORDER = {"nowhere": 0, "disk": 1, "host": 2, "device": 3}
"""Where experts may lie, the best last."""

MOST_TAKEN = 0.95
"""Share of a device's memory that JAX can take if nothing else needs it."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A change, and where the experts would be with it.

    Attributes:
        change: options, or what else would have to be different.
        share: share of the experts that would fit on the device, or in host memory on a CPU.
        experts_lie: where the experts would lie, as in `FormatFit`.
    """

    change: str
    share: float
    experts_lie: str


def advice(
    now: FormatFit,
    others: Sequence[FormatFit],
    fit: Callable[[Memory, Asked], FormatFit],
    memory: Memory,
    asked: Asked,
    *,
    packed: FormatFit,
    beside_bytes: int,
) -> tuple[Advice, ...]:
    """Returns the changes that help: by where the experts would lie, the best first, and then by the share.

    Args:
        now: how the experts fit.
        others: how they fit in each format.
        fit: how they fit into other memory, or with something else asked.
        memory, asked: the machine's, and what is asked.
        packed: how they fit beside dense weights in int8.
        beside_bytes: bytes that an engine takes beside its experts.
    """
    if now.share == 1 and now.experts_lie in ("device", "host"):
        return ()
    changes = {"--dense-format int8": packed}
    better = [
        other
        for other in others
        if other.total_bytes < now.total_bytes or ORDER[other.experts_lie] > ORDER[now.experts_lie]
    ]
    if better:
        best = max(better, key=lambda other: (ORDER[other.experts_lie], other.share, other.total_bytes))
        changes[f"--expert-format {best.format}"] = best
    for name, value in asked._asdict().items():
        if value >= 32 or (name == "max_num_seqs" and value > 1):
            changes[spelled({name: value // 2}, value)] = fit(memory, asked._replace(**{name: value // 2}))
    less = asked
    while fit(memory, less).left_bytes == 0 and less != lowered(less):
        less = lowered(less)
    if less != asked:
        changes[spelled(less._asdict())] = fit(memory, less)
    if memory.device_bytes is not None:
        more = replace(memory, device_bytes=memory.device_bytes * 2)
        changes["twice the device's memory"] = fit(more, asked)
    if memory.taken is not None and memory.taken < MOST_TAKEN:
        more = replace(memory, device_bytes=int((memory.device_bytes or 0) / memory.taken * MOST_TAKEN))
        changes[f"XLA_CLIENT_MEM_FRACTION={MOST_TAKEN:g}"] = fit(more, asked)
    if now.experts_lie in ("disk", "nowhere"):
        missing = now.total_bytes + (HOST_MARGIN if memory.device else beside_bytes)
        more = replace(memory, host_bytes=missing)
        changes[f"host memory for all experts, {missing / 2**30:.1f} GiB free"] = fit(more, asked)
    if now.experts_lie == "nowhere" and memory.device_bytes is not None:
        enough = replace(memory, host_bytes=max(memory.host_bytes, now.total_bytes + HOST_MARGIN))
        while fit(enough, asked).experts_lie == "nowhere":
            enough = replace(enough, device_bytes=max(2**20, int((enough.device_bytes or 0) * LARGER)))
        device, host = (
            math.ceil(size / 2**30 * 10) / 10
            for size in ((enough.device_bytes or 0) / (memory.taken or 1), enough.host_bytes)
        )
        label = f"a device with {device:.1f} GiB, and {host:.1f} GiB of free host memory"
        changes[label] = fit(enough, asked)
    found = [
        Advice(change=change, share=other.share, experts_lie=other.experts_lie)
        for change, other in changes.items()
        if ORDER[other.experts_lie] > ORDER[now.experts_lie] or other.share > now.share + LITTLE
    ]
    return tuple(sorted(found, key=lambda each: (-ORDER[each.experts_lie], -each.share)))


def spelled(settings: Mapping[str, int], instead_of: int | None = None) -> str:
    """Returns settings of an engine as options, and how commands spell those that differ.

    >>> spelled({"max_num_seqs": 4, "prefill_chunk_size": 512})
    '--max-num-seqs 4 --prefill-chunk-size 512'
    >>> spelled({"context": 64}, instead_of=128)  # doctest: +ELLIPSIS
    '--context 64 instead of 128 (serve: --max-model-len 64; generate: a prompt and --max-new-tokens ...)'
    """
    told = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
    if instead_of is not None:
        told += f" instead of {instead_of}"
    if "context" not in settings:
        return told
    return (
        f"{told} (serve: --max-model-len {settings['context']}; generate: a prompt and --max-new-tokens "
        "together)"
    )


def lowered(asked: Asked) -> Asked:
    """Returns half of everything that is asked for, but for what is hardly anything already.

    >>> lowered(Asked(max_num_seqs=1, context=2048, prefill_chunk_size=300))
    Asked(max_num_seqs=1, context=1024, prefill_chunk_size=256)
    """
    least = Asked(1, min(256, asked.context), min(256, asked.prefill_chunk_size))
    return Asked(*(max(low, value // 2) for low, value in zip(least, asked, strict=True)))
