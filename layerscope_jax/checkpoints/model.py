"""A model in memory (`Model`), and its way there from a folder (`load`)."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from tokenizers import Tokenizer

from layerscope_jax.checkpoints.converted import Converted, mapping, reading
from layerscope_jax.checkpoints.dense_weights import (
    check_dense_format,
    dense_format_of,
    numbers,
    on_device,
    packed,
)
from layerscope_jax.checkpoints.headers import read_headers
from layerscope_jax.checkpoints.hub import folder_of
from layerscope_jax.checkpoints.manifest import is_converted
from layerscope_jax.checkpoints.mapped import MappedFiles, are_as_stored, maps_by_default
from layerscope_jax.checkpoints.progress import loading
from layerscope_jax.checkpoints.ranges import disk_bank
from layerscope_jax.checkpoints.shards import Shards
from layerscope_jax.checkpoints.tensor_reader import TensorReader
from layerscope_jax.checkpoints.tokenizer_files import read_tokenizer
from layerscope_jax.checkpoints.weight_names import Naming
from layerscope_jax.formats import ExpertFormat, format_named
from layerscope_jax.models import Decoder, ExpertParam
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.decoder_layers import RouterWeights, layer_type
from layerscope_jax.offload.bank import ExpertBank, device_sharding, held_experts
from layerscope_jax.offload.partition import Partition, of_device
from layerscope_jax.scheduling.plan import Geometry
from layerscope_jax.support.pinned_memory import need_pinned

logger = logging.getLogger(__name__)


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
        partition: which of several devices owns which experts; None for one device.

    >>> model = load("shipped")
    >>> sorted(model.dense), model.bank.total_bytes
    (['embedding', 'head', 'layers', 'norm'], 18874368)
    """

    config: ModelConfig
    graphdef: nnx.GraphDef
    dense: dict[str, Any]
    bank: ExpertBank
    tokenizer: Tokenizer | None = None
    path: Path | None = None
    generation_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mapped: MappedFiles | None = None
    partition: Partition | None = None

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
        """Where the dense parameters are; of several devices this process's first one."""
        if self.partition is not None:
            return self.partition.first
        return next(iter(jax.tree.leaves(self.dense)[0].devices()))

    @property
    def place(self) -> jax.Device | NamedSharding:
        """Where arrays lie that are computed with the dense parameters: their device, or all of them."""
        return self.device if self.partition is None else self.partition.replicated

    def put(self, tree: Any) -> Any:
        """Returns arrays, the same in every process, at the model's `place`."""
        if self.partition is not None:
            return self.partition.replicate(tree)
        return jax.device_put(tree, device_sharding(self.device))

    @property
    def own_bytes(self) -> int:
        """Size (bytes) of the experts that one device owns: of all, unless several devices share them."""
        return self.bank.total_bytes // (1 if self.partition is None else len(self.partition.local))

    def over(self, devices: int | Sequence[jax.Device]) -> Model:
        """The same model with its experts parted among devices of this process, and the rest on each.

        A checkpoint is better loaded so (`load(devices=)`): then each expert is in the pinned memory of its
        own device from the start.

        Raises:
            ValueError: as of `Partition`.
        """
        partition = Partition.over(devices, self.config.num_experts)
        if len(partition.local) < len(partition.devices):
            raise ValueError("devices of several processes: load the model in each, with load(devices=)")
        return self._replicated(partition)

    def _replicated(self, partition: Partition) -> Model:
        dense = partition.replicate(self.dense)
        return dataclasses.replace(self, dense=dense, partition=partition)

    def on_one(self) -> Model:
        """The same model as its first device has it, with all experts; for timing and tests.

        Where this process does not hold all of them, those that it holds stand for the others too.
        """
        if self.partition is None:
            return self
        dense = jax.tree.map(lambda array: of_device(array, self.device), self.dense)
        bank, times = self.bank, self.config.num_experts // self.bank.num_experts
        if times > 1:
            bank = bank.repeated(times)
        return dataclasses.replace(self, dense=dense, bank=bank, partition=None)

    def geometry(self, slots: int) -> Geometry:
        """Returns what a policy must know of the model, with room for `slots` experts on the device."""
        config = self.config
        return Geometry(
            num_layers=config.num_moe_layers,
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
            expert_bytes=self.bank.expert_bytes,
            arrays_per_expert=self.bank.arrays_per_expert,
            slots=slots,
        )

    def routers(self) -> list[RouterWeights]:
        """The router of each MoE layer, and the norm whose output it reads, on the device."""
        config, layers = self.config, self.dense["layers"]
        return [layer_type(config, layer).router_of(layers[layer], config) for layer in config.moe_layers]

    def with_format(self, format: str | ExpertFormat) -> Model:
        """The same model with its experts in another format; the experts of both are in memory meanwhile.

        Raises:
            ValueError: if the format does not support the kind of these experts, or their sizes.
        """
        form = format_named(format) if isinstance(format, str) else format
        if form.for_body(self.config.expert_body) == self.bank.format:
            return self
        return dataclasses.replace(self, bank=self.bank.converted(form))

    def prepared(self, expert_format: str | None, dense_format: str | None) -> Model:
        """The same model in the formats that an engine is to run it in; None for those that it has.

        Raises:
            ValueError: as of `with_format` and `with_dense_format`; and if files that its experts are mapped
                from have changed.
        """
        if self.mapped is not None:
            self.mapped.check()
        model = self if expert_format is None else self.with_format(expert_format)
        return model if dense_format is None else model.with_dense_format(dense_format)

    @property
    def dense_format(self) -> str | None:
        """Name of the format that the matrices of its dense layers are packed in; None if they are plain."""
        return dense_format_of(self.dense)

    @property
    def dense_bytes(self) -> int:
        """Size (bytes) of the dense parameters, on the device."""
        return sum(array.nbytes for array in jax.tree.leaves(self.dense))

    def with_dense_format(self, format: str) -> Model:
        """The same model with the matrices of its dense layers packed; both are in memory meanwhile.

        Raises:
            ValueError: if there is no such format.
        """
        check_dense_format(format)
        if self.dense_format == format:
            return self
        matrices, sharding = Naming.of(self.config).matrices, device_sharding(self.device)
        dense = {
            path: on_device(packed(numbers(weights), self.bank.dtype), sharding)
            if path in matrices
            else weights
            for path, weights in flatten_dict(self.on_one().dense).items()
        }
        changed = dataclasses.replace(self, dense=unflatten_dict(dense), partition=None)
        return changed if self.partition is None else changed._replicated(self.partition)

    def whole(self) -> Decoder:
        """The decoder with every expert on the device, unpacked: the oracle of the engine's tests."""
        layers = range(self.config.num_moe_layers)
        experts = {"experts": {layer: self.bank.stacked(layer, self.device)._asdict() for layer in layers}}
        return nnx.merge(self.graphdef, self.on_one().dense | experts)


