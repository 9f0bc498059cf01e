"""No change makes a shipped profile slower unnoticed: step times against golden/simulated.json."""

import pytest
from recorded import small_profile, small_routing

from layerscope_jax import MachineProfile
from layerscope_jax.simulation.policies import BATCHES, SIMULATED
from layerscope_jax.simulation.routing import Routing
from tools.make_simulated import (
    COMMAND,
    DEFAULTS,
    FILE,
    Change,
    Step,
    changes,
    measure,
    profiles,
    read,
    report,
    write,
)


@pytest.mark.skipif(not FILE.is_file(), reason=f"there is no {FILE.name}: {COMMAND}")
@pytest.mark.parametrize("name", profiles())
def test_no_step_takes_another_time(name):
    """Default policies at every batch; the others, for want of time, at the smallest of one profile."""
    profile = MachineProfile.load(name)
    routing = Routing.shipped(profile.routing)
    others = [policy for policy in SIMULATED if policy not in DEFAULTS and name == "mixtral-8x7b"]
    after = measure(profile, routing, BATCHES, DEFAULTS)
    after |= measure(profile, routing, BATCHES[:1], others)
    before = {
        step: ms
        for step, ms in read().items()
        if step.profile == name
        and (step.policy in DEFAULTS or (step.policy in others and step.batch == BATCHES[0]))
    }
    found = changes(before, after)
    assert not found, "\n" + report(found)


def test_a_file_is_what_was_measured_and_the_same_again(tmp_path):
    times = measure(small_profile(), small_routing(), (2, 5), SIMULATED)
    assert times.keys() == {
        Step("small", batch, policy, phase)
        for batch in (2, 5)
        for policy in SIMULATED
        for phase in ("prefill", "decode")
    }
    write(times, tmp_path / "simulated.json")
    again = measure(small_profile(), small_routing(), (2, 5), SIMULATED)
    assert changes(read(tmp_path / "simulated.json"), again) == []
    assert not any(
        step.policy == "lru" for step in measure(small_profile(slots=2), small_routing(), [2], ["lru"])
    )


def test_changes_are_told_with_what_to_do():
    lru, auto = (Step("small", 4, policy, "decode") for policy in ("lru", "auto"))
    gone, new = Step("small", 4, "presched", "prefill"), Step("small", 16, "lru", "decode")
    before = {lru: 10.0, auto: 2.0, gone: 3.0}
    assert changes(before, {lru: 10.0 + 5e-9, auto: 2.0, gone: 3.0}) == []
    found = changes(before, {lru: 9.0, auto: 2.1, new: 1.0})
    assert found == [
        Change(auto, 2.0, 2.1),
        Change(gone, 3.0, None),
        Change(lru, 10.0, 9.0),
        Change(new, None, 1.0),
    ]
    assert [change.forbidden for change in found] == [True, True, False, False]
    lines = report(found).splitlines()
    assert lines[1].split() == ["!", "small", "4", "auto", "decode", "2", "2.1", "1.050000"]
    assert lines[3].split() == ["small", "4", "lru", "decode", "10", "9", "0.900000"]
    assert lines[-2:] == [
        "slower by default (!): presched and auto must not lose time anywhere",
        f"if this is meant, make simulated.json again: {COMMAND}",
    ]
    faster = changes(before, {lru: 10.0, auto: 1.9, gone: 3.0})
    assert [change.forbidden for change in faster] == [False]
    assert "slower by default" not in report(faster)
