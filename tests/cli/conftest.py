"""A checkpoint and prompts for the command line."""

import pytest
from command_lines import PROMPTS, write
from fitting import without_weights
from small_checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random checkpoint with a tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def prompts(tmp_path):
    """A file of four prompts."""
    return write(tmp_path / "prompts.jsonl", PROMPTS)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """Qwen3-30B-A3B without its weights."""
    return without_weights(tmp_path_factory.mktemp("qwen3"))
