"""Policies that share a layer out between device and host, on worked examples."""

from policy_runs import SPLIT, follow, geometry

from layerscope_jax import POLICIES, ExpertId, HardwareProfile, TimeTable


def test_fiddler_computes_a_missing_expert_where_it_is_done_first():
    demand = {expert: expert + 4 for expert in range(6)}  # 4 to 9 tokens
    # Three quarters of two slots are none for each of two layers: no hot set, room for two passing through.
    plans, device = follow(POLICIES["fiddler"](), geometry(2, num_layers=2), [[demand, {0: 1}]], SPLIT)
    # 6 ms on the device: worth it from seven tokens on, in room for two.
    assert plans[0].device == (5, 4)
    assert plans[0].load == (ExpertId(0, 5), ExpertId(0, 4))
    assert plans[0].host == (3, 2, 1, 0)
    # What passed through is given up; one token is not worth a copy.
    assert plans[1].evict == (ExpertId(0, 4), ExpertId(0, 5))
    assert (plans[1].device, plans[1].host) == ((), (0,))
    assert not device.resident

    plans, _ = follow(POLICIES["fiddler"](), geometry(3, num_layers=3), [[demand] * 3], SPLIT)
    assert [plan.device for plan in plans] == [(5, 4, 3)] * 3  # a third slot: 3 has seven tokens
    plans, _ = follow(POLICIES["fiddler"](), geometry(6, num_layers=6), [[demand] * 6], SPLIT)
    assert plans[0].device == (5, 4, 3)  # room is left, but the host does six tokens in the same 6 ms


def test_fiddler_keeps_the_experts_that_the_first_prefill_liked():
    policy, shape = POLICIES["fiddler"](), geometry(8)  # 8 * 3 / 4 / 3: two hot ones a layer
    prefill = [{0: 9, 1: 2, 2: 1}, {3: 4, 4: 4, 5: 1}, {0: 1}]
    decode = [{1: 1, 2: 1}, {0: 1, 5: 1}, {0: 1, 1: 1}]
    plans, device = follow(policy, shape, [prefill, decode, prefill], SPLIT)
    hot = {ExpertId(*e) for e in ((0, 0), (0, 1), (1, 3), (1, 4), (2, 0))}
    assert device.resident == hot
    assert [plan.load for plan in plans[3:]] == [()] * 6
    assert [plan.device for plan in plans[3:]] == [(1,), (), (0,), (0, 1), (3, 4), (0,)]
    assert plans[0].device == (0, 1)  # the hot ones are copied whatever they cost at first


EVEN = HardwareProfile(
    host_ms=TimeTable((1, 100), (5.0, 500.0)), device_ms=TimeTable((1,), (1.0,)), transfer_ms=5.0, source=""
)
"""A token takes as long on the host as an expert on the link."""


def test_the_bandwidth_split_copies_the_share_at_which_link_and_host_end_together():
    prefill = [{expert: expert + 1 for expert in range(6)}, {0: 1}, {0: 1}]
    decode = [{0: 1}, {1: 1, 2: 2, 3: 3, 4: 4}, {0: 1}]
    plans, _ = follow(POLICIES["bandwidth-split"](), geometry(8), [prefill, decode], EVEN)
    assert plans[0].device == (5, 4, 3, 2, 1, 0)  # a prefill copies all
    assert plans[3].load == ()
    assert (plans[4].device, plans[4].host) == ((4, 3), (2, 1))  # q* = 5 / (5 + 5), the busiest
    assert plans[4].evict == (ExpertId(0, 1), ExpertId(0, 2))  # the least recently used
    tight, _ = follow(POLICIES["bandwidth-split"](), geometry(2), [prefill], EVEN)
    assert (tight[0].device, tight[0].host) == ((5, 4), (3, 2, 1, 0))  # all that finds room
    slow, _ = follow(POLICIES["bandwidth-split"](), geometry(8), [decode, decode], SPLIT)
    assert slow[4].load == ()  # all was copied in the first step
    plans, _ = follow(POLICIES["bandwidth-split"](), geometry(8), [[{0: 1}] * 3, decode], SPLIT)
    assert plans[4].load == (ExpertId(1, 4),)  # q* = 1 / (1 + 5) of four
