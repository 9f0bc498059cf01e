"""Which way to run decode steps: the faster one, tried seldom."""

from hypothesis import given
from hypothesis import strategies as st

from layerscope_jax.scheduling.contest import (
    FIRST_WAIT,
    LONGEST_WAIT,
    MARGIN,
    MEASURED,
    TRIAL,
    UNREHEARSED_S,
    Contest,
    after,
)


def run(steps, took_s, compiled=True, contest=None, requests=lambda step: 1):
    """Returns the contest after some steps, and which of them kept the cache inside."""
    contest, ways = contest or Contest(), []
    for step in range(steps):
        ways.append(contest.now_in_step)
        contest = after(contest, requests(step), took_s(contest.now_in_step), compiled)
    return contest, ways


def test_the_faster_way_stays():
    contest, ways = run(FIRST_WAIT + TRIAL + 1, lambda in_step: 0.01 if in_step else 0.02)
    assert (ways.count(False), contest.in_step) == (FIRST_WAIT, True)


def test_what_is_no_faster_is_given_up_and_tried_ever_more_seldom():
    contest, ways = run(5000, lambda in_step: 0.01 * (1 - MARGIN / 2 if in_step else 1))
    assert not contest.in_step
    assert ways.count(True) == 3 * TRIAL
    assert run(FIRST_WAIT + TRIAL, lambda in_step: 0.01)[0].pause > FIRST_WAIT


def test_what_has_become_slower_is_left_again():
    contest, _ = run(FIRST_WAIT + TRIAL, lambda in_step: 0.01 if in_step else 0.02)
    contest, ways = run(FIRST_WAIT + TRIAL + 1, lambda in_step: 0.03 if in_step else 0.02, contest=contest)
    assert not contest.in_step
    assert ways[-1] is False


def test_warm_caches_alone_are_measured():
    """The first steps of a trial copy what no later one does."""
    contest = run(FIRST_WAIT, lambda in_step: 0.02)[0]
    for step in range(TRIAL):
        contest = after(contest, 1, 1.0 if step < TRIAL - MEASURED else 0.01, True)
    assert contest.in_step


def test_compiling_is_not_worth_while_in_a_short_run():
    steps = int(UNREHEARSED_S / 0.5)
    assert not any(run(steps, lambda in_step: 0.5, compiled=False)[1])
    assert any(run(steps + 2, lambda in_step: 0.5, compiled=False)[1])


def test_only_steps_of_as_many_requests_are_compared():
    """A trial with half as many is not faster for that; with none that both have had, nothing is known."""
    for both in (True, False):
        contest = run(FIRST_WAIT, lambda _: 0.02, requests=lambda step: 8)[0]
        for step in range(TRIAL):
            few = step % 2 or not both
            contest = after(contest, 4 if few else 8, 0.01 if few else 0.02, True)
        assert not contest.in_step
        assert contest.pause > FIRST_WAIT


def test_a_few_slow_steps_of_the_chosen_way_decide_nothing():
    """As when policy "auto" tries its own ways."""
    contest = Contest()
    for step in range(FIRST_WAIT):
        contest = after(contest, 1, 0.02 if step % 8 < 5 else 0.01, True)
    for _ in range(TRIAL):
        contest = after(contest, 1, 0.013, True)
    assert not contest.in_step


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1e3), st.booleans()), max_size=300))
def test_whatever_steps_take_trials_end_and_waits_grow(steps):
    contest, lasted, pause = Contest(), 0, 0
    for requests, took_s, compiled in steps:
        was = contest.trial
        contest = after(contest, requests, took_s, compiled)
        lasted = lasted + 1 if was else 0
        assert lasted <= TRIAL
        if was and not contest.trial:
            assert lasted == TRIAL
        assert all(
            len(times) <= MEASURED for times in (*contest.chosen_s.values(), *contest.tried_s.values())
        )
        assert pause <= contest.pause <= LONGEST_WAIT
        pause = contest.pause
