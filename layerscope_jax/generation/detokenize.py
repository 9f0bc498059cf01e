"""Detokenising: from token ids to text, as a whole (`continuation`) or piece by piece (`TextStream`).

New tokens are decoded together with the last tokens of their prompt, whose text is then removed: a decoder
may drop the space at the beginning of a text, and a character may begin in the prompt and end in a new token.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What the first bytes of a character decode to."""

CONTEXT = 4
"""Number of latest tokens that may hold the first byte of a character, which has at most four bytes."""


def continuation(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    finish: str,
    prompt: Sequence[int] = (),
    special: bool = False,
) -> str:
    """Returns the text of a request's new tokens after its prompt, without the stop token that ended it.

    `special` is whether special tokens have text.
    """
    tail = tail_of(tokenizer, prompt)
    new = tokens[:-1] if finish == "stop" else tokens
    text = tokenizer.decode([*tail, *new], skip_special_tokens=not special)
    return text[_shared(tokenizer.decode(tail), text) :]


def tail_of(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """Returns the last tokens of a prompt that affect how the next tokens are decoded.

    Special tokens do not. Byte tokens are decoded together, so a run of them is included from its beginning.
    """
    tail: list[int] = []
    for token in reversed(prompt):
        if len(tail) >= CONTEXT and not _is_byte(tokenizer.id_to_token(tail[-1])):
            break
        if tokenizer.id_to_token(token) is not None and not is_special(tokenizer, token):
            tail.append(token)
    return tail[::-1]


def is_special(tokenizer: Tokenizer, token: int) -> bool:
    """Returns whether a token has text only if special tokens are decoded too."""
    return not tokenizer.decode([token]) and bool(tokenizer.decode([token], skip_special_tokens=False))


def _is_byte(name: str | None) -> bool:
    return name is not None and len(name) == 6 and name.startswith("<0x")


def _shared(before: str, text: str) -> int:
    """Returns how many characters of the text of a prompt's tail stay the same when more tokens follow."""
    pairs = zip(before, text, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(before), len(text)))


class TextStream:
    """Text of a growing list of tokens, in pieces that join to `continuation`.

    Text that the next token may still change is held back: an incomplete character, and a run of byte tokens
    ("<0xE2>" and the like), which is decoded together, so that one wrong byte spoils those before it. Only
    the latest tokens are decoded each time; all tokens are decoded once, at the end.

    Args:
        tokenizer: tokenizer of the model.
        prompt: token ids that the text follows.
        special: whether special tokens have text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), special: bool = False):
        self.tokenizer, self._special = tokenizer, special
        self._tail = tail_of(tokenizer, prompt)
        self._before: str | None = tokenizer.decode(
            self._tail
        )  # what of it is no text of ours; None: behind us
        self._window = list(
            self._tail
        )  # the latest tokens: some whose text is out, then those being held back
        self._added = 0  # to the window, while it holds the prompt's tail
        self._shown = 0  # characters of the window's text that are out, or the prompt's
        self._length = 0  # characters that are out in all

    def add(self, token: int) -> str:
        """Adds a token and returns the text that is now certain; "" if there is no new text yet."""
        name = self.tokenizer.id_to_token(token)
        if name is None or (not self._special and is_special(self.tokenizer, token)):
            return ""
        self._window.append(token)
        self._added += 1
        if _is_byte(name):
            return ""
        text = self._decoded()
        certain = text.removesuffix(UNFINISHED)
        if self._before is not None:
            self._shown = _shared(self._before, certain)
            if len(certain) <= self._shown and self._added < CONTEXT:
                return ""  # the first characters may still be the prompt's last
            self._before = None
        piece = certain[self._shown :]
        # Decoding may treat what comes first in another way, so some tokens before the next ones are kept.
        self._window = self._window[-CONTEXT:]
        self._shown = len(self._decoded()) - (len(text) - len(certain))
        self._length += len(piece)
        return piece

    def end(self, tokens: Sequence[int], finish: str) -> str:
        """Returns the rest of the text: what was held back, decoded as if no token follows."""
        whole = continuation(self.tokenizer, tokens, finish, self._tail, self._special)
        return whole[self._length :]

    def _decoded(self) -> str:
        return self.tokenizer.decode(self._window, skip_special_tokens=not self._special)
