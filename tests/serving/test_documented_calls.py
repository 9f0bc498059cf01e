"""The calls that pages show for a running server are answered."""

import json
import re
import shlex

import openai
import pytest
from docs_pages import ROOT, blocks
from serving_calls import post

from layerscope_jax.serving.server import Server
from layerscope_jax.serving.settings import ServerConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

PAGES = [ROOT / "docs" / "serving.md"]
ADDRESS = "http://127.0.0.1:8000"
TEMPLATE = "{{ messages[0].content }}"


@pytest.fixture(scope="module")
def served(engine):
    with Server(engine, ServerConfig(port=0, served_model_name="small"), TEMPLATE) as server:
        yield server


def texts(language):
    return [block.text for page in PAGES for block in blocks(page) if block.language == language]


def test_curl(served):
    calls = [shlex.split(line) for text in texts("bash") for line in text.splitlines() if "curl" in line]
    assert len(calls) == 2
    for curl, url, *options in calls:
        assert curl == "curl"
        assert url.startswith(ADDRESS)
        flags = dict(zip(options[::2], options[1::2], strict=True))
        assert flags.keys() == {"-H", "-d"}
        headers = dict([flags["-H"].split(": ")])
        status, _, answer = post(served, flags["-d"].encode(), url.removeprefix(ADDRESS), headers)
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 8 or json.loads(answer["choices"][0]["text"])


def test_python(served, capsys):
    [code] = [text for text in texts("python") if "import openai" in text]
    names = {}
    exec(code.replace(ADDRESS, served.url), names)
    names["client"].close()
    assert isinstance(names["client"], openai.OpenAI)
    assert re.search(r"\S", capsys.readouterr().out)
