"""What a node of a cluster lacks: its worker is lost there, or the job is refused, by the node's name."""

from dataclasses import fields

import pytest

from layerscope_jax import OffloadConfig
from layerscope_jax.distributed.placing import Node, Place
from layerscope_jax.distributed.worker import Failure, Job, Worker, check_copies
from layerscope_jax.generation.device_memory import DeviceNeeds, Room
from layerscope_jax.support import machine

ALONE = Place(Node("a", "a", cpus=8), 0, 1)


def test_a_checkpoint_that_is_not_there_costs_a_node_and_no_job(tmp_path):
    worker = Worker(Job(checkpoint=str(tmp_path / "not mounted"), config=OffloadConfig()), ALONE)
    (said,) = worker.start()
    assert isinstance(said, Failure)
    assert not said.is_refusal
    assert "found no such folder" in said.text


def test_nor_does_an_accelerator_that_somebody_else_uses():
    room = Room(10, DeviceNeeds(**dict.fromkeys([f.name for f in fields(DeviceNeeds)], 20)), 4, 100, 512)
    with pytest.raises(ValueError, match="finds no room") as refused, room.explained():
        pass
    assert not Failure.of(refused.value).is_refusal


def test_engines_that_need_a_copy_of_the_weights_each_are_counted(tmp_path, monkeypatch):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(3 << 30)
    monkeypatch.setattr(machine, "memory_bytes", lambda: 8 << 30)
    eight = Place(Node("a", "a", cpus=8, gpus=8), 0, 8)
    with pytest.raises(ValueError, match=r"3.00 GiB, in 8.00 GiB of memory; give a smaller") as refused:
        check_copies(tmp_path, OffloadConfig(), eight)
    assert Failure.of(refused.value).is_refusal
    check_copies(tmp_path, OffloadConfig(expert_format="int4"), eight)  # how small they get is seen later
    check_copies(tmp_path, OffloadConfig(), Place(Node("a", "a", cpus=8, gpus=2), 0, 2))
    check_copies(tmp_path, OffloadConfig(), Place(Node("a", "a", cpus=8), 0, 8))  # who share a mapped file
