"""Caches: each lets go whom its rule names."""

from hypothesis import given, settings
from hypothesis import strategies as st
from policy_runs import Device, geometry, runs

from layerscope_jax import POLICIES, ExpertId


class ReferenceLRU:
    """A list, oldest first."""

    def __init__(self, slots):
        self.slots, self.order, self.hits, self.loads = slots, [], 0, 0

    def layer(self, layer, demand):
        needed = [ExpertId(layer, expert) for expert in sorted(demand, key=lambda e: (demand[e], -e))]
        for expert in needed:
            if expert in self.order:
                self.hits += 1
                self.order.remove(expert)
                self.order.append(expert)
        missing = [expert for expert in needed if expert not in self.order]
        self.loads += len(missing)
        while len(self.order) + len(missing) > self.slots:
            self.order.remove(next(expert for expert in self.order if expert not in needed))
        self.order = [expert for expert in self.order if expert not in needed] + needed


@given(runs())
@settings(deadline=None, max_examples=200)
def test_lru_is_lru(run):
    shape, _, steps = run
    if shape.slots < shape.num_experts:
        return
    policy, device, reference = POLICIES["lru"](), Device(shape), ReferenceLRU(shape.slots)
    state = policy.init(shape, None)
    for number, step in enumerate(steps):
        for layer, demand in enumerate(step):
            seen = device.observe(number, layer, demand)
            state, plan = policy.plan(state, seen)
            device.follow(plan, seen)
            reference.layer(layer, demand)
            assert device.resident == set(reference.order)
    assert (device.hits, device.loaded) == (reference.hits, reference.loads)


def requests(name, slots, pages):
    """Follows a cache through single requests (layer, expert), each a step of its own; gives what stayed."""
    shape = geometry(slots, num_layers=8, num_experts=2)
    policy, device, stayed = POLICIES[name](), Device(shape), []
    state = policy.init(shape, None)
    for number, (layer, expert) in enumerate(pages):
        seen = device.observe(number, layer, {expert: 1})
        state, plan = policy.plan(state, seen)
        device.follow(plan, seen)
        stayed.append(set(device.resident))
    return stayed, state


def test_lfu_lets_go_the_least_frequent_and_of_equals_the_least_recent():
    often, once, other, another = (0, 0), (1, 0), (2, 0), (3, 0)
    stayed, _ = requests("lfu", 2, [often, often, once, other, once, another])
    assert stayed[3] == {often, other}  # LRU would have let `often` go
    assert stayed[4] == {often, once}  # its count was kept while it was away: two uses now
    assert stayed[5] == {once, another}  # two uses each, `often` longer ago


def test_least_stale_keeps_what_comes_next():
    pages = [(0, 0), (1, 0), (2, 0), (3, 0), (0, 0), (1, 1), (2, 0)]
    stayed, _ = requests("least-stale", 3, pages)
    assert stayed[3] == {(1, 0), (2, 0), (3, 0)}  # all of this pass: the least recently used goes
    assert stayed[4] == {(1, 0), (2, 0), (0, 0)}  # the second pass: the furthest ahead goes
    assert stayed[5] == {(1, 1), (2, 0), (0, 0)}  # layer 1's turn came and did without it
    assert stayed[6] == stayed[5]  # a hit, where LRU has none in all


class ReferenceARC:
    """The algorithm as it is printed, on lists, least recently used first."""

    def __init__(self, size):
        self.c, self.p = size, 0.0
        self.t1, self.t2, self.b1, self.b2 = [], [], [], []

    def replace(self, page):
        if self.t1 and ((page in self.b2 and len(self.t1) == self.p) or len(self.t1) > self.p):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))

    def request(self, page):
        if page in self.t1 or page in self.t2:
            (self.t1 if page in self.t1 else self.t2).remove(page)
            self.t2.append(page)
        elif page in self.b1:
            self.p = min(self.c, self.p + max(1, len(self.b2) / len(self.b1)))
            self.replace(page)
            self.b1.remove(page)
            self.t2.append(page)
        elif page in self.b2:
            self.p = max(0, self.p - max(1, len(self.b1) / len(self.b2)))
            self.replace(page)
            self.b2.remove(page)
            self.t2.append(page)
        else:
            if len(self.t1) + len(self.b1) == self.c:
                if len(self.t1) < self.c:
                    self.b1.pop(0)
                    self.replace(page)
                else:
                    self.t1.pop(0)
            elif (total := sum(map(len, (self.t1, self.t2, self.b1, self.b2)))) >= self.c:
                if total == 2 * self.c:
                    self.b2.pop(0)
                self.replace(page)
            self.t1.append(page)


PAGES = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 1)), max_size=80)


@given(pages=PAGES, slots=st.integers(2, 8))
@settings(deadline=None, max_examples=300)
def test_arc_is_arc(pages, slots):
    reference = ReferenceARC(slots)
    stayed, state = requests("arc", slots, pages)
    for page, found in zip(pages, stayed, strict=True):
        reference.request(page)
        assert found == {*reference.t1, *reference.t2}
    for name in ("t1", "t2", "b1", "b2"):
        assert list(getattr(state, name)) == getattr(reference, name)
    assert state.p == reference.p


def test_arc_keeps_what_is_used_again_through_a_scan():
    hot = [(0, 0), (1, 0)]
    scan = [(layer, expert) for layer in range(2, 8) for expert in range(2)]
    stayed, _ = requests("arc", 4, [*hot, *hot, *scan])
    assert all(set(hot) <= kept for kept in stayed[2:])
    assert not set(hot) & requests("lru", 4, [*hot, *hot, *scan])[0][-1]


def test_what_came_in_some_other_way_goes_first():
    step = [{0: 1}, {0: 1}, {1: 1, 2: 1}]
    for name in ("lru", "lfu", "arc", "least-stale"):
        policy, device = POLICIES[name](), Device(geometry(6))
        state = policy.init(device.geometry, None)
        stranger = ExpertId(0, 5)
        for layer, demand in enumerate(step):
            seen = device.observe(0, layer, demand)
            state, plan = policy.plan(state, seen)
            device.follow(plan, seen)
            device.resident.add(stranger)
        seen = device.observe(1, 1, {1: 1, 2: 1})
        assert policy.plan(state, seen)[1].evict[0] == stranger
