"""The command `layerscope chat`: a conversation in a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Suppress

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.cli.args import arg
from layerscope_jax.cli.complete import summary
from layerscope_jax.cli.engine_options import EngineOptions
from layerscope_jax.cli.options import PrefixCache
from layerscope_jax.cli.request_options import RequestOptions
from layerscope_jax.engine import Engine
from layerscope_jax.generation.chat import Chat
from layerscope_jax.generation.completions import Completions
from layerscope_jax.generation.conversation import Conversation
from layerscope_jax.generation.requests import Request
from layerscope_jax.runtime.statistics import RunStats
from layerscope_jax.support import exits, interrupts
from layerscope_jax.support.exits import say

NEW_TOKENS = 1024
"""Most tokens of an answer where nothing else is said."""

LEAST_ROOM = 8
"""An eighth of the context is kept for an answer that may be as long: rather, older turns are left out."""

BLOCK = '"""'

HELP = f"""\
  /clear          begins a new conversation
  /retry          answers the last message anew, with another seed
  /undo           takes the last message and its answer back
  /system TEXT    what the model is told before the conversation; without TEXT, nothing
  /stats          what the last answer took, in full
  /help           this list
  /exit           ends it, as Ctrl-D does
{BLOCK} begins a message of several lines, and {BLOCK} ends it. Ctrl-C stops an answer."""


@dataclass(frozen=True, kw_only=True)
class Talk(RequestOptions, EngineOptions):
    """Talk with a model in the terminal; /help lists what can be said besides.

    What comes through a pipe is a message a line, and answers are all that is printed to standard output.

    Examples:
        layerscope chat path/to/checkpoint --device-budget 2GiB
        layerscope chat path/to/checkpoint --system "Answer in one sentence." --temperature 0.7
        layerscope chat shipped --chat-template examples/chat.jinja --stop "user:" --max-new-tokens 32
    """

    system: Annotated[
        str | None, arg(metavar="TEXT", help="What the model is told before the conversation.")
    ] = None
    json: Annotated[
        bool, arg(help="Print the conversation as one JSON document at its end, and nothing before.")
    ] = False
    chat: Suppress[bool] = True
    n: Suppress[None] = None
    logprobs: Suppress[None] = None
    prompt_logprobs: Suppress[None] = None
    max_num_seqs: Suppress[int] = 1
    prefix_cache: PrefixCache = True

    def run(self) -> int:
        """Returns the exit code."""
        exits.need_output()
        config, settings = self.engine_config(), self.settings()
        variables = settings.pop("chat_template_kwargs", None)
        with closing(Chat(self.folder, self.template())) as chat:
            try:  # before the weights are loaded
                chat.render(
                    Request(messages=[{"role": "user", "content": "."}], chat_template_kwargs=variables)
                )
            except ValueError as error:
                raise ValueError(f"{self.checkpoint}: {error}; see docs/chat.md") from None
            model = self.open_model()
            if model.tokenizer is None:
                raise ValueError(f"{self.checkpoint} has no tokenizer; add its files to hold a conversation")
            with Engine(
                model, self.measured(config, model), generation_config=self.generation_config
            ) as engine:
                talking = Talking(engine, model, chat, settings, variables, self.system, quiet=self.json)
                talking.run()
        if self.json:
            print(json.dumps(talking.to_json()))
        return exits.DONE


