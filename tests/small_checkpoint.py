"""A random checkpoint with a tokenizer, for tests of commands and examples."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers import TINY, random_decoder

import layerscope_jax
from layerscope_jax.cli import demo
from tools.shipped_model.tokenizer import train_tokenizer


def write_checkpoint(folder: Path, **changes: Any) -> Path:
    """Writes a checkpoint of two layers, or with other settings, into a folder, and returns the folder."""
    tokenizer = train_tokenizer([row["prompt"] for row in demo.read_demo_prompts()], vocabulary=600)
    config = replace(TINY, vocab_size=600, num_layers=2, max_position_embeddings=256, qk_norm="all")
    config = replace(config, **changes)
    layerscope_jax.save(random_decoder(config), folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder
