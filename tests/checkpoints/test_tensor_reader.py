"""What is read is JAX's without a copy, and memory is read into again only when nobody holds it."""

from pathlib import Path

import jax
import numpy as np

from layerscope_jax.checkpoints.model import read_configs
from layerscope_jax.checkpoints.safetensors_io import stored_tensors
from layerscope_jax.checkpoints.tensor_reader import TensorReader
from layerscope_jax.checkpoints.weight_names import Naming
from layerscope_jax.offload.bank import host_sharding
from layerscope_jax.scheduling.plan import ExpertId

OLMOE = Path(__file__).parents[1] / "golden" / "olmoe"


def test_tensors_are_taken_over_and_never_written_over_while_somebody_holds_them():
    config, *_ = read_configs(OLMOE)
    naming = Naming.of(config)
    reader = TensorReader(naming, stored_tensors(OLMOE), np.dtype(np.float32))

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
