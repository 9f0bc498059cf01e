"""Files of OpenAI's batch API, and files of conversations: answered line by line, and continued."""

import json
import shutil

import pytest
from command_lines import read, refusal, write

from layerscope_jax.cli import main as cli

pytestmark = pytest.mark.usefixtures("quick_compiles")

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "Call me"}]


@pytest.fixture(scope="module")
def chatty(tiny, tmp_path_factory):
    """A checkpoint with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def line(name, url, **body):
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "gpt-4", **body}}


LINES = [
    line("chat", CHAT_URL, messages=MESSAGES, max_tokens=3, temperature=0),
    line("bad", TEXT_URL, prompt="x", temperature=-1),
    line("text", TEXT_URL, prompt="Call me", max_tokens=3, temperature=0),
    line("long", TEXT_URL, prompt="long " * 300),
    {"id": "mine", "messages": MESSAGES, "max_new_tokens": 3},
    {"custom_id": 3, "url": TEXT_URL, "body": {"prompt": "x"}},
]


def test_each_line_is_answered(chatty, tmp_path, capsys):
    file, out = write(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    command = ["generate", str(chatty), f"--prompts={file}", f"--out={out}"]
    assert cli.main(command) == 1  # three lines were refused
    said = capsys.readouterr().err
    assert "answers the requests for gpt-4 too" in said
    assert said.count("gpt-4") == 1
    assert ":2: refused: temperature must be a number from 0 (greedy) to 1e6, got -1" in said
    whole = out.read_bytes()
    rows = read(out)
    answers = {row.get("custom_id", row["id"]): row for row in rows}
    assert list(answers)[:3] == ["bad", "long", None]  # refused before anything is computed
    for name, problem in (
        ("bad", "temperature"),
        ("long", "the prompt has 302 tokens"),
        (None, "custom_id"),
    ):
        response = answers[name]["response"]
        assert response["status_code"] == 400
        assert response["body"]["error"]["type"] == "invalid_request_error"
        assert problem in response["body"]["error"]["message"]
    chat, text = (answers[name]["response"] for name in ("chat", "text"))
    assert (chat["status_code"], chat["body"]["object"]) == (200, "chat.completion")
    assert chat["body"]["usage"]["completion_tokens"] == 3
    assert (text["status_code"], text["body"]["usage"]["completion_tokens"]) == (200, 3)
    assert answers["mine"]["messages"] == MESSAGES
    assert "with chat template" in answers["mine"]["model"]
    assert {row["error"] for row in rows if "custom_id" in row} == {None}

    kept = [answer for answer in whole.splitlines(keepends=True) if b'"custom_id": "text"' not in answer]
    torn = next(answer for answer in whole.splitlines(keepends=True) if b'"custom_id": "text"' in answer)
    out.write_bytes(b"".join(kept) + torn[:60])
    assert cli.main(command) == 1
    again = {row.get("custom_id", row["id"]): row for row in read(out)}
    assert again["text"]["response"]["body"]["choices"] == text["body"]["choices"]
    assert out.read_bytes().startswith(b"".join(kept))
    capsys.readouterr()
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages }}")
    for change in ("--top-k=3", f"--chat-template={template}"):
        assert cli.main([*command, change]) == 2
        said = capsys.readouterr().err
        assert "got an answer to another request, or by another checkpoint; use those of the file" in said


def answered(monkeypatch, capsys, *command):
    """The requests that a command gives to an engine."""
    found = []

    def complete(engine, rows, requests, **_):
        found.extend(zip(rows, requests, strict=True))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "complete", complete)
    assert cli.main([str(word) for word in command]) == 130, capsys.readouterr().err
    return found


def test_options_are_settings(chatty, monkeypatch, capsys):
    [(row, request)] = answered(
        monkeypatch,
        capsys,
        *("generate", chatty, "--prompt=Call me", "--chat", "--stop=a", "--stop=b c", "--n=2"),
        *("--temperature=0.5", "--min-p=0.1", "--min-new-tokens=2", "--top-k=-1", "--logprobs=3"),
        *("--repetition-penalty=1.1", "--presence-penalty=0.2", "--frequency-penalty=-0.3", "--ignore-eos"),
        *("--logit-bias=5=-100", "--logit-bias=6=2.5", "--include-stop-str-in-output"),
        *("--chat-template-kwargs", '{"enable_thinking": false}'),
    )
    assert row.request.messages == MESSAGES
    assert row.request.chat_template_kwargs == {"enable_thinking": False}
    assert request.stops == ("a", "b c")
    assert request.logit_bias == {5: -100.0, 6: 2.5}
    assert (request.n, request.min_p, request.min_new_tokens, request.top_k) == (2, 0.1, 2, -1)
    assert (request.repetition_penalty, request.presence_penalty) == (1.1, 0.2)
    assert (request.frequency_penalty, request.logprobs) == (-0.3, 3)
    assert request.ignore_eos
    assert request.include_stop_str_in_output
    assert request.messages is None
    assert isinstance(request.prompt, list)


def test_a_template_of_ones_own(chatty, tmp_path, monkeypatch, capsys):
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}!")
    file = write(
        tmp_path / "in.jsonl", [{"prompt": "Call me"}, {"messages": MESSAGES}, {"prompt": "Call me!"}]
    )
    command = ("generate", chatty, f"--prompts={file}")
    chats = answered(monkeypatch, capsys, *command, "--chat", f"--chat-template={template}")
    texts = answered(monkeypatch, capsys, *command, f"--chat-template={template}")
    prompts = [request.prompt for _, request in chats]
    assert prompts[0] == prompts[1] == texts[1][1].prompt == texts[2][1].prompt
    assert prompts[2] != prompts[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--logit-bias=5"], "--logit-bias must be ID=BIAS, such as 50256=-100, got '5'"),
        (["--n=2"], "n must be 1 at temperature 0"),
        (["--chat-template=none"], "--chat-template: none: expected a chat template, got No such file"),
        (["--chat", "--chat-template-kwargs=[1]"], "--chat-template-kwargs: expected a JSON object such as"),
        (["--chat-template-kwargs={}"], "chat_template_kwargs cannot be given without messages"),
        (["--stop="], "stop must be a text or a list of texts, none of them empty"),
        (["--logprobs=30"], "logprobs must be a whole number in 0..20 or None, got 30"),
    ],
    ids=str,
)
def test_options_that_are_refused(chatty, capsys, args, message):
    assert message in refusal(capsys, "generate", chatty, "--prompt=x", *args)


def test_a_checkpoint_without_a_template(tiny, capsys):
    message = "--prompt 'x': the prompt: expected the checkpoint to have a chat template, found none"
    assert refusal(capsys, "generate", tiny, "--prompt=x", "--chat").startswith(message)


def test_samples_share_a_line(tiny, tmp_path, capsys):
    """With what was drawn and asked for, and the file can be continued."""
    row = {"prompt": "Call me", "n": 2, "temperature": 1.0, "seed": None, "max_new_tokens": 2, "logprobs": 1}
    file, out = write(tmp_path / "in.jsonl", [row | {"logit_bias": {"5": 1}}]), tmp_path / "out.jsonl"
    command = ["generate", str(tiny), f"--prompts={file}", f"--out={out}"]
    assert cli.main(command) == 0
    [found] = read(out)
    first, second = found["completions"]
    assert (first["index"], second["index"]) == (0, 1)
    assert second["seed"] == (first["seed"] + 1) % 2**32
    assert found["settings"]["seed"] is None
    assert len(first["logprobs"]) == 2
    assert first["cumulative_logprob"] == pytest.approx(sum(t["logprob"] for t in first["logprobs"]))
    whole = out.read_bytes()
    assert cli.main(command) == 0
    assert out.read_bytes() == whole
    write(file, [row | {"logit_bias": {"5": 2}}])
    capsys.readouterr()
    assert "got logit_bias {'5': 1} (now {'5': 2})" in refusal(capsys, *command)
    assert json.loads(whole)["settings"]["logit_bias"] == {"5": 1}
