"""Which checkpoint something was generated with: a name that its files give it, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path

from layerscope_jax.checkpoints.manifest import MANIFEST, is_converted
from layerscope_jax.checkpoints.safetensors_io import StoredTensor, stored_tensors
from layerscope_jax.checkpoints.tokenizer_files import VOCABULARIES
from layerscope_jax.checkpoints.tokenizer_settings import SETTINGS
from layerscope_jax.support.files import READ_ONLY, is_there, pread, read_json

WHOLE = 64 << 10
"""Bytes up to which all of a tensor counts."""

SAMPLES, SAMPLE_BYTES = 4, 4096
"""Of a larger one its beginning, its end and parts between them: training changes numbers everywhere."""


def fingerprint(folder: str | Path) -> str:
    """Twelve hexadecimal digits for what a checkpoint computes: configs, tokenizer and every tensor.

    Of each tensor its name, dtype and shape count, and its bytes: all of a small one, samples of a large one,
    so that it takes little time beside loading (below 2 s for the 18,867 tensors of 61 GB). Two checkpoints
    that differ in few numbers of a large tensor may share a fingerprint; two in which any tensor was trained
    do not. How tensors are parted into files does not count.

    Raises:
        ValueError: if the folder lacks a file, or one is damaged.
    """
    folder = Path(folder)
    digest = hashlib.blake2b(digest_size=6)

    def count(*parts: bytes) -> None:
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)

    # Of these all counts, or what has a part in which tokens come out.
    for name, keys in (
        ("config.json", None),
        ("tokenizer.json", None),
        ("generation_config.json", ["eos_token_id"]),
        ("tokenizer_config.json", ["added_tokens_decoder"]),
    ):
        count(_content(folder / name, keys))
    if not is_there(folder / "tokenizer.json") and any(is_there(folder / name) for name in VOCABULARIES):
        for name in (*VOCABULARIES, *SETTINGS):
            count(_content(folder / name, None))
    if is_converted(folder):  # its manifest names the checkpoint that it was made from
        count(_content(folder / MANIFEST, None))
        return digest.hexdigest()
    tensors = stored_tensors(folder)
    with ExitStack() as stack:
        opened: dict[Path, int] = {}
        for name in sorted(tensors):
            tensor = tensors[name]
            if tensor.file not in opened:
                opened[tensor.file] = os.open(tensor.file, READ_ONLY)
                stack.callback(os.close, opened[tensor.file])
            count(name.encode(), tensor.dtype.encode(), repr(tensor.shape).encode())
            for part in _samples(opened[tensor.file], tensor):
                digest.update(part)
    return digest.hexdigest()


def _samples(opened: int, tensor: StoredTensor) -> list[bytes]:
    if tensor.size <= WHOLE:
        return [pread(opened, tensor.size, tensor.start)]
    last = tensor.size - SAMPLE_BYTES
    return [
        pread(opened, SAMPLE_BYTES, tensor.start + last * index // (SAMPLES - 1)) for index in range(SAMPLES)
    ]


def _content(file: Path, keys: list[str] | None) -> bytes:
    if not is_there(file):
        return b""
    if keys is None:
        try:
            return file.read_bytes()
        except OSError as error:
            raise ValueError(f"{file}: expected a file that can be read, got {error.strerror}") from None
    settings = read_json(file)
    return json.dumps({key: settings[key] for key in keys if key in settings}, sort_keys=True).encode()
