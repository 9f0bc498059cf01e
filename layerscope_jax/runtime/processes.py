"""Processes that run one engine together (`jax.distributed`): that they were all given the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.offload.partition import Partition


def spans_processes(partition: Partition | None) -> bool:
    """Whether devices of other processes have a part of the experts."""
    return partition is not None and len(partition.local) < len(partition.devices)


def need_one_process(partition: Partition | None, what: str) -> None:
    """Refuses what several processes would do at different times, and so in different steps.

    Raises:
        ValueError: if devices of several processes share the experts.
    """
    if spans_processes(partition):
        raise ValueError(
            f"{what} is for an engine of one process; devices of several share the experts of this one, "
            "which must all make the same calls of generate"
        )


def agree_on_engine(model: Model, config: Any) -> None:
    """Refuses, where several processes share a model, other weights or settings than theirs; see `agree`.

    Budgets and policies may differ: they change when experts are computed, and not in which programs.

    Args:
        model: the model as it is run.
        config: the engine's `OffloadConfig`.
    """
    if not spans_processes(model.partition):
        return
    assert model.partition is not None
    facts: dict[str, Any] = {
        "model": model.config,
        "devices": model.partition.devices,
        "expert_format": model.bank.format.name,
        "dtype": model.bank.dtype,
        "dense_format": model.dense_format,
    }
    for name in ("numerics", "max_num_seqs", "prefill_chunk_size", "prefix_cache"):
        facts[name] = getattr(config, name)
    predictor = getattr(config.predictor, "name", config.predictor)
    agree("the model and the settings of an engine", facts | {"predictor": predictor})


def agree_on_prompts(partition: Partition | None, requests: Sequence[Any]) -> None:
    """Refuses, where several processes share a model, other prompts than theirs; see `agree`."""
    if spans_processes(partition):
        agree("the prompts of a call", {"number of prompts": len(requests)})
        agree("the prompts of a call", {f"prompt {n}": each for n, each in enumerate(requests)})


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Waits for all processes, and refuses to go on if they were not given the same.

    Without this, programs of different shapes would wait for each other forever.

    Args:
        what: name of all facts together, for the message.
        facts: by name, in the same order everywhere; compared by their texts.

    Raises:
        ValueError: in every process, naming the facts that differ and the processes where they do.
    """
    from jax.experimental import multihost_utils  # starts a service where there is one process

    texts = {name: str(value) for name, value in facts.items()}
    hashes = np.stack([hashed(f"{name}={text}") for name, text in texts.items()])
    found = np.asarray(multihost_utils.process_allgather(hashes)).reshape(-1, len(texts), 2)
    differs = (found != found[:1]).any(axis=2)  # [P, F]
    if not differs.any():
        return
    lines = []
    for number, (name, text) in enumerate(texts.items()):
        if differs[:, number].any():
            those = ", ".join(str(process) for process in np.flatnonzero(differs[:, number]))
            lines.append(f"{name} (here {text[:80]!r}; process 0 and process {those} differ)")
    raise ValueError(
        f"{what} must be the same in all {len(found)} processes; this one, {jax.process_index()}, was given "
        f"another {'; '.join(lines)}"
    )


def hashed(text: str) -> np.ndarray:
    """Returns the hash of a text as two words.

    >>> hashed("a").dtype, len(hashed("a"))
    (dtype('uint32'), 2)
    """
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint32)
