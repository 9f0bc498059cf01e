"""Policies side by side: rows against the simulation itself, bounds, refusals; and the command."""

import json

import pytest
from helpers import PROFILE
from recorded import E, L, S, small_profile, small_routing

from layerscope_jax import POLICIES, ExpertId, simulate_profile
from layerscope_jax.cli import main as cli
from layerscope_jax.runtime.lower_bound import lower_bound_ms
from layerscope_jax.scheduling.belady import belady_hit_rate
from layerscope_jax.simulation.policies import SIMULATED
from layerscope_jax.simulation.simulator import Workload, simulate

pytestmark = pytest.mark.usefixtures("quick_compiles")

EVERYTHING = [ExpertId(layer, expert) for layer in range(L) for expert in range(E)]


@pytest.fixture(scope="module")
def found():
    return simulate_profile(small_profile(), small_routing(), batches=[2, 5])


def row(found, policy, batch, phase):
    (one,) = (r for r in found.rows if (r.policy, r.batch, r.phase) == (policy, batch, phase))
    return one


def test_every_policy_has_a_row_for_each_batch_and_phase(found):
    assert [(r.batch, r.policy, r.phase) for r in found.rows] == [
        (batch, policy, phase) for batch in (2, 5) for policy in SIMULATED for phase in ("prefill", "decode")
    ]
    assert set(SIMULATED) == POLICIES.keys() - {"resident"} | {"oracle"}
    assert (found.profile, found.routing, found.budget_experts, found.all_experts) == (
        "small",
        "small",
        9,
        18,
    )
    assert found.refused == {}


@pytest.mark.parametrize("policy", ["lru", "fate"])
def test_rows_are_one_simulated_run(found, policy):
    """From an empty device through the prefill to decode, with forecasts only where they are used."""
    routing = small_routing()
    counts, forecasts = routing.batch(range(5), "llapor")
    prefill = Workload(phase="prefill", tokens=18, counts=routing.prefill(range(5))[None])
    decode = Workload(
        phase="decode", tokens=5, counts=counts, forecasts=forecasts if policy == "fate" else None
    )
    geometry = small_profile().geometry()
    results = simulate(POLICIES[policy](), [prefill, decode], geometry, PROFILE)
    for result, workload in zip(results, [prefill, decode], strict=True):
        one = row(found, policy, 5, workload.phase)
        assert one.steps == len(workload.counts)
        assert 1e3 * one.step_s == pytest.approx(result.total_ms / one.steps)
        for name in ("hit_rate", "token_hit_rate", "bytes_moved", "bytes_wasted", "link_share", "total_s"):
            assert getattr(one, name) == getattr(result, name)
        assert one.forecast_recall == result.forecast_recall
        assert one.predictor == ("llapor" if policy == "fate" else None)
        reference = row(found, "presched", 5, workload.phase)
        assert one.ratio_to_presched == one.step_s / reference.step_s
    assert row(found, "presched", 5, "decode").ratio_to_presched == 1


def test_nothing_beats_what_stands_beside_it(found):
    geometry, costs = small_profile().geometry(), PROFILE
    counts = small_routing().batch(range(2)).counts
    one = row(found, "oracle", 2, "decode")
    assert 1e3 * one.bound_s == pytest.approx(lower_bound_ms(counts, 2, geometry, costs) / S)
    assert one.belady_hit_rate == belady_hit_rate(counts, 9, EVERYTHING)
    for one in found.rows:
        assert 0 < one.share_of_bound <= 1 + 1e-9
        assert one.share_of_bound == pytest.approx(one.bound_s / one.step_s)
        if one.policy in ("on-demand", "lru", "lfu", "arc", "least-stale"):
            assert one.hit_rate <= one.belady_hit_rate
    assert {one.belady_hit_rate for one in found.rows if one.phase == "prefill"} == {0.0}


def test_without_a_predictor_there_are_no_forecasts():
    found = simulate_profile(
        small_profile(), small_routing(), batches=[2], policies=["fate"], predictor="none"
    )
    assert [(r.predictor, r.forecast_recall, r.ratio_to_presched) for r in found.rows] == [(None,) * 3] * 2