def load(
    folder: str | Path,
    *,
    dtype: str | None = None,
    device: jax.Device | None = None,
    devices: int | Sequence[jax.Device] | None = None,
    format: str | ExpertFormat | None = None,
    dense_format: str | None = None,
    revision: str | None = None,
    mmap: bool | None = None,
    experts: Literal["memory", "disk"] = "memory",
) -> Model:
    """Loads a Hugging Face checkpoint of one of the families, or of one that was registered.

    Experts are read straight into pinned host memory, everything else onto the device; apart from these, only
    one tensor at a time is in memory. On a CPU alone, experts that lie in their files as they are computed
    from (plain ones that are not converted, and those that `layerscope convert` packed) are not read but
    mapped from there; the files must not be written to as long as the model is used
    (`layerscope_jax.checkpoints.mapped`).

    Args:
        folder: holds `config.json`, one or more safetensors files, and optionally a tokenizer's files; or was
            written by `layerscope convert`, which then fixes `dtype`, `format` and `dense_format`; or the
            name of a checkpoint on the Hugging Face hub, "organisation/name", which is downloaded into the
            hub's cache (see `layerscope_jax.checkpoints.hub`); or "shipped", the model in the package. What
            is there as a path is never taken for a name.
        dtype: "float32", "bfloat16" or "float16" to convert to; None keeps the checkpoint's dtype.
        device: device that holds the dense parameters, and whose pinned host memory holds the experts; None
            for the default device.
        devices: several devices instead, or how many of `jax.devices()`: each owns as many experts of every
            layer, and holds all the rest (`layerscope_jax.offload.partition`). Each of several processes
            (`jax.distributed`) reads the experts of its own devices alone.
        format: format in which the experts are stored (`layerscope_jax.formats`), or its name; None keeps
            those that the checkpoint holds quantised as they are, and others in the dtype of the other
            weights. Other quantised weights are converted to that dtype while they are read.
        dense_format: "int8" to pack the matrices of dense layers (`layerscope_jax.models.matrices`):
            projections of attention, shared experts, dense networks, and the head, with the embedding where
            that is the head; norms, routers and latent attention's matrices of heads stay as they are. None
            for the dtype of the other weights.
        revision: branch, tag or commit of a checkpoint on the hub; None for its main branch.
        mmap: False to read experts that would be mapped: from a disk that is slow or will be taken away, or
            files that will be written to. None maps them, but for a host of several NUMA nodes with memory
            for them, where each is read to its node.
        experts: "memory" to read the experts now; "disk" to leave them in the checkpoint's files, from which
            an engine reads those that it needs into as much host memory as `OffloadConfig.host_budget` says.
            The files must hold them as they are computed from: safetensors of one float type, none to be
            converted, or what `layerscope convert` wrote, in any format.

    Returns:
        The model, for `Engine`.

    Warns:
        UserWarning: about files and tensors that are ignored, and about an output head that differs from the
            embedding although the config ties the two.

    Raises:
        ValueError: if the folder is incomplete, damaged or not supported, naming all wrong tensors; or if a
            checkpoint on the hub cannot be had.
    """
    if not isinstance(mmap, bool | None):
        raise ValueError(f"mmap must be True, False or None, got {mmap!r}")
    form = format_named(format) if isinstance(format, str) else format
    if not isinstance(form, ExpertFormat | None):
        raise ValueError(f"format must be an ExpertFormat, the name of one or None, got {format!r}")
    if experts not in ("memory", "disk"):
        raise ValueError(f"experts must be 'memory' or 'disk', got {experts!r}")
    check_dense_format(dense_format)
    if experts == "disk" and form is not None:
        raise ValueError(
            "experts='disk' computes experts as their files hold them, and cannot have the format "
            f"{form.name!r}; leave out format=, or convert the checkpoint once (layerscope convert "
            f"--expert-format {form.name})"
        )
    on_disk = experts == "disk"
    if devices is not None and (device is not None or on_disk):
        other = "device" if device is not None else "experts='disk'"
        raise ValueError(f"devices cannot be given together with {other}; leave one of them out")
    folder = folder_of(folder, revision)
    mmap = maps_by_default(folder) if mmap is None else mmap
    if is_converted(folder):
        return _load_converted(folder, dtype, device, devices, form, dense_format, mmap, on_disk)
    config, raw, generation, naming, stored, target, form, as_stored = read_headers(folder, dtype, form)
    if on_disk and form is not None:
        raise ValueError(
            f"{folder} holds its experts in the format {form.name!r}, and experts='disk' takes those of one "
            "float type, or of what layerscope convert wrote: convert it, or load it with experts='memory'"
        )
    partition = None if devices is None else Partition.over(devices, config.num_experts)
    device = device if partition is None else partition.first
    if not on_disk:
        kind = (form or format_named(target.name)).for_body(config.expert_body)
        size = kind.expert_bytes(config.hidden_size, config.moe_intermediate_size)
        need_pinned(config.num_moe_layers * len(held_experts(config, partition)) * size, device)
    in_place = mmap and not on_disk and form is None and on_cpu(device)
    in_place = in_place and are_as_stored(naming, stored, target)
    mapped = MappedFiles() if in_place else None
    unread = disk_bank(config, naming, stored, target, device) if on_disk else None
    total = sum(tensor.size for tensor in stored.values()) - (0 if unread is None else unread.total_bytes)
    with loading(total) as advance, Shards() as shards:
        reader = TensorReader(naming, stored, shards, target, advance, mapped, packed=as_stored)
        sharding = device_sharding(device)
        dense = {
            path: on_device(
                packed(array, target) if dense_format is not None and path in naming.matrices else array,
                sharding,
            )
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
            partition,
        )
    tokenizer = read_tokenizer(folder, config.vocab_size, raw.get("model_type"))
    model = Model(config, naming.graphdef, unflatten_dict(dense), bank, tokenizer, folder, generation, mapped)
    return model if partition is None else model._replicated(partition)


