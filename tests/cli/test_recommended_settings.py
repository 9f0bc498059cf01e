"""Sampling settings that a checkpoint recommends are those of prompts for which nothing else is said."""

import json
import logging
import shutil

import pytest
from command_lines import write

from layerscope_jax import Engine, Request, load
from layerscope_jax.cli import main as cli

pytestmark = pytest.mark.usefixtures("quick_compiles")

RECOMMENDED = {"do_sample": True, "temperature": 0.9, "top_k": 5, "max_new_tokens": 6}
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("recommending") / "model")
    (folder / "generation_config.json").write_text(json.dumps(RECOMMENDED))
    return folder


def tokens(engine, prompt=PROMPT, **settings):
    return engine.generate([prompt], **settings).token_ids[0]


def test_an_engine_takes_them_and_says_so_once(folder, caplog):
    model = load(folder)
    with caplog.at_level(logging.WARNING), Engine(model) as engine:
        sampled = tokens(engine)
        full = Request(prompt=PROMPT, temperature=0.9, top_k=5, max_new_tokens=6)
        assert sampled == tokens(engine, full)
        assert tokens(engine, max_new_tokens=2) == sampled[:2]
        greedy = tokens(engine, temperature=0.0)
        assert len(greedy) == 6
        assert greedy == tokens(engine, Request(prompt=PROMPT, max_new_tokens=6))  # has settings of its own
        assert engine.submit(PROMPT).result().token_ids == sampled
        assert [event.token_id for event in engine.stream([PROMPT])] == sampled
    assert [record.message for record in caplog.records] == [
        f"{folder} recommends max_new_tokens=6, top_k=5, temperature=0.9, which requests have unless they "
        "say otherwise; turn that off with generation_config='none'"
    ]
    with Engine(model, generation_config="none") as engine:
        assert len(tokens(engine)) == 64
    with pytest.raises(ValueError, match="generation_config must be 'auto' or 'none', got 'vllm'"):
        Engine(model, generation_config="vllm")


def test_rows_and_options_beat_them(folder, tmp_path, capsys):
    rows = [{"prompt": PROMPT}, {"prompt": PROMPT, "temperature": 0.0, "id": "greedy"}]
    prompts = write(tmp_path / "prompts.jsonl", rows)

    def answers(*options):
        assert cli.main(["generate", str(folder), "--prompts", str(prompts), *options]) == 0
        out, err = capsys.readouterr()
        return [json.loads(line)["token_ids"] for line in out.splitlines()], err

    (sampled, greedy), err = answers()
    said = f"{folder} recommends max_new_tokens 6, top_k 5, temperature 0.9; --generation-config none turns"
    assert err.count(said) == 1
    with Engine(load(folder)) as engine:
        assert (sampled, greedy) == (tokens(engine), tokens(engine, temperature=0.0))
    (one, other), _ = answers("--max-new-tokens", "2")
    assert (one, other) == (sampled[:2], greedy[:2])
    (one, other), err = answers("--generation-config", "none", "--max-new-tokens", "6")
    assert one == other == greedy
    assert "recommends" not in err
