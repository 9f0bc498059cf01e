"""A checkpoint for jobs."""

import pytest
from small_checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random checkpoint with a tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))
