"""What benchmarks share: taking turns, ratios, the stopwatch, the least time of a step's work."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_model

from benchmarks import bench_link, harness, stopwatch
from benchmarks.link_probes import never_empty
from benchmarks.random_models import shapes
from benchmarks.stopwatch import Stopwatch, Stretch
from benchmarks.work import Rates, Step
from layerscope_jax import Engine, ExpertId, OffloadConfig
from layerscope_jax.offload.link import Transfers

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_candidates_run_in_turns_and_each_begins_a_round():
    calls: list[str] = []
    harness.measure({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3)
    warm_ups, rounds = calls[:3], calls[3:]
    assert warm_ups == ["a", "b", "c"]
    assert ["".join(rounds[i : i + 3]) for i in (0, 3, 6)] == ["abc", "bca", "cab"]


def test_a_call_is_timed_or_times_its_own_parts():
    samples = harness.measure(
        {"whole": lambda: None, "parts": lambda: {"prefill": 2.0, "step": [1.0, 3.0]}}, rounds=2
    )
    assert len(samples["whole"].parts["seconds"]) == 2
    assert samples["parts"].parts == {"prefill": [2.0, 2.0], "step": [1.0, 3.0, 1.0, 3.0]}


def test_warm_up_goes_on_while_programs_are_compiled():
    size = iter([3, 4, 5, 5, 5, 6])  # calls that compile: the first three and the last
    grow = jax.jit(lambda x: x * 5 - 1)
    harness.compiled_programs()
    inputs = {n: jnp.ones(n) for n in (3, 4, 5, 6)}
    samples = harness.measure({"grow": lambda: {"first": np.asarray(grow(inputs[next(size)]))[0]}}, 2)
    assert samples["grow"].warm_ups == 4
    assert samples["grow"].compiled == 1


def test_a_result_replaces_another_whole(tmp_path):
    file = tmp_path / "new" / "result.json"
    harness.write_json(file, {"a": 1})
    harness.write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 2}
    assert [path.name for path in file.parent.iterdir()] == ["result.json"]
    with pytest.raises(TypeError):
        harness.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 2}


def test_ratios_compare_round_by_round():
    # A machine twice as slow in the second half changes nothing.
    assert harness.ratio([2.0, 2.0, 4.0, 4.0], [1.0, 1.0, 2.0, 2.0]) == {"median": 2.0, "p90": 2.0}


def test_a_loop_keeps_the_link_at_work_and_copies_what_was_loaded():
    bank = bench_link.bank_of("qwen3-30b-a3b", quick=True)
    copied = []
    transfers = Transfers(
        bank,
        jax.devices()[0],
        copy=lambda array, sharding: (copied.append(id(array)), jax.device_put(array, sharding))[1],
    )
    layers = [[ExpertId(0, e) for e in some] for some in ((0, 1, 2), (3,), (3, 4), (0, 5), (5, 0))]
    try:
        never_empty(transfers, layers)
    finally:
        transfers.close()
    assert copied == [id(matrix) for layer in layers for expert in layer for matrix in bank[expert]]


def test_work_is_bound_by_arithmetic_or_by_reading():
    config = replace(shapes(quick=True)["mixtral"], num_layers=2)
    step = Step(rows=2, width=8, context=8, experts=5)
    slow_memory = step.seconds(config, 2, 4, Rates(flops=1e30, bytes=1.0))
    slow_products = step.seconds(config, 2, 4, Rates(flops=1.0, bytes=1e30))
    assert slow_memory["experts"] == 5 * config.expert_bytes(2)
    assert slow_products["experts"] == 2 * 16 * 2 * config.expert_bytes(1) * 2
    # Two products of 16 queries with 8 keys or values of 2 heads of 16, in 2 layers.
    assert slow_products["attention"] == 2 * 2 * 16 * 8 * 32 * 2
    assert slow_memory["attention"] == 2 * 2 * 8 * 32 * 4 * 2
    assert step.seconds(config, 2, 4, Rates(1.0, 1.0)) == {
        part: max(slow_memory[part], slow_products[part]) for part in slow_memory
    }


def test_a_stopwatch_parts_a_turn_and_loses_nothing():
    now = iter(range(100))
    watch = Stopwatch()
    watch.within = watch.around = 0.0
    clock = lambda: float(next(now))  # noqa: E731
    inner = watch.timed(clock, "inner")
    outer = watch.outermost(lambda: (clock(), inner(), inner()), "outer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopwatch.time, "perf_counter", clock)
        outer()
        inner()  # outside of a turn: not counted
    (turn,) = watch.turns
    spans = [(stretch.began, stretch.ended) for stretch in turn]
    assert [end for _, end in spans[:-1]] == [begin for begin, _ in spans[1:]]  # one follows the other
    (parts,) = watch.parts(hidden="meanwhile")
    assert parts.pop("meanwhile") == 0
    assert parts["inner"] == 4  # twice from a reading to the one after the call's own
    assert sum(parts.values()) == spans[-1][1] - spans[0][0]


def test_time_in_which_another_thread_computes_is_not_the_engines():
    watch = Stopwatch()
    watch.within = watch.around = 0.0
    watch.turns = [[Stretch("python", 0.0, 4.0, True), Stretch("waiting", 4.0, 10.0, True)]]
    watch.elsewhere = [(5.0, 8.0), (3.0, 6.0)]
    assert watch.parts(hidden="meanwhile") == [{"python": 3.0, "waiting": 2.0, "meanwhile": 5.0}]


def test_a_batch_has_begun_when_all_its_prompts_have():
    """Prompts of 64 tokens, two a prefill step: four of them need two steps, and then decode together."""
    with Engine(random_model(), OffloadConfig(prefill_chunk_size=128)) as engine:
        parts, tokens = harness.run_engine(engine, [[row] * 64 for row in range(4)], 5)
    assert [len(answer) for answer in tokens] == [5] * 4
    assert (len(parts["first"]), len(parts["step"])) == (1, 4)
    assert sum(parts["first"]) + sum(parts["step"]) <= parts["total"]
