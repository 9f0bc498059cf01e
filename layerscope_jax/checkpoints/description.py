"""What is known of a checkpoint from its configs and the headers of its files, before any weight is read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerscope_jax.checkpoints.converted import Converted
from layerscope_jax.checkpoints.headers import common_dtype, read_configs
from layerscope_jax.checkpoints.ignored import Ignored
from layerscope_jax.checkpoints.manifest import is_converted
from layerscope_jax.checkpoints.other_formats import refuse_other_formats
from layerscope_jax.checkpoints.packed_tensors import PackedTensor
from layerscope_jax.checkpoints.parameters import ROUTED, active_parameters, parameters_by_part, part_of
from layerscope_jax.checkpoints.quantised_tensors import (
    encoding_of_experts,
    encoding_told,
    put_together,
    quantisation_of,
)
from layerscope_jax.checkpoints.safetensors_io import BYTES, DTYPES, StoredTensor, dtype_named, stored_tensors
from layerscope_jax.checkpoints.tokenizer_files import tokenizer_file
from layerscope_jax.checkpoints.weight_names import Naming, check_sizes, family_of, plain_names
from layerscope_jax.formats import ExpertFormat, PlainFormat, format_named, quantised
from layerscope_jax.models.cache import cache_bytes
from layerscope_jax.models.config import ModelConfig

POSITIONS = 1000  # of a sequence whose cache is measured


@dataclass(frozen=True)
class Stored:
    """The tensors of a checkpoint.

    Attributes:
        tensors, bytes: dtype, by its name in safetensors -> number of its tensors, and their bytes.
        bytes_by_part: part of the model -> bytes of the tensors that generation needs.
        formats_by_part: part -> names of the formats of these: dtypes, and encodings of packed matrices.
        ignored: kind of tensors that generation does not need -> their number.
    """

    tensors: dict[str, int]
    bytes: dict[str, int]
    bytes_by_part: dict[str, int]
    formats_by_part: dict[str, list[str]]
    ignored: dict[str, int]


@dataclass(frozen=True)
class Description:
    """A checkpoint, as its configs and the headers of its files describe it.

    Attributes:
        folder: the checkpoint's folder.
        family, architecture: those that it belongs to.
        layers, dense_layers, moe_layers: numbers of decoder layers, and of those without and with experts.
        window_layers: decoder layers that attend within a window.
        experts, experts_per_token: number of experts of a MoE layer, and how many a token chooses.
        attention: kind of attention, and its heads.
        cache_bytes: bytes of the cache of one sequence of 1,000 positions, in `dtype`.
        dtype: dtype of the weights once they are loaded.
        quantization: how the stored weights are packed, as config.json says; None if they are not.
        expert_format: format of the experts once they are loaded.
        expert_bytes: bytes of one expert once it is loaded.
        dense_format: format of the matrices of dense layers once they are loaded.
        parameters: part of the model -> number of its parameters.
        active_parameters: number that a token needs: all but those of experts that it does not choose.
        context: the longest sequence.
        rope: the rotary embedding.
        stop_token_ids: ids that end a generation.
        tokenizer: the file of its tokenizer; None if there is none. It is not read.
        special: what sets it apart from a plain decoder with routed experts.
        stored: its tensors; None where the folder has none.
    """

    folder: str
    family: str
    architecture: str
    layers: int
    dense_layers: int
    moe_layers: int
    window_layers: int
    experts: int
    experts_per_token: int
    attention: str
    cache_bytes: int
    dtype: str
    quantization: str | None
    expert_format: str
    expert_bytes: int
    dense_format: str
    parameters: dict[str, int]
    active_parameters: int
    context: int
    rope: str
    stop_token_ids: tuple[int, ...]
    tokenizer: str | None
    special: list[str]
    stored: Stored | None

    def to_json(self) -> dict[str, Any]:
        """Returns the description as an object for JSON."""
        return asdict(self)


def describe(folder: Path) -> Description:
    """Describes the checkpoint of a folder; of its tensors only the headers are read.

    Raises:
        ValueError: if the folder is incomplete, damaged or not supported, as `load` says it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with config.json, found no folder; check the path")
    if is_converted(folder):
        held = Converted.open(folder)
        return _described(
            folder, held.config, held.manifest.dtype, held.format, held.manifest.dense, None, _converted(held)
        )
    refuse_other_formats(folder)
    config, raw, _ = read_configs(folder)
    family = family_of(config)
    said = quantisation_of(raw)
    stored, encoding, dtype = (
        None,
        encoding_told(said),
        raw.get("dtype") or raw.get("torch_dtype") or "float32",
    )
    if any(folder.glob("*.safetensors")):
        tensors = put_together(folder, raw, plain_names(stored_tensors(folder)))
        check_sizes(config, folder, tensors)
        naming, ignored = Naming.of(config, tensors.keys()), Ignored(config, family)
        naming.check(folder, tensors, ignored)
        stored = _stored(naming, tensors, ignored)
        dtype = common_dtype(folder, naming, tensors, raw).name
        encoding = encoding_of_experts(folder, naming, tensors)
    form = (format_named(dtype) if encoding is None else quantised(encoding)).for_body(config.expert_body)
    return _described(folder, config, dtype, form, dtype, None if said is None else said.method, stored)


