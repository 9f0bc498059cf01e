"""A checkpoint's tokenizer: what `tokenizer.json` says, and what `tokenizer_config.json` adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from layerscope_jax.support.files import is_there, read_json

ADDED = "added_tokens_decoder"
FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a folder; None where it has no `tokenizer.json`.

    It encodes what it is given, all of it and nothing else: the length that a tokenizer was once told to cut
    or to fill texts to is saved with it, and is not meant for prompts.

    Args:
        folder: with `tokenizer.json` and maybe `tokenizer_config.json`, whose added tokens count too.
        vocab_size: of the model.

    Raises:
        ValueError: if a file is damaged, or the two do not fit together.
    """
    file = folder / "tokenizer.json"
    if not is_there(file):
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except BaseException as error:  # tokenizers raises nothing narrower, and panics past Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise ValueError(f"{file}: expected a tokenizer, got {error}; download it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = folder / "tokenizer_config.json"
    if is_there(config):
        try:
            _add(tokenizer, read_json(config).get(ADDED), vocab_size)
        except ValueError as error:
            where = "" if str(config) in str(error) else f"{config}: {ADDED}: "
            raise ValueError(f"{where}{error}") from None
    return tokenizer


def _add(tokenizer: Tokenizer, given: Any, vocab_size: int) -> None:
    """Adds tokens that the tokenizer lacks or has with other flags, under the ids that they are given."""
    if not isinstance(given, Mapping | None):
        raise ValueError(f"expected an object, got {type(given).__name__}; download it again")
    tokens = sorted((_id(name), _token(name, entry)) for name, entry in (given or {}).items())
    had = tokenizer.get_added_tokens_decoder()
    for number, (content, flags) in tokens:
        if number in had and (had[number].content, _flags(had[number])) == (content, flags):
            continue
        if tokenizer.token_to_id(content) is None:
            _fill(tokenizer, number, vocab_size, content)
        tokenizer.add_tokens([AddedToken(content, **dict(zip(FLAGS, flags, strict=True)))])
        if (found := tokenizer.token_to_id(content)) != number:
            raise ValueError(
                f"expected {content!r} to have the id {number}, got {found} from tokenizer.json; take both "
                "files from one model"
            )


def _fill(tokenizer: Tokenizer, number: int, vocab_size: int, content: str) -> None:
    """Takes the ids up to `number`, since the next one that is free is what a new token gets."""
    if number >= vocab_size:
        raise ValueError(
            f"expected ids below the model's vocab_size of {vocab_size}, got {number} for {content!r}; take "
            "both files from one model"
        )
    gaps = range(tokenizer.get_vocab_size(), number)
    tokenizer.add_tokens([AddedToken(f"<|reserved_token_{gap}|>", special=True) for gap in gaps])


def _id(name: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) < 10):
        raise ValueError(f"expected ids of tokens, got {name[:40]!r}; download it again")
    return int(name)


def _token(name: str, entry: Any) -> tuple[str, tuple[bool, ...]]:
    content = entry.get("content") if isinstance(entry, Mapping) else None
    if not isinstance(content, str) or not content:
        raise ValueError(f"expected the content of token {name}, got {str(entry)[:60]!r}; download it again")
    # Where a flag is left out, as AddedToken has it: special tokens alone are not normalised.
    given = {"normalized": not entry.get("special", False)} | entry
    flags = tuple(given.get(flag, False) for flag in FLAGS)
    if not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(f"expected true or false for {', '.join(FLAGS)} of token {name}, got {list(flags)}")
    return content, flags


def _flags(token: AddedToken) -> tuple[bool, ...]:
    return tuple(getattr(token, flag) for flag in FLAGS)
