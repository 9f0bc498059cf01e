"""Experts and threads on a host of several NUMA nodes, whose topology is made up."""

import mmap
import os
import threading

import jax
import numpy as np
import pytest
from helpers import random_model

from layerscope_jax import Engine, ExpertId, OffloadConfig
from layerscope_jax.checkpoints.mapped import maps_by_default
from layerscope_jax.cli import main as cli
from layerscope_jax.kernels import crew
from layerscope_jax.offload.bank import ExpertBank
from layerscope_jax.profiling.checkup import memory
from layerscope_jax.support import machine, numa
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
    """Two nodes with half of this machine's cores each; with the same one, if there are no two."""
    cores = sorted(os.sched_getaffinity(0))
    found = Node(0, frozenset(cores[::2])), Node(1, frozenset(cores[1::2] or cores))
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
    assert "node 0 (0.0 MiB): 3 of 5 threads" in said
    assert "node 1 (0.0 MiB): 2 of 5 threads" in said


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


@pytest.mark.parametrize("policy", ["host-only", "fiddler", "resident"])
def test_tokens_are_those_of_one_node(two_nodes, policy):
    model, prompts = random_model(seed=12), [[1, 2, 3], list(range(16))]
    size = None if policy == "resident" else 4 * model.bank.expert_bytes
    config = OffloadConfig(device_budget=size, policy=policy, host_threads=3)
    with Engine(model, config) as engine:
        several = engine.generate(prompts, max_new_tokens=6, logprobs=1)
        assert engine.runner.host_experts.inside._crew.pool[crew.OF_NODES] == 2
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


def test_helpers_inside_programs_stay_with_their_nodes(two_nodes):
    found = {}
    helpers = crew.Crew(3)
    for thread in helpers._threads:
        found[thread.name] = os.sched_getaffinity(thread.native_id)
    helpers.close()
    assert found == {f"layerscope-crew_{n}": two_nodes[(n + 1) % 2].cpus for n in range(3)}


def test_a_thread_knows_the_node_of_its_core(two_nodes):
    cores, found = numa.by_core(), []
    job = np.zeros(crew.SIZE, np.int64)
    job[[crew.NODES, crew.NEAR]] = 2, cores.ctypes.data

    def look(number):
        numa.join_node(number)
        found.append(crew.node_of(job))

    for number in range(4):
        thread = threading.Thread(target=look, args=(number,))
        thread.start()
        thread.join()
    several = len(os.sched_getaffinity(0)) > 1
    assert found == ([0, 1, 0, 1] if several else [1] * 4)
    cores[0] = 0  # of no core anything is said
    look(1)
    assert found[-1] == 0


def test_doctor_says_where_things_go(two_nodes):
    found = {finding.name: finding.told for finding in memory(jax.devices()[0])}
    assert "experts 1, 3, 5, ..." in found["NUMA"]


def test_doctor_reads_what_linux_says(tmp_path, monkeypatch, capsys):
    cores = sorted(os.sched_getaffinity(0))
    described(tmp_path, node0=str(cores[0]), node1=str(cores[-1]))
    monkeypatch.setattr(numa, "SYSTEM", tmp_path)
    numa.nodes.cache_clear()
    try:
        cli.main(["doctor"])
    finally:
        monkeypatch.undo()
        numa.nodes.cache_clear()
    told = " ".join(capsys.readouterr().out.split())
    assert f"on cores {cores[-1]}, experts 1, 3, 5, ..." in told


def test_experts_are_read_to_their_nodes_unless_memory_is_short(two_nodes, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setattr(machine, "free_bytes", lambda: 2000)
    assert not maps_by_default(tmp_path)
    monkeypatch.setattr(machine, "free_bytes", lambda: 1200)
    assert maps_by_default(tmp_path)
    monkeypatch.setattr(numa, "nodes", lambda: ())
    monkeypatch.setattr(machine, "free_bytes", lambda: 2000)
    assert maps_by_default(tmp_path)
