"""What is read is JAX's without a copy, and memory is read into again only when nobody holds it."""

import os
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from layerscope_jax.checkpoints import shards as shards_module
from layerscope_jax.checkpoints.headers import read_configs
from layerscope_jax.checkpoints.safetensors_io import stored_tensors
from layerscope_jax.checkpoints.shards import Shards
from layerscope_jax.checkpoints.tensor_reader import TensorReader
from layerscope_jax.checkpoints.weight_names import Naming
from layerscope_jax.offload.bank import ALIGNED, host_sharding
from layerscope_jax.offload.memory import BLOCK_BYTES, Memory
from layerscope_jax.scheduling.plan import ExpertId

OLMOE = Path(__file__).parents[1] / "golden" / "olmoe"


def test_tensors_are_taken_over_and_never_written_over_while_somebody_holds_them():
    config, *_ = read_configs(OLMOE)
    naming = Naming.of(config)
    shards = Shards()
    reader = TensorReader(naming, stored_tensors(OLMOE), shards, np.dtype(np.float32))

    def read(expert, name="gate"):
        key = ExpertId(0, expert), name
        return reader.array(naming.experts[key], key)

    first, second = read(0), read(1)
    assert not np.may_share_memory(first, second)
    taken = [jax.device_put(array, host_sharding()) for array in (first, second)]
    for array, source in zip(taken, (first, second), strict=True):
        assert array.unsafe_buffer_pointer() == source.ctypes.data
    kept, place = [first.copy(), second.copy()], second.ctypes.data
    del first, second, source
    third = read(2)  # JAX holds both
    for array, expected in zip(taken, kept, strict=True):
        np.testing.assert_array_equal(array, expected)
    assert third.ctypes.data != place
    place = third.ctypes.data
    del third
    assert read(3).ctypes.data == place
    shards.close()


def test_memory_of_large_tensors_is_that_of_their_own_alone():
    memory = Memory()
    small = memory.take(100)
    large = memory.take(BLOCK_BYTES + 1)
    small[:], large[:] = 1, 2
    assert not np.may_share_memory(small, memory.take(100))
    assert (small == 1).all()
    assert large.ctypes.data % ALIGNED == 0 == small.ctypes.data % ALIGNED


def test_pieces_that_several_threads_read_make_the_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "PIECE_BYTES", 7)
    numbers = np.random.default_rng(0).random((50, 9), np.float32)
    safetensors.numpy.save_file({"a": numbers, "b": numbers + 1}, tmp_path / "model.safetensors")
    tensors, before = stored_tensors(tmp_path), threading.active_count()
    with Shards(threads=3) as shards:
        for name, expected in (("a", numbers), ("b", numbers + 1)):
            buffer = np.empty(expected.nbytes, np.uint8)
            shards.read_into(tensors[name], buffer)
            np.testing.assert_array_equal(tensors[name].array(buffer), expected)
        os.truncate(tmp_path / "model.safetensors", tensors["b"].start + 100)
        with pytest.raises(ValueError, match=r"model\.safetensors was cut off while it was read"):
            shards.read_into(tensors["b"], buffer)
        with pytest.raises(ValueError, match=r"model\.safetensors was changed while it was read"):
            shards.read_into(tensors["a"], buffer)
    assert threading.active_count() == before
