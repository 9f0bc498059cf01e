"""From token ids to text, as a whole (`continuation`) or piece by piece (`TextStream`)."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What the first bytes of a character decode to."""

CONTEXT = 4
"""A character has four bytes at most: the latest tokens that its first byte must be among."""


def continuation(tokenizer: Tokenizer, tokens: Sequence[int], finish: str) -> str:
    """The text of a request's new tokens, the one that stopped it left out."""
    return tokenizer.decode(tokens[:-1] if finish == "stop" else tokens)


class TextStream:
    """The text of a growing list of tokens, in pieces that join to `continuation`.

    Text that the next token may still change is held back: a character that is not whole yet, and a run of
    byte tokens ("<0xE2>" and the like), which is decoded together, so that one wrong byte spoils those before
    it. Each time only the latest tokens are decoded; all of them once, at the end.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._window: list[int] = []  # the latest tokens: some whose text is out, then those being held back
        self._shown = 0  # characters of the window's text that are out
        self._length = 0  # characters that are out in all

    def add(self, token: int) -> str:
        """What a token adds to the text; "" while nothing is certain."""
        name = self.tokenizer.id_to_token(token)
        if name is None or self._is_special(token):
            return ""
        self._window.append(token)
        if len(name) == 6 and name.startswith("<0x"):
            return ""
        text = self.tokenizer.decode(self._window)
        certain = text.removesuffix(UNFINISHED)
        piece = certain[self._shown :]
        # Decoding may treat what comes first in another way, so some tokens before the next ones are kept.
        self._window = self._window[-CONTEXT:]
        self._shown = len(self.tokenizer.decode(self._window)) - (len(text) - len(certain))
        self._length += len(piece)
        return piece

    def end(self, tokens: Sequence[int], finish: str) -> str:
        """The rest of the text of all tokens: what was held back, as it decodes without a successor."""
        return continuation(self.tokenizer, tokens, finish)[self._length :]

    def _is_special(self, token: int) -> bool:
        return not self.tokenizer.decode([token]) and bool(
            self.tokenizer.decode([token], skip_special_tokens=False)
        )
