"""A conversation that goes on: its messages, and how much of it fits the model's context."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from layerscope_jax.generation.chat import Chat
from layerscope_jax.generation.encoding import encode_within
from layerscope_jax.generation.requests import Request


@dataclass
class Conversation:
    """Messages of a user and a model in turns, perhaps behind those of a system.

    Attributes:
        system: what the model is told before all else; None for nothing.
        messages: of the user and the model, in turns, the user's first.
    """

    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """Adds what the user says."""
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Adds what the model says."""
        self.messages.append({"role": "assistant", "content": text})

    def take_back(self) -> str | None:
        """Removes the user's last message, and what the model has said to it.

        Returns:
            The message; None if there is none.

        >>> conversation = Conversation()
        >>> conversation.ask("Who are you?"); conversation.answer("Ishmael.")
        >>> conversation.take_back(), conversation.messages
        ('Who are you?', [])
        """
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def prompt(
        self,
        chat: Chat,
        tokenizer: Tokenizer,
        context: int,
        new_tokens: int,
        variables: dict[str, Any] | None = None,
    ) -> tuple[list[int], int]:
        """Makes a prompt of the conversation, without its oldest turns where they leave the model no room.

        Args:
            chat: the model's templates.
            tokenizer: the model's.
            context: number of tokens that the model can take, new ones included.
            new_tokens: number of them that are kept for the answer.
            variables: further ones of the template.

        Returns:
            The prompt's token ids, and how many turns (a question and its answer) are left out of it.

        Raises:
            ValueError: if the last message alone is too long, or the template gives no prompt.
        """
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        for first in range(0, len(self.messages), 2):
            messages = [*system, *self.messages[first:]]
            text = chat.render(Request(messages=messages, chat_template_kwargs=variables))
            # A template has written special tokens itself.
            ids = encode_within(tokenizer, text, context, special=False)
            if ids is not None and len(ids) + new_tokens <= context:
                return ids, first // 2
        raise ValueError(
            f"expected a message that leaves {new_tokens} of the context's {context} tokens for an answer, "
            "got a longer one; shorten it"
        )
