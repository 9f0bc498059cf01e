"""Processes that run one engine together (`jax.distributed`): that they were all given the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from layerscope_jax.checkpoints.fingerprint import fingerprint
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


def agree_on_engine(model: Model, config: Any, chat_template: str | None) -> None:
    """Refuses, where several processes share a model, other weights or settings than theirs; see `agree`.

    Budgets and policies may differ: they change when experts are computed, and no sum.

    Args:
        model: the model as it is run.
        config: the engine's `OffloadConfig`.
        chat_template: what makes prompts of messages; None for the checkpoint's.
    """
    if not spans_processes(model.partition):
        return
    assert model.partition is not None
    facts: dict[str, Any] = {
        "model": model.config,
        "checkpoint": None if model.path is None else fingerprint(model.path),
        "devices": model.partition.devices,
        "expert_format": model.bank.format.name,
        "dtype": model.bank.dtype,
        "dense_format": model.dense_format,
        "chat_template": chat_template,
    }
    for name in ("numerics", "max_num_seqs", "prefill_chunk_size", "prefix_cache"):
        facts[name] = getattr(config, name)
    predictor = getattr(config.predictor, "name", config.predictor)
    agree("the model and the settings of an engine", facts | {"predictor": predictor})


@contextmanager
def together(partition: Partition | None, what: str) -> Iterator[None]:
    """Has what raises within the block raise in all processes that share a model.

    A process that went on alone would wait for the others in its first program.

    Args:
        partition: over devices of all processes.
        what: the block's name, for the message.

    Raises:
        ValueError: if another process raised one, naming it.
        RuntimeError: if another process raised anything else, naming it.
    """
    if not spans_processes(partition):
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    kind = 0 if own is None else 1 if isinstance(own, ValueError) else 2
    text = np.zeros(MESSAGE_BYTES, np.uint8)
    message = "" if own is None else str(own) or type(own).__name__
    encoded = np.frombuffer(message.encode()[:MESSAGE_BYTES], np.uint8)
    text[: len(encoded)] = encoded
    kinds, texts = gathered(np.array([kind], np.uint32)), gathered(text)
    if own is not None:
        raise own
    for process in np.flatnonzero(kinds):
        said = bytes(texts[process]).rstrip(b"\0").decode(errors="ignore")
        raise (ValueError if kinds[process, 0] == 1 else RuntimeError)(
            f"{what}, in process {process}: {said}"
        )


MESSAGE_BYTES = 1024
"""Of an error's text, what other processes are told."""


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Waits for all processes, and refuses to go on if they were not given the same.

    Without this, programs of different shapes would wait for each other forever.

    Args:
        what: name of all facts together, for the message.
        facts: by name, in the same order everywhere; compared by their texts.

    Raises:
        ValueError: in every process, naming the facts that differ and the processes where they do.
    """
    texts = {name: str(value) for name, value in facts.items()}
    hashes = np.stack([hashed(f"{name}={text}") for name, text in texts.items()])
    found = gathered(hashes)
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


def gathered(values: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, stacked in the order of their numbers; waits for all of them."""
    from jax.experimental import multihost_utils  # starts a service where there is one process

    found = np.asarray(multihost_utils.process_allgather(values))
    return found.reshape(-1, *values.shape)


def hashed(text: str) -> np.ndarray:
    """Returns the hash of a text as two words.

    >>> hashed("a").dtype, len(hashed("a"))
    (dtype('uint32'), 2)
    """
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint32)