def _described(
    folder: Path,
    config: ModelConfig,
    dtype: str,
    form: ExpertFormat,
    dense_format: str,
    quantization: str | None,
    stored: Stored | None,
) -> Description:
    """Puts a description together, of what is in its attributes."""
    parameters, size = parameters_by_part(config), dtype_named(dtype).itemsize
    windows = [config.layer_kind(layer).sliding_window for layer in range(config.num_layers)]
    return Description(
        folder=str(folder),
        family=config.family,
        architecture=family_of(config).architecture,
        layers=config.num_layers,
        dense_layers=len(config.dense_layers),
        moe_layers=config.num_moe_layers,
        window_layers=sum(window is not None for window in windows),
        experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        attention=_attention(config),
        cache_bytes=cache_bytes(config, 1, POSITIONS, size),
        dtype=dtype,
        quantization=quantization,
        expert_format=form.name,
        expert_bytes=form.expert_bytes(config.hidden_size, config.moe_intermediate_size),
        dense_format=dense_format,
        parameters=parameters,
        active_parameters=active_parameters(config, parameters),
        context=config.max_position_embeddings,
        rope=_rope(config),
        stop_token_ids=config.stop_token_ids,
        tokenizer=tokenizer_file(folder),
        special=special(config),
        stored=stored,
    )


def _stored(naming: Naming, tensors: Mapping[str, StoredTensor | PackedTensor], ignored: Ignored) -> Stored:
    count = _Count()
    for name, tensor in tensors.items():
        for part in tensor.parts.values() if isinstance(tensor, PackedTensor) else (tensor,):
            count.tensor(part.dtype, part.size)
        if name in naming.uses:
            key = naming.uses[name][0][0].keys[0]
            form = tensor.encoding.name if isinstance(tensor, PackedTensor) else tensor.dtype
            count.part(ROUTED if key in naming.experts else part_of(key), tensor.size, form)
    return count.stored(ignored.summary(tensors.keys() - naming.shapes.keys()))


def _converted(held: Converted) -> Stored:
    count = _Count()
    for path, arrays in held.dense.items():
        for array in arrays:
            count.tensor(_code(array.buffer.dtype), array.tensor.size)
        form = held.manifest.dense if len(arrays) > 1 else _code(arrays[0].buffer.dtype)
        count.part(part_of(path), sum(array.tensor.size for array in arrays), form)
    for stacks in held.experts:
        for stack in stacks:
            count.tensor(_code(stack.buffer.dtype), stack.tensor.size)
    form = _code(held.format.dtype) if isinstance(held.format, PlainFormat) else held.format.name
    count.part(ROUTED, held.expert_bytes, form)
    return count.stored({})


def _code(dtype: np.dtype) -> str:
    """Safetensors' name of a dtype, or where it has none NumPy's."""
    return next((code for code, known in (DTYPES | BYTES).items() if known == dtype), dtype.name)


