"""No bad plan gets past `check_plan`, and a plan on disk is the plan."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerscope_jax import ExpertId, Geometry, LayerPlan, Observation, Replay, load_plans, save_plans
from layerscope_jax.scheduling.plan import ask, check_plan

R, S, T, X = ExpertId(1, 0), ExpertId(1, 3), ExpertId(1, 5), ExpertId(0, 4)
SEEN = Observation(
    step=2,
    layer=1,
    phase="decode",
    demand={0: 1, 2: 4, 3: 1, 5: 2},  # 0 is resident, 3 on its way, 2 and 5 are absent
    resident={R, X, ExpertId(2, 1)},
    in_flight={S},
)
SLOTS = 6
GOOD = LayerPlan(
    step=2,
    layer=1,
    device=(0, 3, 5),
    host=(2,),
    evict=(X,),
    load=(T,),
    prefetch=(ExpertId(2, 0), ExpertId(2, 2)),
)
MODEL = {ExpertId(layer, expert) for layer in range(3) for expert in range(8)}


def test_a_good_plan_passes():
    check_plan(GOOD, SEEN, SLOTS, MODEL)
    check_plan(GOOD, SEEN, SLOTS)
    check_plan(replace(GOOD, prefetch=()), SEEN, 4)  # two resident ones stay, one on its way, one loaded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 3}, r"step 3, layer 1 was given for step 2, layer 1"),
        ({"layer": 0}, r"step 2, layer 0 was given for step 2, layer 1"),
        ({"host": ()}, r"active experts computed nowhere: \[2\]"),
        ({"host": (2, 7)}, r"experts computed without demand: \[7\]"),
        ({"host": (2, 0)}, r"experts computed more than once: \[0\]"),
        ({"host": (2, 2)}, r"experts computed more than once: \[2\]"),
        ({"device": (0, 3, 5, 3)}, r"experts computed more than once: \[3\]"),
        ({"evict": (ExpertId(0, 7),)}, r"evicted, though not resident: .*layer=0, expert=7"),
        ({"evict": (S,)}, r"evicted, though not resident: .*layer=1, expert=3"),
        ({"evict": (R,)}, r"evicted, though computed on the device in this layer: .*layer=1, expert=0"),
        ({"evict": (X, X)}, r"evicted twice: .*layer=0, expert=4"),
        (
            {"load": (T, ExpertId(2, 3))},
            r"loaded, though not computed on the device in this layer: .*layer=2",
        ),
        ({"load": (T, ExpertId(1, 2))}, r"loaded, though not computed on the device .*expert=2"),
        ({"load": (T, R)}, r"loaded, though present: .*expert=0"),
        ({"load": (T, S)}, r"loaded, though present: .*expert=3"),
        ({"load": ()}, r"computed on the device, but neither present nor loaded: .*expert=5"),
        ({"load": (T, T)}, r"copied twice: .*expert=5"),
        ({"prefetch": (ExpertId(2, 0), ExpertId(2, 0))}, r"copied twice: .*layer=2, expert=0"),
        ({"prefetch": (R,)}, r"prefetched, though present: .*expert=0"),
        ({"prefetch": (S,)}, r"prefetched, though present: .*expert=3"),
        ({"prefetch": (T,)}, r"prefetched, though present: .*expert=5"),
        ({"prefetch": (ExpertId(3, 0),)}, r"no such expert: .*layer=3, expert=0"),
        ({"prefetch": (ExpertId(2, 8),)}, r"no such expert: .*layer=2, expert=8"),
        ({"prefetch": (ExpertId(-1, 0),)}, r"no such expert: .*layer=-1"),
        ({"evict": ()}, r"needs room for 7 experts, the budget holds 6"),
    ],
)
def test_a_bad_plan_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message) as refusal:
        check_plan(replace(GOOD, **changes), SEEN, SLOTS, MODEL)
    assert str(refusal.value).startswith("plan for step ")


def test_what_leaves_may_come_back():
    """Evicting an expert and queueing it again is odd, but gives the right output and fits."""
    check_plan(replace(GOOD, prefetch=(X,)), SEEN, SLOTS, MODEL)


ids = st.builds(ExpertId, st.integers(0, 60), st.integers(0, 255))
plans = st.builds(
    LayerPlan,
    step=st.integers(0, 10**6),
    layer=st.integers(0, 60),
    device=st.lists(st.integers(0, 255), max_size=4).map(tuple),
    host=st.lists(st.integers(0, 255), max_size=4).map(tuple),
    evict=st.lists(ids, max_size=3).map(tuple),
    load=st.lists(ids, max_size=3).map(tuple),
    prefetch=st.lists(ids, max_size=3).map(tuple),
)


@given(st.lists(plans, min_size=1, max_size=5, unique_by=lambda plan: (plan.step, plan.layer)))
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_plans_survive_the_disk(tmp_path_factory, recorded):
    file = tmp_path_factory.mktemp("plans") / "plans.jsonl"
    save_plans(recorded, file)
    loaded = load_plans(file)
    assert loaded == recorded
    assert all(type(expert) is ExpertId for plan in loaded for expert in plan.evict + plan.load)
    assert [path.name for path in file.parent.iterdir()] == ["plans.jsonl"]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    file = tmp_path / "plans.jsonl"
    save_plans([GOOD], file)

    def broken():
        yield replace(GOOD, layer=0)
        raise RuntimeError("the run broke off")

    with pytest.raises(RuntimeError, match="broke off"):
        save_plans(broken(), file)
    assert load_plans(file) == [GOOD]
    assert [path.name for path in tmp_path.iterdir()] == ["plans.jsonl"]


RECORD = GOOD.to_json()


@pytest.mark.parametrize(
    "line",
    [
        "",
        "not JSON",
        "[]",
        "7",
        "null",
        json.dumps(RECORD)[:-5],
        json.dumps({key: value for key, value in RECORD.items() if key != "load"}),
        json.dumps(RECORD | {"load": [[1, 2, 3]]}),
        json.dumps(RECORD | {"load": [7]}),
        json.dumps(RECORD | {"device": 3}),
        json.dumps(RECORD | {"device": "12"}),
        json.dumps(RECORD | {"device": [1.5]}),
        json.dumps(RECORD | {"step": None}),
        json.dumps(RECORD | {"load": ["ab"]}),
    ],
)
def test_a_broken_file_is_refused_by_line(tmp_path, line):
    file = tmp_path / "plans.jsonl"
    file.write_text(json.dumps(RECORD) + "\n" + line + "\n" + json.dumps(RECORD) + "\n")
    with pytest.raises(ValueError, match=r"plans\.jsonl, line 2: expected a plan as `save_plans` writes it"):
        load_plans(file)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (json.dumps(RECORD | {"step": -1}), "step and layer must hold whole numbers in 0.."),
        (json.dumps(RECORD | {"layer": 2**31}), "step and layer must hold whole numbers in 0.."),
        (json.dumps(RECORD | {"device": [-1]}), "device must hold whole numbers"),
        (json.dumps(RECORD | {"device": [10**30]}), "device must hold whole numbers"),
        (json.dumps(RECORD | {"host": [True]}), "host must hold whole numbers"),
        (json.dumps(RECORD | {"prefetch": [[0, -1]]}), "prefetch must hold whole numbers"),
        (json.dumps(RECORD | {"evict": [[1, 2, 3]]}), r"evict must be a list of \[layer, expert\]"),
        (json.dumps(RECORD | {"evict": {"0": 1}}), r"evict must be a list of \[layer, expert\]"),
        (json.dumps(RECORD | {"hots": []}), "expected an object with step, layer"),
        (json.dumps(RECORD | {"layer": 1, "step": 2}), "step 2, layer 1 was decided in line 1"),
        (json.dumps({key: float("inf") for key in RECORD}), "step and layer must hold"),
        ("[" * 100_000, "recursion"),
        ("1" * 5000, "limit"),
        ("\udcff\udcfe", "Expecting value"),
        ("\udcff", "decode"),
    ],
    ids=lambda value: value[:24],
)
def test_what_a_line_must_be_is_said(tmp_path, line, reason):
    file = tmp_path / "plans.jsonl"
    file.write_bytes(f"{json.dumps(RECORD)}\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"plans\.jsonl, line 2: expected a plan .*{reason}") as refused:
        load_plans(file)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    "content", [None, "folder", b"", b"\n", b"\x80\x03pickle", b"\xff\xfe{\x00}\x00"], ids=str
)
def test_files_that_hold_no_plans_are_refused(tmp_path, content):
    file = tmp_path / "plans.jsonl"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"plans\.jsonl(, line 1)?: expected a (file of plans|plan)"):
        load_plans(file)


def test_a_name_that_no_file_has_is_refused():
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="expected a file of plans"):
            load_plans(name)


@pytest.mark.parametrize("name", ["", ".", "folder", "file/plans.jsonl"])
def test_plans_are_not_saved_to_what_is_no_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"is a folder|cannot write to file"):
        save_plans([GOOD], name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize(
    "plan", [None, replace(GOOD, device=("0",)), replace(GOOD, step=-1), replace(GOOD, load=(7,))], ids=str
)
def test_what_could_not_be_read_again_is_not_saved(tmp_path, plan):
    with pytest.raises(ValueError, match="plan 2 cannot be kept"):
        save_plans([replace(GOOD, step=1), plan], tmp_path / "plans.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_numpy_numbers_are_saved_as_numbers(tmp_path):
    save_plans([replace(GOOD, host=(np.int64(2),))], tmp_path / "plans.jsonl")
    assert load_plans(tmp_path / "plans.jsonl") == [GOOD]


@pytest.mark.parametrize(
    ("layers", "experts"), [(2, 8), (1, 8), (3, 5), (3, 1)], ids=lambda number: str(number)
)
def test_plans_of_another_model_are_refused(layers, experts):
    def shape(layers, experts):
        return Geometry(
            num_layers=layers, num_experts=experts, experts_per_token=1, expert_bytes=1, slots=SLOTS
        )

    assert Replay([GOOD]).init(shape(3, 6), None) == SLOTS
    with pytest.raises(ValueError, match=r"plans are of another model: .* step 2, layer 1 names layer 2"):
        Replay([GOOD]).init(shape(layers, experts), None)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": None},
        {"device": ("0", "3", "5")},
        {"device": (0.0, 3.0, 5.0)},
        {"host": (True, 2)},
        {"host": ([2],)},
        {"host": 2},
        {"evict": ((0, 4),)},
        {"evict": (4,)},
        {"load": ([1, 5],)},
        {"load": None},
        {"prefetch": ("2.0",)},
        {"prefetch": ExpertId(2, 0)},
    ],
    ids=str,
)
def test_junk_in_a_plan_is_refused_with_the_policy(changes):
    with pytest.raises(ValueError, match=r"plan for step 2, layer 1, by policy 'mine': ") as refused:
        check_plan(replace(GOOD, **changes), SEEN, SLOTS, MODEL, "mine")
    assert "expert" in str(refused.value)


@pytest.mark.parametrize(
    "answer", [None, 7, GOOD, (1,), (1, None), (1, 2, 3), (1, {"step": 2}), "ab"], ids=str
)
def test_what_is_no_answer_is_refused(answer):
    policy = SimpleNamespace(name="mine", plan=lambda state, seen: answer)
    with pytest.raises(
        ValueError, match=r"policy 'mine' must return \(state, LayerPlan\), got .* step 2, layer 1"
    ):
        ask(policy, None, SEEN)


def test_what_a_policy_raises_says_where():
    def plan(state, seen):
        raise ZeroDivisionError("its own")

    with pytest.raises(ZeroDivisionError, match="its own") as raised:
        ask(SimpleNamespace(name="mine", plan=plan), None, SEEN)
    assert raised.value.__notes__ == ["in plan() of policy 'mine', for step 2, layer 1"]


def test_replay_repeats_what_was_decided():
    other = replace(GOOD, layer=2, device=(), host=(0, 2, 3, 5), load=())
    replay = Replay([other, GOOD])
    assert replay.plan(SLOTS, SEEN) == (SLOTS, GOOD)
    assert replay.plan(SLOTS, replace(SEEN, layer=2)) == (SLOTS, other)
    with pytest.raises(ValueError, match="end before step 3, layer 1; replay with the prompts"):
        replay.plan(SLOTS, replace(SEEN, step=3))
    with pytest.raises(ValueError, match="expected recorded plans, got none"):
        Replay([])


@pytest.mark.parametrize(
    ("resident", "in_flight", "changes"),
    [
        ((), (), {"evict": (), "load": (T, R, S)}),  # the recorded loads first
        ({T, R}, {S}, {"evict": (), "load": ()}),
        # Where room is short the evictions that were recorded come first, then what nothing will need.
        ({R, S, X, ExpertId(2, 0), ExpertId(2, 7)}, (), {"prefetch": (ExpertId(2, 2),)}),
        (
            {R, X, ExpertId(0, 0), ExpertId(0, 1), ExpertId(2, 0), ExpertId(2, 2)},
            (),
            {"evict": (X, ExpertId(0, 0)), "load": (T, S), "prefetch": ()},
        ),
        ({ExpertId(2, 0)}, {R, S, ExpertId(2, 2)}, {"evict": (), "prefetch": ()}),
    ],
)
def test_replay_reconciles_what_moves_with_what_is_there(resident, in_flight, changes):
    seen = replace(SEEN, resident=resident, in_flight=in_flight)
    _, plan = Replay([GOOD]).plan(SLOTS, seen)
    assert plan == replace(GOOD, **changes)
    check_plan(plan, seen, SLOTS, MODEL)


@given(st.data())
def test_a_replay_is_a_good_plan_from_any_residency(data):
    held = st.lists(st.sampled_from(sorted(MODEL)), unique=True, max_size=SLOTS)
    split = st.sets(st.sampled_from(range(len(SEEN.demand))))
    there, here = data.draw(held), data.draw(held)
    chosen = data.draw(split)
    device = [expert for index, expert in enumerate(SEEN.demand) if index in chosen]
    needed = [ExpertId(SEEN.layer, expert) for expert in device]
    load = [expert for expert in needed if expert not in there]
    evict = [expert for expert in there if expert not in needed]
    recorded = LayerPlan(
        step=SEEN.step,
        layer=SEEN.layer,
        device=tuple(device),
        host=tuple(expert for expert in SEEN.demand if expert not in device),
        evict=tuple(evict),
        load=tuple(data.draw(st.permutations(load))),
        prefetch=tuple(evict[: SLOTS - len(device)]),  # odd, but allowed
    )
    replay = Replay([recorded])
    assert replay.plan(SLOTS, replace(SEEN, resident=set(there), in_flight=()))[1] == recorded
    seen = replace(SEEN, resident=set(here), in_flight=())
    _, plan = replay.plan(SLOTS, seen)
    check_plan(plan, seen, SLOTS, MODEL)
    assert (plan.device, plan.host) == (recorded.device, recorded.host)
