"""`layerscope chat`: answers are those of the conversation so far, and commands do what /help says."""

import io
import os
import signal
import sys
from pathlib import Path

import pytest
from command_lines import refusal
from helpers import not_ignored

from layerscope_jax import Engine, Request, load
from layerscope_jax.cli import chat
from layerscope_jax.cli import main as cli
from layerscope_jax.generation.chat import Chat, read_template
from layerscope_jax.generation.conversation import Conversation
from layerscope_jax.generation.handles import Handle
from layerscope_jax.support import interrupts

pytestmark = pytest.mark.usefixtures("quick_compiles")

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}a:"
EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = ("--max-new-tokens=6", "--ignore-eos")


@pytest.fixture(autouse=True)
def heeded():
    """Whoever runs the tests may ignore Ctrl-C."""
    with not_ignored(signal.SIGINT):
        yield


@pytest.fixture
def template(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    return file


@pytest.fixture
def talk(tiny, template, monkeypatch, capsys):
    def said(*lines, options=SETTINGS, terminal=False):
        stdin = io.StringIO("".join(f"{line}\n" for line in lines))
        stdin.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdin", stdin)
        assert cli.main(["chat", str(tiny), f"--chat-template={template}", *options]) == 0
        return capsys.readouterr()

    return said


@pytest.fixture(scope="module")
def engine(tiny):
    with Engine(load(tiny)) as engine:
        yield engine


def answer(engine, *turns, system=None, **settings):
    """What an engine says to a conversation of user and model in turns."""
    text = "" if system is None else f"s: {system}\n"
    text += "".join(f"{'ua'[index % 2]}: {turn}\n" for index, turn in enumerate(turns)) + "a:"
    ids = engine.model.tokenizer.encode(text, add_special_tokens=False).ids
    request = Request(prompt=ids, max_new_tokens=6, stop_token_ids=(), **settings)
    return engine.generate([request])[0].text


def test_an_answer_knows_the_conversation(talk, engine):
    one = answer(engine, "Call me Ishmael.")
    two = answer(engine, "Call me Ishmael.", one, "Why?")
    assert talk("Call me Ishmael.", "", "Why?").out == f"{one}\n{two}\n"


def test_commands(talk, engine):
    sampled = {"temperature": 5.0}
    before = answer(engine, "Who?", system="S", seed=3, **sampled)
    again = answer(engine, "Who?", system="S", seed=4, **sampled)
    fresh = answer(engine, "What\nis it?", seed=4, **sampled)
    assert len({before, again, fresh}) == 3
    out, err = talk(
        *(
            "Who?",
            "/retry",
            "/stats",
            "/clear",
            "/undo",
            "/system",
            '"""What',
            'is it?"""',
            "/help",
            "/x",
            "/exit",
        ),
        "never read",
        options=(*SETTINGS, "--temperature=5", "--seed=3", "--system=S"),
    )
    assert out == f"{before}\n{again}\n{fresh}\n"
    for line in ("6 tokens for 1 prompt", "there is no message yet", "/retry", "there is no /x"):
        assert line in err


def test_a_terminal_is_told_what_an_answer_took(talk):
    out, err = talk("Who?", terminal=True)
    assert out.startswith(">>> ")
    assert "tokens a second, the first after" in err
    assert "of 256 tokens in the context" in err


def test_ctrl_c_stops_an_answer_and_no_more(talk, engine, monkeypatch):
    follow = Handle.__iter__

    def interrupted(handle):
        for number, token in enumerate(follow(handle)):
            if number == 1 and not seen:
                seen.append(token)
                os.kill(os.getpid(), signal.SIGINT)
            yield token

    seen, before = [], signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Handle, "__iter__", interrupted)
    out = talk("Who?", "/clear", "Who?").out
    cut, whole = out.split("\n")[:2] if out.count("\n") == 2 else (None, out)
    assert whole == answer(engine, "Who?")
    assert cut is not None
    assert whole.startswith(cut)
    assert cut != whole
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_at_the_prompt_ends_nothing(monkeypatch, capsys):
    talking = object.__new__(chat.Talking)
    talking._is_terminal = True

    def reading(prompt):
        reads.append(prompt)
        if len(reads) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return "text"

    reads = []
    monkeypatch.setattr("builtins.input", reading)
    assert talking._read() == "text"
    assert "/exit ends the conversation" in capsys.readouterr().err


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.instead(pytest.fail):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_old_turns_make_room(tiny):
    tokenizer, template = load(tiny).tokenizer, Chat(None, TEMPLATE)
    conversation = Conversation("S")
    for number in range(6):
        conversation.ask(f"Question {number}")
        conversation.answer(f"Answer {number}")
    conversation.ask("The last one")

    def prompt(context):
        ids, left_out = conversation.prompt(template, tokenizer, context, 8)
        assert len(ids) + 8 <= context
        return tokenizer.decode(ids), left_out

    whole, left_out = prompt(250)
    assert (whole[:16], left_out) == ("s: S\nu: Question", 0)
    cut, left_out = prompt(60)
    assert 0 < left_out < 6
    assert cut.startswith(f"s: S\nu: Question {left_out}\na: Answer {left_out}\n")
    with pytest.raises(ValueError, match="leaves 8 of the context's 12 tokens for an answer"):
        prompt(12)
    template.close()


def test_a_message_that_is_too_long_is_taken_back(talk, engine):
    out, err = talk("word " * 400, "Who?")
    assert out == f"{answer(engine, 'Who?')}\n"
    assert "shorten it" in err


def test_without_a_template_nothing_is_loaded(tiny, capsys, monkeypatch):
    monkeypatch.setattr(chat.Talk, "open_model", lambda self: pytest.fail("loaded"))
    said = refusal(capsys, "chat", tiny)
    assert "expected the checkpoint to have a chat template, found none" in said
    assert said.count("--chat-template FILE") == 1


def test_the_plain_template_makes_a_conversation_plain_text():
    """Of `examples/chat.jinja`, which lends a model without a template one."""
    template = Chat(None, read_template(EXAMPLES / "chat.jinja"))
    turns = [("system", "Be brief."), ("user", "Who?"), ("assistant", "I."), ("user", "Why?")]
    request = Request(messages=[{"role": role, "content": content} for role, content in turns])
    told = "system: Be brief.\nuser: Who?\nassistant: I.\nuser: Why?\nassistant:"
    assert template.render(request) == told
    template.close()