def test_a_budget_that_a_policy_refuses_is_no_error():
    found = simulate_profile(
        small_profile(), small_routing(), batches=[2], slots=3, policies=["lru", "host-only"]
    )
    assert {r.policy for r in found.rows} == {"host-only"}
    assert list(found.refused) == ["lru"]
    assert "too small for policy 'lru'" in found.refused["lru"]
    everything = simulate_profile(
        small_profile(), small_routing(), batches=[2], slots=99, policies=["host-only"]
    )
    assert everything.budget_experts == L * E


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policies": ["lru", "nope", "resident"]}, "some of on-demand.*oracle; got nope, resident"),
        ({"policies": []}, "got none"),
        ({"batches": []}, "at least one batch size"),
        ({"batches": [2, 6]}, r"1..5, the requests recorded; got 6"),
        ({"batches": [0]}, r"1..5"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"steps": 1.5}, r"steps must be 1 or more, got 1\.5"),
        ({"slots": -1}, "0 or more experts, got -1"),
        ({"predictor": "nope"}, "one of llapor, previous-token.*'nope'"),
        ({"routing": "nowhere.npz"}, "nowhere.npz: expected a file"),
        ({"routing": None}, "names no recorded routing"),
        ({"profile": small_profile(slots=None)}, "pass slots="),
        ({"profile": "nope"}, "deepseek-v2-lite, .*got 'nope'"),
        (
            {"profile": "mixtral-8x7b"},
            "'mixtral-8x7b', with 32 layers, 8 experts and 2 choices .*, got 3 layers, 6 experts and 2",
        ),
    ],
)
def test_what_is_refused(changes, words):
    options = {"profile": small_profile(), "routing": small_routing()} | changes
    with pytest.raises(ValueError, match=words):
        simulate_profile(**options)


@pytest.fixture
def files(tmp_path):
    """The arguments for profile and routing."""
    machine = dict.fromkeys(("cpu", "cores", "device", "memory_bytes"))
    small_profile(machine=machine).save(tmp_path / "profile.json")
    small_routing().save(tmp_path / "routing.npz")
    return ["--profile", str(tmp_path / "profile.json"), "--trace", str(tmp_path / "routing.npz")]


def test_the_command_prints_tables_and_writes_rows(files, tmp_path, capsys):
    out = tmp_path / "new" / "rows.json"
    options = ["--batch", "2", "5", "--device-budget", "5", "--out", str(out)]
    assert cli.main(["simulate", *files, *options]) == 0
    printed = capsys.readouterr().out
    assert "Decode, batch 2, 4 steps; hit rates at 5 of 18 experts" in printed
    assert "Not run: on-demand, lru, " in printed
    assert "…" not in printed  # a column that was cut
    record = json.loads(out.read_text())
    assert (record["profile"], record["source"], record["budget_experts"]) == ("small", "made up", 5)
    assert record["routing"] == files[3]
    assert "lru" in record["refused"]
    for one in record["rows"]:
        line = [text for text in printed.splitlines() if text.split()[:1] == [one["policy"]]]
        assert len(line) == 3  # two batches of decode, and prefill
    assert [path.name for path in out.parent.iterdir()] == ["rows.json"]


def test_a_size_is_as_many_experts_as_it_holds(files, tmp_path, capsys):
    """An expert has 384 bytes."""
    options = ["--policy", "host-only", "--batch", "2", "--device-budget", "2KB"]
    assert cli.main(["simulate", *files, *options]) == 0
    assert "room for 5 of 18 experts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device-budget", "24G"], "with its unit, such as '24GiB', or a number of experts, got '24G'"),
        (["--out", "."], "--out must be a file, got the folder ."),
        (["--policy", "nope"], "policies must be some of on-demand"),
    ],
)
def test_the_command_refuses(files, options, words, capsys):
    assert cli.main(["simulate", *files, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
