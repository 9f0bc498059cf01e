"""Which checkpoint something was generated with: a name that its files give it, wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

SAMPLES, SAMPLE_BYTES = 64, 4096


def fingerprint(folder: str | Path) -> str:
    """Twelve hexadecimal digits for the configs, the tokenizer and the weights in a folder.

    Of each weight file it reads the size, the header's beginning and evenly spaced samples, so that it takes
    no time beside loading; weights that differ in few places only may share a fingerprint. Files that are
    missing are passed over: `load` refuses them with reasons.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        content = (folder / name).read_bytes() if (folder / name).is_file() else b""
        digest.update(hashlib.sha256(content).digest())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as weights:
            for index in range(SAMPLES):
                weights.seek(max(0, size - SAMPLE_BYTES) * index // (SAMPLES - 1))
                digest.update(weights.read(SAMPLE_BYTES))
    return digest.hexdigest()[:12]
