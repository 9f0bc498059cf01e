"""A model in memory (`Model`), and its way from and to a Hugging Face folder (`load`, `save`)."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
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

from layerscope_jax.checkpoints.converted import format_of, read_bank, read_dense
from layerscope_jax.checkpoints.headers import Tensor, read_configs, read_headers
from layerscope_jax.checkpoints.hub import folder_of
from layerscope_jax.checkpoints.manifest import Manifest, is_converted
from layerscope_jax.checkpoints.mapped import MappedFiles
from layerscope_jax.checkpoints.ranges import disk_bank
from layerscope_jax.checkpoints.safetensors_io import (
    DTYPES,
    SINGLE,
    cast,
    dtype_named,
    write_tensors,
)
from layerscope_jax.checkpoints.shards import Shards
from layerscope_jax.checkpoints.tensor_reader import TensorReader
from layerscope_jax.checkpoints.tokenizer_files import read_tokenizer
from layerscope_jax.checkpoints.weight_names import Naming, family_of
from layerscope_jax.formats import Buffer, ExpertFormat, format_named
from layerscope_jax.models import Decoder, ExpertParam
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.decoder_layers import RouterWeights, layer_type
from layerscope_jax.offload.bank import ExpertBank, device_sharding
from layerscope_jax.scheduling.plan import Geometry
from layerscope_jax.support.files import replace_files
from layerscope_jax.support.pinned_memory import need_pinned

logger = logging.getLogger(__name__)

IN_PLACE = ("float32", "bfloat16")
"""Dtypes of experts that are mapped."""

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
        mapped: the files that its experts are mapped from; None if all is in memory.

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
    mapped: MappedFiles | None = None

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
        return [layer_type(config, layer).router_of(layers[layer], config) for layer in config.moe_layers]

    def with_format(self, format: str | ExpertFormat) -> Model:
        """The same model with its experts in another format; the experts of both are in memory meanwhile.

        Raises:
            ValueError: if the format does not have what these experts compute, or does not fit their sizes.
        """
        form = format_named(format) if isinstance(format, str) else format
        if form.for_body(self.config.expert_body) == self.bank.format:
            return self
        return dataclasses.replace(self, bank=self.bank.converted(form))

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
    mmap: bool = True,
    experts: Literal["memory", "disk"] = "memory",
) -> Model:
    """Loads a Hugging Face checkpoint of one of the families, or of one that was registered.

    Experts are read straight into pinned host memory, everything else onto the device; apart from these, only
    one tensor at a time is in memory. On a CPU alone, experts that are neither converted nor packed are not
    read but mapped from their files, which must not be written to as long as the model is used
    (`layerscope_jax.checkpoints.mapped`).

    Args:
        folder: holds `config.json`, one or more safetensors files, and optionally a tokenizer's files; or was
            written by `layerscope convert`, which then fixes `dtype` and `format`; or the name of a
            checkpoint on the Hugging Face hub, "organisation/name", which is downloaded into the hub's cache
            (see `layerscope_jax.checkpoints.hub`). What is there as a path is never taken for a name.
        dtype: "float32", "bfloat16" or "float16" to convert to; None keeps the checkpoint's dtype.
        device: device that holds the dense parameters, and whose pinned host memory holds the experts; None
            for the default device.
        format: format in which the experts are stored (`layerscope_jax.formats`), or its name; None keeps
            those that the checkpoint holds quantised as they are, and others in the dtype of the other
            weights. Other quantised weights are converted to that dtype while they are read.
        revision: branch, tag or commit of a checkpoint on the hub; None for its main branch.
        mmap: False to read experts that would be mapped: from a disk that is slow or will be taken away, or
            files that will be written to.
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
    if not isinstance(mmap, bool):
        raise ValueError(f"mmap must be True or False, got {mmap!r}")
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
    on_disk = experts == "disk"
    if is_converted(folder):
        if on_disk:
            raise ValueError(
                f"{folder} is a converted checkpoint, whose experts cannot stay on the disk; load it with "
                "experts='memory', or the checkpoint that it was made from with experts='disk'"
            )
        return _load_converted(folder, dtype, device, form)
    config, raw, generation, naming, stored, target, form, as_stored = read_headers(folder, dtype, form)
    if on_disk and form is not None:
        raise ValueError(
            f"{folder} holds its experts in the format {form.name!r}, and experts='disk' takes those of one "
            "float type; load it with experts='memory'"
        )
    size = config.num_moe_layers * config.num_experts * packed_bytes(config, form, target)
    if not on_disk:
        need_pinned(size, device)
    in_place = mmap and not on_disk and form is None and on_cpu(device)
    in_place = in_place and are_as_stored(naming, stored, target)
    mapped = MappedFiles() if in_place else None
    unread = disk_bank(config, naming, stored, target, device) if on_disk else None
    with loading(stored, less=0 if unread is None else unread.total_bytes) as advance, Shards() as shards:
        reader = TensorReader(naming, stored, shards, target, advance, mapped, packed=as_stored)
        sharding = device_sharding(device)
        dense = {
            path: jax.block_until_ready(jax.device_put(array, sharding))
            for source in naming.dense
            for path, array in reader.arrays(source).items()
        }
        bank = unread or ExpertBank.build(
            config,
            lambda expert, array, _: reader.array(naming.experts[expert, array], (expert, array)),
            device,
            form,
            in_place,
            target if as_stored else None,
        )
    return Model(
        config,
        naming.graphdef,
        unflatten_dict(dense),
        bank,
        read_tokenizer(folder, config.vocab_size, raw.get("model_type")),
        folder,
        generation,
        mapped,
    )