def on_cpu(device: jax.Device | None) -> bool:
    """Whether a device, or the default one, is this machine's CPU."""
    return (device or jax.devices()[0]).platform == "cpu"


def _load_converted(
    folder: Path,
    dtype: str | None,
    device: jax.Device | None,
    devices: int | Sequence[jax.Device] | None,
    form: ExpertFormat | None,
    dense_format: str | None,
    mmap: bool,
    on_disk: bool,
) -> Model:
    """`load` of a folder that `layerscope convert` wrote."""
    held = Converted.open(folder)
    manifest = held.manifest
    other_form = form is not None and form.name != manifest.format
    if dtype not in (None, manifest.dtype) or other_form or dense_format not in (None, manifest.dense):
        raise ValueError(
            f"{folder} was converted to experts in {manifest.format}, dense layers in {manifest.dense} and "
            f"other weights in {manifest.dtype}; leave dtype, format and dense_format out, or convert the "
            "original checkpoint to what you need"
        )
    partition = None if devices is None else Partition.over(devices, held.config.num_experts)
    device = device if partition is None else partition.first
    in_memory = not on_disk
    if in_memory:
        share = len(held_experts(held.config, partition)) / held.config.num_experts
        need_pinned(int(share * held.expert_bytes), device)
    in_place = mmap and in_memory and on_cpu(device) and held.can_be_mapped
    mapped = MappedFiles() if in_place else None
    total = held.dense_bytes() + (held.expert_bytes if in_memory and mapped is None else 0)
    with loading(total) as advance, Shards() as shards:
        read = reading(shards, advance)
        dense = held.dense_weights(read, device)
        bank: ExpertBank
        if on_disk:
            bank = held.disk_bank(device)
        else:
            bank = held.bank(read if mapped is None else mapping(mapped), device, in_place, partition)
    tokenizer = read_tokenizer(folder, held.config.vocab_size, held.raw.get("model_type"))
    model = Model(held.config, held.naming.graphdef, dense, bank, tokenizer, folder, held.generation, mapped)
    return model if partition is None else model._replicated(partition)
