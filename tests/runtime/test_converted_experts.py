"""Packed experts of a converted checkpoint: read, mapped or left on the disk, with the same bits."""

import os

import jax
import numpy as np
import pytest
from exact_cases import agree, run
from helpers import PROFILE, SMALLEST, random_decoder

from layerscope_jax import Engine, ModelConfig, OffloadConfig, ReadError, load, save
from layerscope_jax.checkpoints import model as loading
from layerscope_jax.checkpoints.convert import convert
from layerscope_jax.offload.disk import DiskBank

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCHES = [[[3, 5, 7], [11]]]
CONFIG = ModelConfig(
    **vars(SMALLEST) | {"hidden_size": 32, "head_dim": 16, "moe_intermediate_size": 32, "stop_token_ids": ()}
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "source"
    save(random_decoder(CONFIG), folder, dtype="bfloat16")
    return folder


@pytest.mark.parametrize("name", ["int4", "nvfp4"])  # whose last array is a single number: JAX cannot take it
def test_they_give_the_bits_of_experts_packed_in_memory(source, tmp_path, name):
    convert(source, tmp_path / "out", experts=name, dense="int8")
    expected_model = load(source, format=name, dense_format="int8")
    size = expected_model.bank.expert_bytes
    read, mapped = load(tmp_path / "out", mmap=False), load(tmp_path / "out")
    disk = load(tmp_path / "out", experts="disk")
    assert (read.mapped, disk.mapped) == (None, None)
    assert mapped.mapped is not None
    assert isinstance(disk.bank, DiskBank)
    kinds = {type(array) for expert in mapped.bank for array in mapped.bank[expert]}
    assert (np.ndarray in kinds) == (name == "nvfp4")
    for model in (read, mapped, disk):
        assert (model.bank.format, model.bank.total_bytes) == (expected_model.bank.format, 8 * size)
        jax.tree.map(np.testing.assert_array_equal, model.dense, expected_model.dense)
        for expert in expected_model.bank:
            views = zip(model.bank.views(expert), expected_model.bank.views(expert), strict=True)
            for array, other in views:
                np.testing.assert_array_equal(array, other)
    with Engine(expected_model) as engine:
        expected = run(engine, BATCHES, 3)
    for policy, slots in (("host-only", 0), ("lru", 5)):
        device = OffloadConfig(device_budget=slots * size, policy=policy, profile=PROFILE)
        staged = OffloadConfig(
            device_budget=slots * size, host_budget=3 * size, policy=policy, profile=PROFILE
        )
        for model, config in ((mapped, device), (disk, staged)):
            with Engine(model, config) as engine:
                agree(run(engine, BATCHES, 3), expected)


def test_a_file_that_is_written_to_is_refused(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "out", experts="int4")
    model, disk = load(tmp_path / "out"), load(tmp_path / "out", experts="disk")
    file = next((tmp_path / "out" / "experts" / "00000" / "state").glob("gate_q/c/0/0/0"))
    content = file.read_bytes()
    file.write_bytes(b"\1" + content[1:])
    os.utime(file, ns=(0, 0))
    with pytest.raises(ValueError, match=r"gate_q/c/0/0/0 was changed while a model was using it"):
        Engine(model)
    config = OffloadConfig(policy="host-only", host_budget=4 * disk.bank.expert_bytes)
    with pytest.raises(ReadError, match=r"gate_q/c/0/0/0 was changed"), Engine(disk, config) as engine:
        engine.generate([[1, 2]], max_new_tokens=2)
    monkeypatch.setattr(loading, "on_cpu", lambda device: False)
    assert load(tmp_path / "out").mapped is None
