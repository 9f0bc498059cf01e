"""Device memory that an engine takes beside its experts, part by part, and what is left for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import jax

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.formats import PlainFormat
from layerscope_jax.generation.scheduler import MIN_LENGTH, MIN_WIDTH, batch_rows, bucket
from layerscope_jax.kernels.grouping import MAX_ROWS, TILES
from layerscope_jax.models.cache import cache_bytes
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.support import machine
from layerscope_jax.support.errors import MachineError
from layerscope_jax.support.units import gib, next_power

USUAL_CONTEXT = 2048
"""Positions of a request (its prompt and its new tokens) where nothing else is said; models often take a
hundred times as many, whose caches would leave no room for experts."""

MARGIN_SHARE, LEAST_MARGIN = 0.04, 256 * 2**20
"""What is left free of the device's memory, for what an allocator loses between its pieces."""

SCORES, LOGITS = 2, 4
"""Arrays of attention scores, and of logits, in float32 that are alive at once: for a softmax what goes in
and what comes out; for sampling also the sorted ones and their sums."""


@dataclass(frozen=True, kw_only=True)
class DeviceNeeds:
    """Bytes of device memory that an engine takes beside its experts.

    Attributes:
        dense: weights of everything but the routed experts; 0 if they are on the device already.
        caches: of `max_num_seqs` requests with `context` positions each.
        newcomers: caches of the requests that are being prefilled, before they are put into those.
        rows: hidden states, and the rows that experts write.
        attention: scores of a prefill step, and what latent attention makes of its compressed rows.
        dispatch: rows between the matrices of the experts that are computed at once, and packed experts as
            numbers.
        logits: of a step, and what tokens are sampled by.
        margin: left free.
    """

    dense: int
    caches: int
    newcomers: int
    rows: int
    attention: int
    dispatch: int
    logits: int
    margin: int

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(asdict(self).values())

    @property
    def workspace(self) -> int:
        """What steps take while they run: everything but weights, caches and the margin."""
        return self.newcomers + self.rows + self.attention + self.dispatch + self.logits

    def __str__(self) -> str:
        parts = asdict(self)
        return ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)


def usual_context(config: ModelConfig, context: int | None) -> int:
    """Returns the positions to keep room for: those asked for, at most as many as the model takes."""
    return min(context or USUAL_CONTEXT, config.max_position_embeddings)


