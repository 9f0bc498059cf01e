"""Experts and threads on a host of several NUMA nodes, whose topology is made up."""

import mmap
import os
import threading

import jax
import numpy as np
import pytest
from helpers import random_model

from layerscope_jax import Engine, ExpertId, OffloadConfig
from layerscope_jax.offload.bank import ExpertBank
from layerscope_jax.profiling.checkup import memory
from layerscope_jax.support import numa
from layerscope_jax.support.numa import Node

PAGE = os.sysconf("SC_PAGE_SIZE")


def described(folder, **nodes):
    """Writes what Linux says of nodes: name -> list of cores."""
    for name, cpus in nodes.items():
        (folder / name).mkdir()
        (folder / name / "cpulist").write_text(f"{cpus}\n")
        (folder / name / "meminfo").write_text(
            f"Node {name[4:]} MemTotal:  {1000 + len(name)} kB\nNode 0 x: 1 kB\n"
        )
    return folder


@pytest.fixture
def two_nodes(monkeypatch):
    """Two nodes that share this machine's cores."""
    cores = frozenset(os.sched_getaffinity(0))
    found = (Node(0, cores), Node(1, cores))
    monkeypatch.setattr(numa, "nodes", lambda: found)
    return found


def test_nodes_are_those_with_cores_that_this_process_may_use(tmp_path):
    system = described(tmp_path, node0="0-3", node1="4-7", node10="8,10-11", node2="")
    assert numa.read_nodes(system, {0, 1, 10}) == (
        Node(0, frozenset({0, 1}), 1005 * 1024),
        Node(10, frozenset({10}), 1006 * 1024),
    )
    assert numa.read_nodes(tmp_path / "none", {0}) == ()


def test_a_file_that_says_nothing_known_is_passed_over(tmp_path):
    system = described(tmp_path, node0="0-3", node1="what")
    assert [node.number for node in numa.read_nodes(system, {0})] == [0]


def test_experts_and_threads_are_dealt_out(two_nodes):
    assert [numa.home(expert) for expert in range(4)] == [0, 1, 0, 1]
    assert [places.tolist() for places in numa.by_node([3, 2, 5])] == [[1], [0, 2]]
    orders = {}

    def join(number):
        numa.join_node(number)
        orders[number] = numa.own_first(2)

    threads = [threading.Thread(target=join, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    assert orders == {0: [0, 1], 1: [1, 0], 2: [0, 1]}
    said = numa.plan(5)
    assert "node 0: 3 of 5 threads" in said
    assert "node 1: 2 of 5 threads" in said


def test_one_node_is_left_alone():
    if numa.nodes():
        pytest.skip("this host has several")
    assert numa.plan(8) == ""
    before = os.sched_getaffinity(0)
    numa.join_node(3)
    numa.keep_near(1, [np.zeros(10 * PAGE, np.uint8)])
    assert os.sched_getaffinity(0) == before


def test_each_expert_is_moved_whole_to_its_node(two_nodes, monkeypatch):
    moved = []
    monkeypatch.setattr(numa, "move", lambda address, size, node: moved.append((address, size, node)))
    model = random_model(seed=3)
    moved.clear()
    bank = ExpertBank.build(
        model.config, lambda expert, name, shape: np.full(shape, expert.expert, np.float32)
    )
    expected = [
        (view.ctypes.data, view.nbytes, expert.expert % 2)
        for expert in bank
        for view in bank.views(ExpertId(*expert))
    ]
    assert moved == expected


def test_whole_pages_are_moved_and_keep_what_they_hold():
    memory = np.frombuffer(mmap.mmap(-1, 6 * PAGE), np.uint8)
    memory[:] = np.arange(memory.size) % 251
    before = memory.copy()
    if not numa.move(memory.ctypes.data + 10, memory.size - 10, 0):
        pytest.skip("this system moves no pages")
    np.testing.assert_array_equal(memory, before)
    assert not numa.move(memory.ctypes.data + 10, PAGE, 0)  # no whole page
    assert not numa.move(memory.ctypes.data, memory.size, 1000)  # there is no such node


@pytest.mark.parametrize("policy", ["host-only", "fiddler"])
def test_tokens_are_those_of_one_node(two_nodes, policy):
    model, prompts = random_model(seed=12), [[1, 2, 3], list(range(16))]
    size = 4 * model.bank.expert_bytes
    config = OffloadConfig(device_budget=size, policy=policy, host_threads=3)
    with Engine(model, config) as engine:
        several = engine.generate(prompts, max_new_tokens=6, logprobs=1)
    numa_nodes, numa.nodes = numa.nodes, lambda: ()
    try:
        with Engine(model, config) as engine:
            one = engine.generate(prompts, max_new_tokens=6, logprobs=1)
    finally:
        numa.nodes = numa_nodes
    assert several.token_ids == one.token_ids
    assert [[t.logprob for t in c.logprobs] for c in several] == [
        [t.logprob for t in c.logprobs] for c in one
    ]


def test_doctor_says_where_things_go(two_nodes):
    found = {finding.name: finding.told for finding in memory(jax.devices()[0])}
    assert "experts 1, 3, 5, ..." in found["NUMA"]