class Talking:
    """Reads what the user says, and answers, to the end.

    Args:
        engine, model, chat: of the conversation.
        settings: of requests.
        variables: further ones of the chat template.
        system: what the model is told first.
        quiet: whether answers are not printed as they come.
    """

    def __init__(
        self,
        engine: Engine,
        model: Model,
        chat: Chat,
        settings: dict[str, Any],
        variables: dict[str, Any] | None,
        system: str | None,
        quiet: bool = False,
    ):
        assert model.tokenizer is not None
        self._engine, self._model, self._chat = engine, model, chat
        self._tokenizer, self._variables = model.tokenizer, variables
        self._settings = {"max_new_tokens": NEW_TOKENS} | dict(engine.defaults) | settings
        self._conversation = Conversation(system)
        self._last, self._stats = "there was no answer yet", list[dict[str, Any]]()
        self._show: Callable[[str], object] = (lambda text: None) if quiet else shown
        self._seed = self._settings.get("seed") or 0
        self._is_terminal = sys.stdin.isatty()
        self._quiet = Console(stderr=True, highlight=False)
        self._commands: dict[str, Callable[[str], object]] = {
            "clear": self._clear,
            "retry": self._retry,
            "undo": self._undo,
            "system": self._tell,
            "stats": lambda text: say(self._last),
            "help": lambda text: say(HELP),
        }

    def run(self) -> None:
        """Reads messages and commands until there are no more, or /exit."""
        if self._is_terminal:
            with suppress(ImportError):  # Windows has none
                import readline  # noqa: F401  `input` then edits lines and recalls them
            say("/help lists the commands, Ctrl-D ends the conversation")
        while (text := self._read()) is not None:
            name, _, rest = text.strip().partition(" ")
            if name in ("/exit", "/bye", "/quit"):
                return
            if name.startswith("/"):
                command = self._commands.get(name[1:])
                command(rest.strip()) if command else say(f"there is no {name}; /help lists the commands")
            elif text.strip():
                self._conversation.ask(text)
                self._answer()

    def to_json(self) -> dict[str, Any]:
        """Returns the conversation, and the statistics of each answer that was given."""
        return {
            "system": self._conversation.system,
            "messages": self._conversation.messages,
            "stats": self._stats,
        }

    def _read(self) -> str | None:
        """Returns a line, or several between three quotes; None at the end."""
        while True:
            try:
                with interrupts.instead(_raise):
                    line = self._line(">>> ")
                    if line is None or not line.strip().startswith(BLOCK):
                        return line
                    lines = [line.strip().removeprefix(BLOCK)]
                    while not lines[-1].rstrip().endswith(BLOCK):
                        if (line := self._line("... ")) is None:
                            return None
                        lines.append(line)
                    return "\n".join(lines).rstrip().removesuffix(BLOCK).strip("\n")
            except KeyboardInterrupt:
                say("\nCtrl-D or /exit ends the conversation")

    def _line(self, prompt: str) -> str | None:
        try:
            return input(prompt if self._is_terminal else "")
        except EOFError:
            if self._is_terminal:
                say("")
            return None

    def _answer(self, retry: bool = False) -> None:
        """Answers the last message; takes it back if that cannot be done."""
        self._seed += retry
        context = self._model.config.max_position_embeddings
        room = min(self._settings["max_new_tokens"], context // LEAST_ROOM)
        try:
            ids, left_out = self._conversation.prompt(
                self._chat, self._tokenizer, context, room, self._variables
            )
            found = self._generate(ids)
        except ValueError as error:
            self._conversation.take_back()
            say(f"error: {error}")
            return
        self._conversation.answer(found[0].text)
        self._last = summary(found.stats, self._model.bank.total_bytes)
        self._stats.append(found.stats.to_json())
        if self._is_terminal:
            used = len(ids) + len(found[0].token_ids)
            self._quiet.print(turn(found.stats, used, context, left_out), style="dim")

    def _generate(self, ids: list[int]) -> Completions:
        """Prints an answer as it comes, up to its end or Ctrl-C."""
        handle = self._engine.submit(ids, **self._settings | {"seed": self._seed})
        with interrupts.instead(handle.cancel):
            for token in handle:
                self._show(token.text)
        self._show("\n")
        return handle.results()

    def _retry(self, text: str) -> None:
        if (question := self._undo(text)) is not None:
            self._conversation.ask(question)
            self._answer(retry=True)

    def _undo(self, text: str) -> str | None:
        question = self._conversation.take_back()
        if question is None:
            say("there is no message yet")
        return question

    def _clear(self, text: str) -> None:
        self._conversation = Conversation(self._conversation.system)

    def _tell(self, text: str) -> None:
        self._conversation.system = text or None


def shown(text: str) -> None:
    """Prints a part of an answer."""
    print(text, end="", flush=True)


def turn(stats: RunStats, used: int, context: int, left_out: int) -> str:
    """Returns a line on an answer."""
    speed = f"{1 / stats.tpot_s:.1f} tokens a second" if stats.tpot_s else "one token"
    without = f" without the oldest {left_out} messages and answers" if left_out else ""
    return (
        f"{speed}, the first after {stats.ttft_s:.2f} s; {used:,} of {context:,} tokens in the context"
        f"{without}; {stats.hit_rate:.0%} of the experts on the device were there already"
    )


def _raise() -> None:
    raise KeyboardInterrupt
