"""A model in memory (`Model`), and its way from and to a Hugging Face folder (`load`, `save`)."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from tokenizers import Tokenizer

from layerscope_jax.checkpoints.generation_defaults import generation_defaults
from layerscope_jax.checkpoints.hub import folder_of
from layerscope_jax.checkpoints.ignored import Ignored
from layerscope_jax.checkpoints.other_formats import refuse_other_formats
from layerscope_jax.checkpoints.ranges import disk_bank
from layerscope_jax.checkpoints.safetensors_io import (
    DTYPES,
    SINGLE,
    StoredTensor,
    cast,
    dtype_named,
    equal,
    stored_tensors,
    write_tensors,
)
from layerscope_jax.checkpoints.tensor_reader import TensorReader
from layerscope_jax.checkpoints.tokenizer_files import read_tokenizer
from layerscope_jax.checkpoints.weight_names import Naming, check_sizes, family_of, plain_names
from layerscope_jax.formats import ExpertFormat, format_named
from layerscope_jax.models import Decoder, ExpertParam, config_from_hf, with_generation
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.decoder_layers import RouterWeights, layer_type
from layerscope_jax.offload.bank import ExpertBank, device_sharding
from layerscope_jax.scheduling.plan import Geometry
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.files import is_there, read_json, replace_files

logger = logging.getLogger(__name__)

PROGRESS_FROM = 1_000_000_000  # bytes from which on loading shows a progress bar


@dataclasses.dataclass(frozen=True)
class Model:
    """A model whose experts lie in host memory and everything else on the device.

    Attributes:
        config: its shape.
        graphdef: of the whole `Decoder`; merge it with `dense | experts`, both pure dicts.
        dense: every parameter but the routed experts', as a pure dict, on the device.
        bank: the routed experts.
        tokenizer: None where the checkpoint has none that can be read.
        path: the folder it came from, if any.
        generation_defaults: settings of requests that the checkpoint recommends, by the names of `Request`.

    >>> config = ModelConfig(family="olmoe", vocab_size=32, hidden_size=8, num_layers=1, num_heads=2,
    ...     num_kv_heads=1, head_dim=4, num_experts=4, experts_per_token=2, moe_intermediate_size=4,
    ...     normalize_top_k=True, qk_norm="all")
    >>> model = Model.from_decoder(Decoder(config, rngs=nnx.Rngs(0)))
    >>> sorted(model.dense), model.bank.total_bytes
    (['embedding', 'head', 'layers', 'norm'], 1536)
    """

    config: ModelConfig
    graphdef: nnx.GraphDef
    dense: dict[str, Any]
    bank: ExpertBank
    tokenizer: Tokenizer | None = None
    path: Path | None = None
    generation_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_decoder(cls, decoder: Decoder, tokenizer: Tokenizer | None = None) -> Model:
        """Parts a decoder, one just trained say, into its dense parameters and a bank of its experts."""
        graphdef, *states = nnx.split(decoder, ExpertParam, ...)
        experts, dense = map(nnx.to_pure_dict, states)
        stacks = experts["experts"]

        # One layer's stacks, read back from the device once.
        @functools.lru_cache(maxsize=len(decoder.config.expert_shapes()))
        def on_host(layer: int, matrix: str) -> np.ndarray:
            return np.asarray(stacks[layer][matrix])

        bank = ExpertBank.build(
            decoder.config, lambda expert, matrix, shape: on_host(expert.layer, matrix)[expert.expert]
        )
        return cls(decoder.config, graphdef, dense, bank, tokenizer)

    @property
    def device(self) -> jax.Device:
        """Where the dense parameters are."""
        return next(iter(jax.tree.leaves(self.dense)[0].devices()))

    def geometry(self, slots: int) -> Geometry:
        """What a policy must know of the model, within a budget with room for so many experts."""
        config = self.config
        return Geometry(
            num_layers=config.num_moe_layers,
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
            expert_bytes=self.bank.expert_bytes,
            arrays_per_expert=len(self.bank.format.buffers(*self.bank.sizes)),
            slots=slots,
        )

    def routers(self) -> list[RouterWeights]:
        """The router of each MoE layer, and the norm whose output it reads, on the device."""
        config, layers = self.config, self.dense["layers"]
        return [layer_type(config, layer).router_of(layers[layer]) for layer in config.moe_layers]

    def with_format(self, format: ExpertFormat) -> Model:
        """The same model with its experts in another format; the experts of both are in memory meanwhile.

        Raises:
            ValueError: if the format does not have what these experts compute.
        """
        return dataclasses.replace(self, bank=self.bank.converted(format))

    def whole(self) -> Decoder:
        """The decoder with every expert on the device, unpacked: the oracle of the engine's tests."""
        layers = range(self.config.num_moe_layers)
        experts = {"experts": {layer: self.bank.stacked(layer, self.device)._asdict() for layer in layers}}
        return nnx.merge(self.graphdef, self.dense | experts)


