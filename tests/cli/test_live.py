"""Texts shown as they come."""

import sys

from layerscope_jax.cli.complete import Live
from layerscope_jax.generation.completions import Token
from layerscope_jax.generation.prompt_files import Row
from layerscope_jax.generation.requests import Request


def test_texts_come_in_order(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")  # nothing is dimmed
    live = Live([Row(i, Request(prompt=f"p{i}"), "") for i in range(3)])
    shown = [capsys.readouterr().out]
    for request, text, finish in ((0, "a", None), (1, "b", "stop"), (2, "c", None), (0, "d", "length")):
        live(Token(request, 0, text, finish))
        shown.append(capsys.readouterr().out)
    live(Token(2, 0, "e", "length"))
    shown.append(capsys.readouterr().out)
    assert shown == ["p0", "a", "", "", "d\n\np1b\n\np2c", "e\n"]
