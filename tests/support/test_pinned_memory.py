"""The limit of pinned host memory is raised before JAX has read it; afterwards, loading says what to set."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from jax._src import xla_bridge

from layerscope_jax import load
from layerscope_jax.checkpoints import model as loading
from layerscope_jax.support.pinned_memory import LIMIT, need_pinned

GPU, CPU = SimpleNamespace(platform="gpu"), SimpleNamespace(platform="cpu")


@pytest.fixture(params=[True, False])
def started(request, monkeypatch):
    """Whether JAX has its devices already."""
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: request.param)
    monkeypatch.setenv(LIMIT, "")  # so that what a test sets is undone
    monkeypatch.delenv(LIMIT)
    return request.param


def test_the_limit_is_raised_or_what_to_set_is_said(started):
    need_pinned(64 << 30, GPU)
    assert LIMIT not in os.environ
    if started:
        with pytest.raises(ValueError, match=rf"take 64\.0 GiB of .* allows 64 GiB: set {LIMIT}=69"):
            need_pinned((64 << 30) + 1, GPU)
        need_pinned(200 << 30, CPU)
        assert LIMIT not in os.environ
    else:
        need_pinned((64 << 30) + 1, GPU)
        assert os.environ[LIMIT] == "69"
        need_pinned(69 << 30, GPU)


def test_a_limit_that_is_set_is_left_alone(started, monkeypatch):
    monkeypatch.setenv(LIMIT, "100")
    need_pinned(100 << 30, GPU)
    with pytest.raises(ValueError, match=f"allows 100 GiB: set {LIMIT}=105"):
        need_pinned(101 << 30, GPU)
    assert os.environ[LIMIT] == "100"


def test_load_asks_for_the_experts_bytes(monkeypatch):
    asked = []
    monkeypatch.setattr(loading, "need_pinned", lambda size, device: asked.append(size))
    model = load(Path(__file__).parents[1] / "golden" / "olmoe", format="bfloat16")
    assert asked == [model.bank.total_bytes]
