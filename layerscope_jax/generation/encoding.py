"""Prompts as token ids, refused where the model cannot take them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from tokenizers import Tokenizer

from layerscope_jax.generation.chat import Chat
from layerscope_jax.generation.requests import Request, is_text


def encode_prompts(
    requests: Sequence[Request],
    tokenizer: Tokenizer | None,
    max_position_embeddings: int,
    vocab_size: int,
    chat: Chat | None = None,
) -> list[list[int]]:
    """Returns the token ids of every prompt; `chat` makes prompts of conversations, None by no template.

    Raises:
        ValueError: naming every prompt that is empty, too long or not valid text, that has token ids or
            stop tokens outside the vocabulary, or whose conversation the chat template does not take.
    """
    chat = chat or Chat(None)
    prompts, problems = [], []
    for index, request in enumerate(requests):
        ids: list[int] | None
        prompt = request.prompt
        if request.stops and tokenizer is None:
            raise ValueError(f"prompt {index} has stop strings, but the model has no tokenizer")
        if request.messages is not None or isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(
                    f"prompt {index} is text, but the model has no tokenizer; pass token ids instead"
                )
            if isinstance(prompt, str) and not is_text(prompt):
                problems.append(
                    f"prompt {index} holds half a surrogate pair (\\ud800 to \\udfff, or a byte that is not "
                    "UTF-8), which is not a character; remove it"
                )
                continue
            try:
                text = prompt if isinstance(prompt, str) else chat.render(request)
            except ValueError as error:
                problems.append(f"prompt {index}: {error}")
                continue
            # A template has written the special tokens itself.
            special = isinstance(prompt, str)
            ids = encode_within(tokenizer, text, max_position_embeddings, special)
            count = f"more than {max_position_embeddings}" if ids is None else str(len(ids))
        else:
            assert prompt is not None
            count = str(len(prompt))
            too_many = len(prompt) >= max_position_embeddings  # they need not be looked at one by one
            ids = None if too_many else [operator.index(token) for token in prompt]
        if ids is None or len(ids) >= max_position_embeddings:
            problems.append(
                f"prompt {index} has {count} tokens; the model's context holds {max_position_embeddings}, "
                "including at least one new token: shorten it"
            )
            continue
        if not ids:
            problems.append(f"prompt {index} is empty; it needs at least one token")
        for what, tokens in (
            ("ids", ids),
            ("stop_token_ids", request.stop_token_ids or ()),
            ("logit_bias of ids", request.logit_bias or ()),
        ):
            outside = [int(token) for token in tokens if not 0 <= token < vocab_size]
            if outside:
                problems.append(f"prompt {index} has {what} outside 0..{vocab_size - 1}: {outside[:5]}")
        prompts.append(ids)
    if problems:
        raise ValueError("; ".join(problems))
    return prompts


MARGIN = 1024
"""Generous limit on the tokens that a cut may add to those of a text: only tokens at the cut can change."""


def encode_within(tokenizer: Tokenizer, text: str, most: int, special: bool = True) -> list[int] | None:
    """Returns the token ids of a text; None if there are certainly more than `most`.

    Tokenising a text that is far too long would take minutes and gigabytes, so only its beginning is
    tokenised, longer each time, until the beginning alone has more than twice `most` tokens. The tokenizer
    itself does the counting, because it may merge or drop characters, such as long runs of spaces.
    `special` is whether it adds special tokens, such as one for the beginning.
    """
    size = 16 * (most + MARGIN)
    while size < len(text):
        if len(tokenizer.encode(text[:size], add_special_tokens=special).ids) > 2 * most + MARGIN:
            return None
        size *= 4
    return tokenizer.encode(text, add_special_tokens=special).ids