class _Count:
    """Counts tensors, bytes and formats."""

    def __init__(self) -> None:
        self._tensors: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._parts: Counter[str] = Counter()
        self._formats: dict[str, Counter[str]] = defaultdict(Counter)

    def tensor(self, dtype: str, size: int) -> None:
        self._tensors[dtype] += 1
        self._bytes[dtype] += size

    def part(self, name: str, size: int, form: str) -> None:
        self._parts[name] += size
        self._formats[name][form] += size

    def stored(self, ignored: dict[str, int]) -> Stored:
        formats = {name: [form for form, _ in sizes.most_common()] for name, sizes in self._formats.items()}
        return Stored(dict(self._tensors), dict(self._bytes), dict(self._parts), formats, ignored)


def _attention(config: ModelConfig) -> str:
    if config.latent is not None:
        sizes = config.latent
        queries = "" if sizes.query_rank is None else f", queries of {sizes.query_rank}"
        return (
            f"{config.attention}, {config.num_heads} heads, keys and values compressed to {sizes.rank} + "
            f"{sizes.rope}{queries}"
        )
    told = (
        f"{config.attention}, {config.num_heads} heads and {config.num_kv_heads} of keys and values, "
        f"{config.head_dim} each"
    )
    if config.delta is None:
        return told
    layers, delta = config.num_layers - len(config.full_attention_layers), config.delta
    return (
        f"{told}; in {layers} layers gated DeltaNet, {delta.key_heads} heads of keys and {delta.value_heads} "
        f"of values, {delta.key} and {delta.value} each"
    )


def _rope(config: ModelConfig) -> str:
    scaling = config.rope_scaling
    theta = f"base {config.rope_theta:,.10g}"
    if scaling is None:
        return theta
    return f"{theta}, {scaling.kind} by {scaling.factor:g} from {scaling.original_max_position_embeddings:,}"


def special(config: ModelConfig) -> list[str]:
    """Returns what sets a model apart from a plain decoder with routed experts, in words.

    >>> config = ModelConfig(family="olmoe", vocab_size=32, hidden_size=8, num_layers=2, num_heads=2,
    ...     num_kv_heads=1, head_dim=4, num_experts=4, experts_per_token=2, moe_intermediate_size=4,
    ...     normalize_top_k=True, sliding_window=8, full_attention_layers=(1,))
    >>> special(config)
    ['a window of 8 positions']
    """
    rule, body = config.routing, config.expert_body
    factors = {
        "embeddings": config.embedding_scale,
        "residual additions": config.residual_scale,
        "logits": 1 / config.logits_divisor,
        "weights of experts": rule.scale,
    }
    told = {
        f"a window of {config.sliding_window} positions": config.sliding_window is not None,
        "sinks": config.attention_sinks,
        "norms of queries and keys over each head": config.qk_norm == "head",
        "norms of queries and keys over all heads": config.qk_norm == "all",
        f"queries, keys and values clipped at {config.qkv_clip}": config.qkv_clip is not None,
        "biases of attention": config.attention_bias,
        "gated attention": config.attention_gate,
        f"scores times {config.attention_scale or 0:.6g}": config.attention_scale is not None,
        f"{config.rotary_dim} numbers of a head rotated": config.rotary_dim is not None,
        "neighbours rotated together": config.rope_interleaved,
        f"{rule.score} routers": rule.score != "softmax",
        "a bias for choosing experts": rule.selection_bias,
        f"{rule.groups_per_token} of {rule.num_groups} groups of experts a token": rule.num_groups > 1,
        f"a shared expert of {config.shared_intermediate_size}{', gated' * config.shared_gate}": (
            config.shared_intermediate_size is not None
        ),
        f"{body.activation} experts": body.activation != "silu",
        "biases of experts": body.bias,
        "biases of dense networks": config.mlp_bias,
        "layer norms with biases": config.norm == "layer",
        f"logits bent towards {config.logits_cap}": config.logits_cap is not None,
        "the embedding as head": config.tie_embeddings,
    }
    told |= {f"{name} times {factor:.6g}": factor != 1 for name, factor in factors.items()}
    return [text for text, holds in told.items() if holds]
