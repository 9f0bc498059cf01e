"""Conversations become the prompts that transformers makes of them, and no template does harm."""

import datetime
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from layerscope_jax.generation import chat, template_worker
from layerscope_jax.generation.chat import Chat
from layerscope_jax.generation.encoding import encode_prompts
from layerscope_jax.generation.requests import Request

FOLDER = Path(__file__).parents[1] / "golden" / "chat_templates"
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
HELLO = Request(messages=[{"role": "user", "content": "Hello"}])
SIMPLE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def folder_with(folder, **files):
    for name, content in files.items():
        file = folder / name.replace("__", "/").replace("_json", ".json").replace("_jinja", ".jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def made():
    """Makes chats, and closes them."""
    chats = []

    def make(folder=None, template=None):
        chats.append(Chat(folder, template))
        return chats[-1]

    yield make
    for one in chats:
        one.close()


@pytest.fixture
def _in_this_process(monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.fromisoformat(EXPECTED["today"])

    monkeypatch.setattr(template_worker, "datetime", Clock)
    monkeypatch.setattr(Chat, "_asked", lambda self, line: template_worker.answer(line))


@pytest.mark.usefixtures("_in_this_process")
@pytest.mark.parametrize("name", EXPECTED["prompts"])
def test_prompts_are_those_of_transformers(name, made, tmp_path):
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokens = {key: {"content": token} for key, token in EXPECTED["tokens"].items()}
    chat = made(folder_with(tmp_path, chat_template_jinja=template, tokenizer_config_json=tokens))
    for about, fields in EXPECTED["conversations"].items():
        prompt = EXPECTED["prompts"][name][about]
        if isinstance(prompt, str):
            assert chat.render(Request(**fields)) == prompt, about
            continue
        with pytest.raises(ValueError, match="the chat template gives no prompt: ") as raised:
            chat.render(Request(**fields))
        assert prompt["error"][:300] in str(raised.value)


NAMED = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
TOOLS = Request(messages=HELLO.messages, tools=[{"type": "function"}])


@pytest.mark.parametrize(
    ("files", "request_", "prompt"),
    [
        ({"tokenizer_config_json": {"chat_template": "d"}}, TOOLS, "d"),
        ({"tokenizer_config_json": {"chat_template": NAMED}}, HELLO, "d"),
        ({"tokenizer_config_json": {"chat_template": NAMED}}, TOOLS, "t"),
        ({"tokenizer_config_json": {"chat_template": NAMED}, "chat_template_jinja": "f"}, TOOLS, "f"),
        ({"chat_template_jinja": "f", "additional_chat_templates__tool_use_jinja": "a"}, TOOLS, "a"),
        ({"chat_template_jinja": "f", "additional_chat_templates__tool_use_jinja": "a"}, HELLO, "f"),
        (
            {
                "chat_template_jinja": SIMPLE,
                "tokenizer_config_json": {"bos_token": "<t>"},
                "special_tokens_map_json": {"bos_token": {"content": "<s>"}},
            },
            HELLO,
            "<s>[user]Hello",
        ),
        (
            {
                "chat_template_jinja": SIMPLE,
                "tokenizer_config_json": {"bos_token": "<s>", "added_tokens_decoder": {}},
                "special_tokens_map_json": {"bos_token": "<t>"},
            },
            HELLO,
            "<s>[user]Hello",
        ),
        (
            {"chat_template_jinja": SIMPLE, "tokenizer_config_json": {"bos_token": "<s>"}},
            HELLO,
            "<s>[user]Hello",
        ),
        ({"chat_template_jinja": SIMPLE}, HELLO, "[user]Hello"),
    ],
)
@pytest.mark.usefixtures("_in_this_process")
def test_which_template_is_used(files, request_, prompt, made, tmp_path):
    """The rules are those of transformers."""
    folder = folder_with(tmp_path, **files)
    assert made(folder).render(request_) == prompt
    assert made(folder, "mine").render(request_) == "mine"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected the checkpoint to have a chat template, found none; give a prompt instead"),
        ({"additional_chat_templates__rag_jinja": "a"}, "found only 'rag'; give a prompt"),
        (
            {"tokenizer_config_json": {"chat_template": 3}},
            "expected a chat_template that is a text or a list",
        ),
        ({"tokenizer_config_json": {"chat_template": [{"name": "a"}]}}, "expected a chat_template that is"),
        ({"tokenizer_config_json": "["}, "tokenizer_config.json: expected JSON"),
        ({"chat_template_jinja": "{% if %}"}, "gives no prompt: line 1: Expected an expression"),
        ({"chat_template_jinja": "a\n{{ raise_exception('No!') }}"}, "gives no prompt: No!"),
        ({"chat_template_jinja": "{{ nothing.at.all }}"}, "gives no prompt: 'nothing' is undefined"),
        ({"chat_template_jinja": "{{ messages.__class__.mro }}"}, "gives no prompt: access to attribute"),
        ({"chat_template_jinja": "{{ messages.append(1) }}"}, "gives no prompt: access to attribute .append"),
        ({"chat_template_jinja": "{% include '/etc/passwd' %}"}, "gives no prompt: no loader"),
        ({"chat_template_jinja": "{{ '\\ud800' }}"}, "holds half a surrogate pair"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("_in_this_process")
def test_what_is_no_template(files, message, made, tmp_path):
    chat = made(folder_with(tmp_path, **files))
    with pytest.raises(ValueError, match=f"prompt 1.*{message}"):
        encode_prompts([Request(prompt=[1]), HELLO], Words(), 99, 99, chat)


class Words:
    """Stands for a tokenizer that begins each text with a token of its own."""

    def encode(self, text, add_special_tokens=True):
        return type("Encoding", (), {"ids": [0] * add_special_tokens + [len(word) for word in text.split()]})


def test_a_template_writes_the_special_tokens_itself(made):
    ids = encode_prompts([Request(prompt="a bc"), HELLO], Words(), 99, 99, made(None, "a bc"))
    assert ids == [[0, 1, 2], [1, 2]]


@pytest.mark.usefixtures("_in_this_process")
def test_tags_that_jinja_does_not_have(made):
    template = (
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{% set a = 1 %}"
        "{% generation %}{% set a = 2 %}<{{ m.content | tojson }}>{% endgeneration %}{{ a }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "<é>"}, {"role": "user", "content": "b"}]
    assert made(None, template).render(Request(messages=messages)) == '<"<é>">1'


LOOP = "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP, "it takes longer than 0.3 s"),
        (
            "{{ (messages | length + 2) ** (10 ** 8) % 7 }}",
            "it takes longer than 0.3 s",
        ),  # within a single instruction
        (DOUBLING, "it needs more than 64 MiB"),
        ("{{ 'a' * 10 ** 10 }}", "it needs more than 64 MiB"),
        (
            "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
            "it makes more than 16,000,000 characters",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself too deeply"),
    ],
    ids=["a loop", "a number", "doubling", "a text", "an output", "a recursion"],
)
def test_a_template_that_does_not_end_is_ended(template, message, made, monkeypatch, tmp_path):
    """And the next conversation is rendered as ever."""
    worker = tmp_path / "worker.py"
    source = Path(template_worker.__file__).read_text()
    assert "MEMORY_BYTES = 1 << 30" in source
    worker.write_text(source.replace("MEMORY_BYTES = 1 << 30", "MEMORY_BYTES = 1 << 26"))
    monkeypatch.setattr(template_worker, "__file__", str(worker))
    conversation = made(None, "{% if harmful %}" + template + "{% else %}" + SIMPLE + "{% endif %}")
    assert conversation.render(HELLO) == "[user]Hello"  # the process has started
    monkeypatch.setattr(chat, "PATIENCE_S", 0.3 if "0.3" in message else 60.0)
    harmful = Request(messages=HELLO.messages, chat_template_kwargs={"harmful": True})
    with pytest.raises(ValueError, match=message):
        conversation.render(harmful)
    monkeypatch.setattr(chat, "PATIENCE_S", 60.0)
    assert conversation.render(HELLO) == "[user]Hello"


def test_an_interrupt_ends_the_process(made, monkeypatch):
    """Else its late answer would be the next conversation's."""
    conversation = made(None, SIMPLE)
    assert conversation.render(HELLO) == "[user]Hello"
    process = conversation._process

    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, process.stdout as pipe:
        patch.setattr(process, "stdout", SimpleNamespace(readline=interrupt, close=pipe.close))
        with pytest.raises(KeyboardInterrupt):
            conversation.render(HELLO)
    assert process.poll() is not None
    other = Request(messages=[{"role": "user", "content": "Bye"}])
    assert conversation.render(other) == "[user]Bye"
    conversation.close()
    conversation.close()