def packed_bytes(config: ModelConfig, form: ExpertFormat | None, dtype: np.dtype) -> int:
    """Returns the size (bytes) of an expert in a format, or as matrices of a dtype."""
    form = (form or format_named(dtype.name)).for_body(config.expert_body)
    return form.expert_bytes(config.hidden_size, config.moe_intermediate_size)


def are_as_stored(naming: Naming, stored: Mapping[str, Tensor], dtype: np.dtype) -> bool:
    """Whether experts of a dtype are those of a checkpoint's tensors, and can be computed where they lie.

    Our own loops read experts wherever they lie; XLA, which computes the others, would copy them each time.
    """
    names = {name for source in naming.experts.values() for name, _ in source.tensors}
    return dtype.name in IN_PLACE and all(DTYPES.get(stored[name].dtype) == dtype for name in names)


def on_cpu(device: jax.Device | None) -> bool:
    """Whether a device, or the default one, is this machine's CPU."""
    return (device or jax.devices()[0]).platform == "cpu"


def _load_converted(
    folder: Path, dtype: str | None, device: jax.Device | None, form: ExpertFormat | None
) -> Model:
    """`load` of a folder that `layerscope convert` wrote."""
    manifest = Manifest.read(folder)
    if dtype not in (None, manifest.dtype) or (form is not None and form.name != manifest.format):
        raise ValueError(
            f"{folder} was converted to experts in {manifest.format} and other weights in {manifest.dtype}; "
            "leave dtype and format out, or convert the original checkpoint to what you need"
        )
    config, raw, generation = read_configs(folder)
    config = dataclasses.replace(config, tie_embeddings=manifest.head == "tied")
    naming, target = Naming.of(config), dtype_named(manifest.dtype)
    count = config.num_moe_layers * config.num_experts
    need_pinned(count * packed_bytes(config, format_of(folder, manifest, config), target), device)
    shapes = {
        path: Buffer(shape, np.dtype(np.float32) if path in naming.wide else target)
        for path, shape in naming.parameters.items()
    }
    names = {path: ".".join(map(str, path)) for path in shapes}
    dense = read_dense(folder, {names[path]: buffer for path, buffer in shapes.items()}, device)
    return Model(
        config,
        naming.graphdef,
        unflatten_dict({path: dense[name] for path, name in names.items()}),
        read_bank(folder, manifest, config, device),
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
    return dict(sorted((named | settings).items()))


@contextmanager
def loading(stored: Mapping[str, Tensor], less: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar while large tensors are read; what it gives counts bytes that are done.

    Args:
        stored: the tensors.
        less: bytes of them that are not read.
    """
    total = sum(tensor.size for tensor in stored.values()) - less
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=total < PROGRESS_FROM) as progress:
        task = progress.add_task("loading", total=total)
        yield lambda size: progress.advance(task, size)
