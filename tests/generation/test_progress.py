"""The line that a long generation shows on a terminal: how it is doing, within the width of the terminal."""

import re

import pytest
from helpers import random_model

from layerscope_jax import Engine, OffloadConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [[5, 6, 7], [3, 9, 27, 20]]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_told_what_the_statistics_say(terminal, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")  # as rich takes anything for a terminal then
    model = random_model()
    config = OffloadConfig(device_budget=9 * model.bank.expert_bytes, policy="lru")
    with Engine(model, config) as engine:
        stats = engine.generate(PROMPTS, max_new_tokens=3, ignore_eos=True, progress=True).stats
    shown = capsys.readouterr().err
    if not terminal:
        assert shown == ""
        return
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    last = [line for line in re.split(r"[\r\n]+", plain) if line.strip()][-1]
    assert "2 of 2 completions" in last
    assert f"{stats.hit_rate:.0%} hits" in last
    assert re.search(r"\d tokens/s", last)
    assert re.search(r"link \d+%", last)
    assert len(last.rstrip()) <= 80
