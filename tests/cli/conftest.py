"""A checkpoint and prompts for the command line."""

from dataclasses import replace

import pytest
from command_lines import PROMPTS, write
from helpers import TINY, random_decoder

import layerscope_jax
from layerscope_jax.cli import demo
from tools.shipped_model.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer([row["prompt"] for row in demo.read_demo_prompts()], vocabulary=600)
    config = replace(TINY, vocab_size=600, num_layers=2, max_position_embeddings=256, qk_norm="all")
    layerscope_jax.save(random_decoder(config), folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


@pytest.fixture
def prompts(tmp_path):
    """A file of four prompts."""
    return write(tmp_path / "prompts.jsonl", PROMPTS)
