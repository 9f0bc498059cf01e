"""What the engine makes of a plan: who overtakes whom on the link, what is dropped, what is counted."""

import threading
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import copying_by, in_time, random_model

from layerscope_jax import Engine, ExpertId, LayerPlan, OffloadConfig, TransferError
from layerscope_jax.runtime.computing import ARRIVALS

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [[5, 6, 7], [3, 9, 27, 20, 60, 58, 52, 34, 41, 1, 3]]
LAYERS, EXPERTS = 3, 8


@lru_cache
def model():
    return random_model(dtype=jnp.bfloat16, seed=1)


class Ahead:
    """Computes on the host what is not on its way already; at the first layer, queues a given list."""

    name = "ahead"
    uses_costs = False

    def __init__(self, prefetch):
        self.prefetch = prefetch
        self.seen = []

    def init(self, geometry, profile):
        return None

    def plan(self, state, seen):
        self.seen.append((seen.step, seen.layer, seen.phase, dict(seen.demand), set(seen.in_flight)))
        there = {e.expert for e in {*seen.resident, *seen.in_flight} if e.layer == seen.layer}
        first = (seen.step, seen.layer) == (0, 0)
        return None, LayerPlan(
            step=seen.step,
            layer=seen.layer,
            device=tuple(sorted(there & seen.demand.keys())),
            host=tuple(sorted(seen.demand.keys() - there)),
            prefetch=tuple(e for e in self.prefetch if first and e not in {*seen.resident, *seen.in_flight}),
        )


class Gate:
    """Copies, once it is open; knows in which order they began."""

    def __init__(self, bank, failing=()):
        self.experts = {id(matrix): expert for expert in bank for matrix in bank[expert]}
        self.failing = failing
        self.open = threading.Event()
        self.order = []

    def __call__(self, array, sharding):
        expert = self.experts[id(array)]
        self.order += [expert] if self.order[-1:] != [expert] else []
        assert self.open.wait(60)
        if expert in self.failing:
            raise OSError("injected")
        return jax.device_put(array, sharding)


def start(prefetch, failing=(), max_num_seqs=32):
    """An engine whose link stands still until a layer waits for it."""
    policy, gate = Ahead(prefetch), Gate(model().bank, failing)
    budget = len(prefetch) * model().bank.expert_bytes
    with copying_by(gate):
        engine = Engine(
            model(), OffloadConfig(device_budget=budget, policy=policy, max_num_seqs=max_num_seqs)
        )
    wait = engine.runner.transfers.wait

    def opening(*arguments):
        gate.open.set()
        return wait(*arguments)

    engine.runner.transfers.wait = opening
    return engine, policy, gate


def test_what_is_needed_now_overtakes_what_was_queued_before_and_stale_ones_are_dropped():
    later, sooner = [ExpertId(2, 0), ExpertId(2, 1)], [ExpertId(1, e) for e in range(EXPERTS)]
    engine, policy, gate = start(later + sooner)
    with engine:
        result = in_time(lambda: engine.generate(PROMPTS, max_new_tokens=1, record_plans=True))
        in_time(engine.runner.transfers.rest)
        dropped = engine.runner.transfers.stats.dropped
    needed = [ExpertId(1, expert) for expert in result.plans[1].device]
    assert 2 <= len(needed) < EXPERTS
    assert policy.seen[1][4] == {*later, *sooner}  # all were on their way when layer 1 was planned
    assert gate.order[: len(needed) + 2] == [later[0], *needed, later[0]]
    assert set(gate.order) <= {*later, *needed}
    assert dropped >= EXPERTS - len(needed)
    # Those that had begun as prefetches and were waited for count as demand, but for the chunks before.
    assert result.stats.bytes_demand >= len(needed) * model().bank.expert_bytes


