"""The line that long work shows on a terminal: how it is doing, within the width of the terminal."""

import itertools
import re
from types import SimpleNamespace

import pytest
from disk_models import on_disk
from helpers import random_model

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.generation import progress

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [[5, 6, 7], [3, 9, 27, 20]]


@pytest.fixture
def terminal(monkeypatch):
    """Standard error counts as a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as rich takes anything for a terminal then


def last_line(shown):
    """What was shown last, without colours."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    return [line for line in re.split(r"[\r\n]+", plain) if line.strip()][-1].rstrip()


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("disk", [False, True])
def test_a_terminal_is_told_what_the_statistics_say(disk, tmp_path, capsys):
    model = random_model()
    size = model.bank.expert_bytes
    model = on_disk(model, tmp_path) if disk else model
    config = OffloadConfig(device_budget=9 * size, host_budget=str(12 * size) if disk else None, policy="lru")
    with Engine(model, config) as engine:
        stats = engine.generate(PROMPTS, max_new_tokens=3, ignore_eos=True, progress=True).stats
    last = last_line(capsys.readouterr().err)
    assert "2 of 2 done" in last
    assert f"{stats.hit_rate:.0%} hits" in last
    assert re.search(r"\d tokens/s", last)
    assert re.search(r"link \d+%", last)
    assert bool(re.search(r"disk \d+%", last)) == disk == (stats.host_hit_rate is not None)
    assert len(last) <= 80


@pytest.mark.usefixtures("terminal")
def test_the_longest_line_fits(monkeypatch, capsys):
    clock = SimpleNamespace(perf_counter=itertools.chain([0.0], itertools.repeat(1.0)).__next__)
    monkeypatch.setattr(progress, "time", clock)
    busy = progress.SoFar(experts=10, hits=10, link_s=1.0, disk_s=1.0, reads=10)
    with progress.bar("0 of 99 done", 900, lambda: busy) as advance:
        advance(900, 9999, "99 of 99 done")
    last = last_line(capsys.readouterr().err)
    assert "100% 9,999 tokens/s, 100% hits, link 100%, disk 100% " in last
    assert last.endswith(("0:00:00", "-:--:--"))  # nothing is cut off


def test_elsewhere_nothing_is_shown(capsys):
    with Engine(random_model()) as engine:
        engine.generate(PROMPTS, max_new_tokens=3, ignore_eos=True, progress=True)
    assert capsys.readouterr().err == ""