def device_needs(
    config: ModelConfig,
    *,
    itemsize: int,
    expert_bytes: int,
    packed: bool,
    max_num_seqs: int,
    context: int,
    prefill_chunk_size: int,
    device_bytes: int,
    dense_bytes: int = 0,
) -> DeviceNeeds:
    """Returns what an engine on an accelerator takes beside its experts.

    Caches, rows and logits are the shapes of arrays. The others are arrays of XLA's programs, by the shapes
    of the largest that are alive together; `tests/generation/test_device_memory.py` compares attention with
    what XLA plans for such a program.

    Args:
        config: the model's.
        itemsize: bytes of a number of weights and activations.
        expert_bytes: of an expert as it is stored.
        packed: whether experts are stored in fewer bits than they are computed in.
        max_num_seqs, context: requests at once, and positions of each.
        prefill_chunk_size: most tokens of a prefill step.
        device_bytes: of the device's memory, for the margin.
        dense_bytes: of dense weights that are not on the device yet.

    >>> config = ModelConfig(family="olmoe", vocab_size=32, hidden_size=8, num_layers=2, num_heads=2,
    ...     num_kv_heads=1, head_dim=4, num_experts=4, experts_per_token=2, moe_intermediate_size=4,
    ...     normalize_top_k=True)
    >>> needs = device_needs(config, itemsize=2, expert_bytes=192, packed=False, max_num_seqs=4, context=64,
    ...     prefill_chunk_size=128, device_bytes=2**30)
    >>> needs.caches, needs.newcomers  # 2 layers, keys and values of 4 numbers in 2 bytes, 4 x 64 positions
    (8192, 4096)
    """
    rows, length = batch_rows(max_num_seqs), bucket(context, MIN_LENGTH)
    width = bucket(context, MIN_WIDTH)
    # Short prompts share a step of at most a chunk; a longer one has steps and caches of its own.
    tokens = min(prefill_chunk_size, next_power(max_num_seqs) * width)
    seen = max(length, tokens) if width > prefill_chunk_size else max(width, tokens)
    hidden, choices, heads = config.hidden_size, config.experts_per_token, config.num_heads
    inner, latent = config.moe_intermediate_size, config.latent
    attention = SCORES * 4 * tokens * heads * length
    if latent is not None:
        attention += seen * heads * (2 * latent.nope + latent.rope + 2 * latent.value) * itemsize
    computed = TILES * min(MAX_ROWS, max(2, next_power(tokens)))  # no tile has more rows
    plain = config.expert_bytes(4)  # unpacked in float32, and then in the dtype of activations
    return DeviceNeeds(
        dense=dense_bytes,
        caches=cache_bytes(config, rows, length, itemsize),
        newcomers=cache_bytes(config, 1, seen, itemsize),
        # Of two layers, for a prefill and for a decode step; hidden states before and after a layer, and
        # inputs of its experts, in sums also as float32.
        rows=hidden * (itemsize * (3 * tokens + 2 * (tokens + rows) * choices + 4) + 4 * tokens),
        attention=attention,
        dispatch=computed * (2 * hidden + 3 * inner) * 4 + packed * 2 * plain,
        logits=LOGITS * 4 * rows * config.vocab_size,
        margin=max(LEAST_MARGIN, int(MARGIN_SHARE * device_bytes)) + expert_bytes,
    )


@dataclass(frozen=True)
class Room:
    """Device memory that `device_budget="auto"` found free when an engine was made.

    Attributes:
        free: bytes free, with the dense weights on the device already.
        needs: what the engine takes beside its experts.
        max_num_seqs, context, prefill_chunk_size: what these needs are for.
    """

    free: int
    needs: DeviceNeeds
    max_num_seqs: int
    context: int
    prefill_chunk_size: int

    @property
    def left(self) -> int:
        """Bytes left for experts."""
        return max(0, self.free - self.needs.total)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Says what takes the memory if there is none for experts, or too little within the `with` block.

        Raises:
            ValueError: saying what takes how much, and what to lower.
        """
        if self.free < self.needs.total:
            raise MachineError(f"device_budget='auto' finds no room for experts: {self._told()}")
        try:
            yield
        except ValueError as error:
            if "device_budget" not in str(error):
                raise
            raise MachineError(f"{error}; device_budget='auto' found {self._told()}") from error

    def _told(self) -> str:
        return (
            f"{gib(self.free)} free, of which {self.max_num_seqs} requests of {self.context:,} positions, in "
            f"prefill steps of {self.prefill_chunk_size:,} tokens, take {gib(self.needs.total)} "
            f"({self.needs}); lower max_num_seqs, context or prefill_chunk_size, or end what else uses the "
            "device"
        )


def room_on(
    device: jax.Device, model: Model, *, max_num_seqs: int, context: int | None, prefill_chunk_size: int
) -> Room | None:
    """Returns the room for experts on a loaded model's device; None where its memory is the host's.

    Args:
        device: the model's.
        model: the model.
        max_num_seqs, context, prefill_chunk_size: see `OffloadConfig`.
    """
    free = machine.device_free_bytes(device)
    if free is None:
        return None
    positions = usual_context(model.config, context)
    needs = device_needs(
        model.config,
        itemsize=model.bank.dtype.itemsize,
        expert_bytes=model.bank.expert_bytes,
        packed=not isinstance(model.bank.format, PlainFormat),
        max_num_seqs=max_num_seqs,
        context=positions,
        prefill_chunk_size=prefill_chunk_size,
        device_bytes=free,
    )
    return Room(free, needs, max_num_seqs, positions, prefill_chunk_size)
