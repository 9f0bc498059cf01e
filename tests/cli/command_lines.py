"""What tests of the command line share: four prompts, files of JSON lines, and how a refusal looks."""

import json

from layerscope_jax.cli import main as cli

PROMPTS = [
    {"id": "sea", "prompt": "Call me Ishmael.", "max_new_tokens": 5},
    {"id": 7, "prompt": "ein Löffel: 匙\u2028", "max_new_tokens": 3},
    {
        "id": "ids",
        "prompt": [5, 6, 7],
        "max_new_tokens": 5,
        "temperature": 0.9,
        "top_k": 20,
        "top_p": 0.9,
        "seed": 3,
        "metadata": "x",
    },
    {"id": "stop", "prompt": "x", "max_new_tokens": 5, "stop_token_ids": list(range(600))},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def refusal(capsys, *args, code=2):
    """The message of a command that is refused."""
    assert cli.main([str(arg) for arg in args]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").rstrip("\n")