def load(
    folder: str | Path,
    *,
    dtype: str | None = None,
    device: jax.Device | None = None,
    format: str | ExpertFormat | None = None,
    revision: str | None = None,
    experts: Literal["memory", "disk"] = "memory",
) -> Model:
    """Loads a Hugging Face checkpoint of one of the families, or of one that was registered.

    Experts are read straight into pinned host memory, everything else onto the device; apart from these, only
    one tensor at a time is in memory.

    Args:
        folder: holds `config.json`, one or more safetensors files, and optionally a tokenizer's files; or the
            name of a checkpoint on the Hugging Face hub, "organisation/name", which is downloaded into the
            hub's cache (see `layerscope_jax.checkpoints.hub`). What is there as a path is never taken for a
            name.
        dtype: "float32", "bfloat16" or "float16" to convert to; None keeps the checkpoint's dtype.
        device: device that holds the dense parameters, and whose pinned host memory holds the experts; None
            for the default device.
        format: format in which the experts are stored (`layerscope_jax.formats`), or its name; None keeps
            them in the dtype of the other weights.
        revision: branch, tag or commit of a checkpoint on the hub; None for its main branch.
        experts: "memory" to read the experts now; "disk" to leave them in the checkpoint's files, from which
            an engine reads those that it needs into as much host memory as `OffloadConfig.host_budget` says.
            The files must hold them as they are computed from: safetensors of one float type, none to be
            converted.

    Returns:
        The model, for `Engine`.

    Warns:
        UserWarning: about files and tensors that are ignored, and about an output head that differs from the
            embedding although the config ties the two.

    Raises:
        ValueError: if the folder is incomplete, damaged or not supported, naming all wrong tensors; or if a
            checkpoint on the hub cannot be had.
    """
    form = format_named(format) if isinstance(format, str) else format
    if not isinstance(form, ExpertFormat | None):
        raise ValueError(f"format must be an ExpertFormat, the name of one or None, got {format!r}")
    if experts not in ("memory", "disk"):
        raise ValueError(f"experts must be 'memory' or 'disk', got {experts!r}")
    if experts == "disk" and form is not None:
        raise ValueError(
            "experts='disk' computes experts as their files hold them, and cannot have the format "
            f"{form.name!r}; leave out format=, or load with experts='memory'"
        )
    folder = folder_of(folder, revision)
    refuse_other_formats(folder)
    config, raw, generation = read_configs(folder)
    config, stored = _with_head(config, plain_names(stored_tensors(folder)))
    check_sizes(config, folder, stored)
    naming, ignored = Naming.of(config, stored.keys()), Ignored(config, family_of(config))
    naming.check(folder, stored, ignored)
    for part, count in ignored.summary(stored.keys() - naming.shapes.keys()).items():
        logger.info("%s: %d tensors are not needed and passed over: %s", folder, count, part)
    stored = {name: stored[name] for name in naming.shapes}
    target = dtype_named(dtype) if dtype is not None else common_dtype(folder, naming, stored, raw)

    on_disk = disk_bank(config, naming, stored, target, device) if experts == "disk" else None
    size = sum(tensor.size for tensor in stored.values()) - (0 if on_disk is None else on_disk.total_bytes)
    with _progress(size) as advance:
        reader, sharding = TensorReader(naming, stored, target, advance), device_sharding(device)
        dense = {
            path: jax.block_until_ready(jax.device_put(array, sharding))
            for source in naming.dense
            for path, array in reader.arrays(source).items()
        }
        bank = on_disk or ExpertBank.build(
            config,
            lambda expert, array, _: reader.array(naming.experts[expert, array], (expert, array)),
            device,
            form,
        )
    return Model(
        config,
        naming.graphdef,
        unflatten_dict(dense),
        bank,
        read_tokenizer(folder, config.vocab_size, raw.get("model_type")),
        folder,
        generation,
    )