def test_a_prefetch_that_a_layer_has_come_to_need_may_not_fail_silently():
    prefetch = [ExpertId(layer, expert) for layer in (2, 1) for expert in range(EXPERTS)]
    failing = [expert for expert in prefetch if expert.layer == 1]
    engine, _, gate = start(prefetch, failing)
    with engine:
        with pytest.raises(TransferError, match="of layer 1 to the device failed 3 times"):
            in_time(lambda: engine.generate(PROMPTS, max_new_tokens=1))
        assert not set(failing) & {*engine.runner.residency.resident, *engine.runner.residency.coming}
        gate.failing = ()
        in_time(lambda: engine.generate(PROMPTS, max_new_tokens=2))


def test_bytes_that_were_moved_in_vain_are_counted():
    """Prefetched and never read; once they are used, they were not in vain."""
    prefetch = [ExpertId(2, expert) for expert in range(EXPERTS)]
    engine, _, gate = start(prefetch)
    gate.open.set()
    with engine:
        # All are there before layer 2 is planned.
        decide = engine.runner._decide

        def patient(layer, phase, rows, expected):
            if layer == 2:
                engine.runner.transfers.rest()
            return decide(layer, phase, rows, expected)

        engine.runner._decide = patient
        result = in_time(lambda: engine.generate(PROMPTS, max_new_tokens=1, record_plans=True))
        again = in_time(lambda: engine.generate(PROMPTS, max_new_tokens=1)).stats
    assert again.bytes_wasted == again.bytes_moved == 0  # the first run's waste is its own
    stats, each = result.stats, model().bank.expert_bytes
    used = len(result.plans[2].device)
    assert 2 <= used < EXPERTS
    assert (stats.bytes_prefetch, stats.bytes_demand) == (EXPERTS * each, 0)
    assert stats.bytes_wasted == (EXPERTS - used) * each
    active = sum(len(plan.device) + len(plan.host) for plan in result.plans)
    assert stats.hit_rate == used / active
    assert stats.peak_expert_bytes == EXPERTS * each == stats.budget_bytes


def test_policies_see_steps_layers_and_demand():
    engine, policy, _ = start([], max_num_seqs=2)
    with engine:
        engine.generate([*PROMPTS, [4]], max_new_tokens=3)
        engine.generate(PROMPTS, max_new_tokens=1)
    seen = [(step, layer, phase) for step, layer, phase, *_ in policy.seen]
    phases = ["prefill", "decode", "decode"] * 2
    expected = [(step, layer, phase) for step, phase in enumerate(phases) for layer in range(LAYERS)]
    assert seen == expected + [(0, layer, "prefill") for layer in range(LAYERS)]
    assert all(sum(demand.values()) == 2 * 14 for step, _, _, demand, _ in policy.seen if step == 0)
    assert [sum(demand.values()) for step, _, _, demand, _ in policy.seen if step in (3, 4)] == [2] * 6


def test_pad_rows_do_not_matter():
    """Two prompts fill a batch of two; a third row in a batch of four is padding."""
    with Engine(model(), OffloadConfig(device_budget=0, policy="host-only")) as engine:
        pair = engine.generate(PROMPTS, max_new_tokens=4).token_ids
        alone = [engine.generate([prompt], max_new_tokens=4).token_ids[0] for prompt in PROMPTS]
    assert pair == alone
    assert np.unique(pair).size > 1


@pytest.mark.parametrize(("link", "most"), [(None, EXPERTS), ("1GB", ARRIVALS)])
def test_a_layer_waits_for_all_its_loads_where_copying_is_the_cpus_work_else_for_a_few(link, most):
    budget = EXPERTS * model().bank.expert_bytes
    config = OffloadConfig(device_budget=budget, policy="on-demand", emulated_link_bandwidth=link)
    prompt = list(range(1, 31))  # so many tokens that a layer needs all experts
    with Engine(model(), config) as engine:
        transfers, counts = engine.runner.transfers, []
        wait = transfers.wait

        def noted(wanted, count):
            counts.append((len(wanted), count))
            wait(wanted, count)

        transfers.wait = noted
        engine.generate([prompt], max_new_tokens=1)
    assert counts[0] == (EXPERTS, most)
    assert all(count == min(wanted, most) for wanted, count in counts)
    if link is None:
        assert len(counts) == LAYERS
