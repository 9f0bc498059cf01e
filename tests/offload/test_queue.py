"""What is copied next: demand before prefetch, each in its order; nothing is lost, nothing comes twice."""

from hypothesis import given
from hypothesis import strategies as st

from layerscope_jax import ExpertId
from layerscope_jax.offload.queue import CopyQueue

EXPERTS = [ExpertId(layer, expert) for layer in range(2) for expert in range(3)]
CHUNKS = {expert: 1 + expert.expert for expert in EXPERTS}
SOME = st.lists(st.sampled_from(EXPERTS), max_size=4, unique=True)


class Model:
    """The same in few words: what is asked for, and what became of it."""

    def __init__(self):
        self.queue, self.on_link = CopyQueue(CHUNKS.__getitem__), []
        self.coming = set()  # asked for, and not given back in any way
        self.here = set()

    def take(self):
        arrived, lost = self.queue.take()
        assert all(len(arrays) == CHUNKS[expert] for expert, arrays in arrived.items())
        assert arrived.keys() | set(lost) <= self.coming
        assert not arrived.keys() & set(lost)
        self.coming.difference_update(arrived, lost)
        self.here.update(arrived)

    def submit(self, load, prefetch, _):
        load = [expert for expert in load if expert not in self.here and expert not in self.queue.failed]
        prefetch = [e for e in prefetch if e not in {*self.here, *self.coming, *load}]
        waiting = [copy.expert for copy in self.queue.demand]
        self.queue.submit([expert for expert in load if expert not in waiting], prefetch)
        self.coming.update(load, prefetch)

    def drop(self, stale, _, __):
        begun = {copy.expert for copy in self.queue.prefetch if copy.begun}
        gone = self.queue.drop(lambda expert: expert in stale)
        assert set(gone) <= set(stale) & self.coming - begun
        self.coming.difference_update(gone)

    def begin(self, _, __, flags):
        waiting, prefetches = list(self.queue.demand), list(self.queue.prefetch)
        copy = self.queue.begin(demand=flags[0], prefetch=flags[1])
        first, room = (waiting, flags[0]) if waiting else (prefetches, flags[1])
        assert copy is (first[0] if first and room else None)
        if copy is not None:
            self.on_link.append(copy)

    def end(self, _, __, flags):
        if not self.on_link:
            return
        copy = self.on_link.pop(0)  # in order, as on the link
        wanted = self.queue.wants(copy)
        if flags[0]:
            self.queue.finish(copy, len(copy.arrays))
        else:
            assert self.queue.fail(copy, OSError()) == (wanted and not copy.demanded)

    def cancel(self, _, __, flags):
        if all(flags):
            self.queue.cancel()
            self.take()
            self.coming.clear()

    def leave(self, some, _, __):
        self.take()
        self.here.difference_update(some)


OPERATIONS = ("submit", "drop", "begin", "begin", "begin", "end", "end", "cancel", "leave")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(OPERATIONS), SOME, SOME, st.tuples(st.booleans(), st.booleans(), st.booleans())
        ),
        max_size=60,
    )
)
def test_whatever_is_asked_of_it_the_books_come_out_even(operations):
    model = Model()
    for name, some, others, flags in operations:
        getattr(model, name)(some, others, flags)
        queue = model.queue
        known = [copy.expert for copy in (*queue.demand, *queue.prefetch)]
        assert len(set(known)) == len(known)
        assert queue.on_link == len(model.on_link)
        assert {*known, *queue.begun, *queue.arrived, *queue.failed, *queue.lost} == model.coming
        assert all(copy.demanded for copy in queue.demand)
        assert queue.idle == (not (queue.waiting or model.on_link))
    while model.queue.waiting or model.on_link:
        model.begin(None, None, (True, True))
        model.end(None, None, (True,))
    model.queue.let_go()
    model.take()
    assert not model.coming


def test_a_copy_begins_when_its_expert_is_in_host_memory():
    """A demand that is still being read lets others go ahead; one that cannot be read fails."""
    A, B, C, D = EXPERTS[:4]
    ready = {C}
    queue = CopyQueue(lambda expert: 2, ready.__contains__)
    queue.submit([], [C, D])
    queue.submit([A, B], [])
    assert queue.waiting
    assert queue.begin(demand=True, prefetch=True).expert == C
    ready.add(B)
    assert queue.begin(demand=True, prefetch=True).expert == B
    assert queue.has(B)
    assert queue.begin(demand=True, prefetch=True).expert == B
    ready.discard(C)  # whoever queues a copy keeps its expert there; if not, the copy waits
    assert not queue.waiting
    assert queue.begin(demand=True, prefetch=True) is None
    queue.refuse(A, OSError("gone"))
    queue.refuse(D, OSError("gone"))
    queue.refuse(B, OSError("too late"))
    assert list(queue.failed) == [A]
    assert queue.lost == [D]
    assert not queue.has(A)
    assert queue.has(B)