def save(model: Model | Decoder, folder: str | Path, *, dtype: str | None = None) -> None:
    """Writes a model as `config.json` and `model.safetensors`, for `load` and transformers 5 or newer.

    Experts are written unpacked, whatever their format. Both files are written under temporary names first,
    so that a failure leaves no incomplete files. Tokenizer files are not written: copy them into the folder.

    Args:
        model: model of any family that `load` reads.
        folder: created if needed; existing files of the same names are replaced.
        dtype: "float32", "bfloat16" or "float16" to convert to; None keeps the model's dtype.

    Raises:
        ValueError: if the family cannot express the model, or the folder cannot be written.
    """
    model = model if isinstance(model, Model) else Model.from_decoder(model)
    config, naming = model.config, Naming.of(model.config)
    target = np.dtype(model.bank.dtype) if dtype is None else dtype_named(dtype)
    settings = hf_config(config, target)
    dense = flatten_dict(model.dense)

    def array(key: Any) -> np.ndarray:
        if key in naming.experts:
            expert, name = key
            return np.asarray(getattr(model.bank.unpacked(expert), name))
        return np.asarray(dense[key])

    def value(name: str) -> np.ndarray:
        parts = []
        for source, part in naming.uses[name]:
            assert source.transform.save is not None, f"the first way to name {name} must be one to save"
            parts.append(source.transform.save([array(key) for key in source.keys])[part])
        stacked = naming.uses[name][0][0].tensors[naming.uses[name][0][1]][1] is not None
        return cast(np.stack(parts) if stacked else parts[0], dtypes[name], name)

    dtypes = {
        name: np.dtype(np.float32) if uses[0][0].keys[0] in naming.wide else target
        for name, uses in naming.uses.items()
    }
    replace_files(
        Path(folder),
        {
            SINGLE: lambda file: write_tensors(file, naming.shapes, dtypes, value),
            "config.json": json.dumps(settings, indent=2) + "\n",
        },
    )


def hf_config(config: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    """Returns the `config.json` of a model, with the keys of transformers 5.

    Raises:
        ValueError: naming the settings that its family cannot express.
    """
    family = family_of(config)
    settings = family.write_config(config)
    read_back = dataclasses.asdict(family.read_config(settings))
    lost = [
        f"{key}={value!r} (it would become {read_back[key]!r})"
        for key, value in dataclasses.asdict(config).items()
        if value != read_back[key]
    ]
    if lost:
        raise ValueError(f"{family.architecture} cannot express {', '.join(lost)}; use a family that can")
    named = {"architectures": [family.architecture], "model_type": family.model_type, "dtype": dtype.name}
    return dict(sorted((settings | named).items()))


def read_configs(folder: Path) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
    """Returns what a folder's configs say: the model's shape, `config.json`, and settings of requests."""
    file, generation = folder / "config.json", folder / "generation_config.json"
    raw = read_json(file)
    try:
        config = config_from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    defaults: dict[str, Any] = {}
    if is_there(generation):
        settings = read_json(generation)
        problems = Problems()
        config = problems.check(with_generation, config, settings) or config
        defaults = problems.check(generation_defaults, settings)
        problems.raise_any(str(generation))
    return config, raw, defaults


def _with_head(
    config: ModelConfig, stored: Mapping[str, StoredTensor]
) -> tuple[ModelConfig, Mapping[str, StoredTensor]]:
    """Ties head and embedding as transformers does: only if they are not two different tensors."""
    family = family_of(config)
    embedding, head = family.tensor_of("embedding"), family.tensor_of("head")
    if not config.tie_embeddings or embedding is None or head is None or head not in stored:
        return config, stored
    if embedding not in stored:
        return config, {**stored, embedding: stored[head]}
    if equal(stored[head], stored[embedding]):
        return config, stored
    warnings.warn(
        f"{stored[head].file.parent}: config.json sets tie_word_embeddings, but {head} and {embedding} "
        "differ; both are used, as by transformers",
        stacklevel=3,
    )
    return dataclasses.replace(config, tie_embeddings=False), stored


def common_dtype(
    folder: Path, naming: Naming, stored: Mapping[str, StoredTensor], raw: Mapping[str, Any]
) -> np.dtype:
    """Returns the dtype that all tensors have; if they differ, the one that `config.json` names."""
    codes = {
        stored[name].dtype
        for name, uses in naming.uses.items()
        if naming.dtypes[name] is None and uses[0][0].keys[0] not in naming.wide
    }
    if len(codes) == 1:
        return DTYPES[codes.pop()]
    named = raw.get("dtype") or raw.get("torch_dtype")
    if not isinstance(named, str) or named not in {dtype.name for dtype in DTYPES.values()}:
        raise ValueError(
            f"{folder}: expected tensors of one dtype, or config.json to name a dtype to convert them to; "
            f"got tensors of {', '.join(sorted(codes))} and the dtype {named!r}; choose a dtype with dtype="
        )
    return dtype_named(named)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes where there are many; what it gives counts bytes done."""
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=total < PROGRESS_FROM) as progress:
        task = progress.add_task("loading", total=total)
        yield lambda size: progress.advance(task, size)
