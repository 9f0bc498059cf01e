"""What a checkpoint says of its tokenizer beside the vocabulary: special tokens, added ones, templates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from layerscope_jax.support.files import is_there, read_json

SETTINGS = CONFIG, SPECIAL, ADDED_FILE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
ADDED = "added_tokens_decoder"
EXTRAS = ("additional_special_tokens", "extra_special_tokens")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings of a checkpoint's tokenizer, from `tokenizer_config.json` and the older files beside it.

    Attributes:
        record: what `tokenizer_config.json` says; without "added_tokens_decoder" also, and rather, what
            `special_tokens_map.json` says.
        added: tokens to add, by id.
        source: the file that names them, and where in it.

    >>> settings = TokenizerSettings({"bos_token": {"content": "<s>"}, "add_bos_token": True}, {}, CONFIG)
    >>> settings.text("bos_token"), settings.text("eos_token"), settings.flag("add_bos_token")
    ('<s>', None, True)
    """

    record: Mapping[str, Any]
    added: Mapping[int, AddedToken]
    source: str

    @classmethod
    def read(cls, folder: Path, older: bool = True) -> TokenizerSettings:
        """Reads the files of a folder; without any, everything has its default.

        Args:
            folder: the checkpoint's.
            older: whether the older files count, as they do for a tokenizer without a `tokenizer.json`.

        Raises:
            ValueError: if a file is damaged.
        """
        files = {name: folder / name for name in (CONFIG, SPECIAL, ADDED_FILE)}
        record = read_json(files[CONFIG]) if is_there(files[CONFIG]) else {}
        if record.get(ADDED) is not None:
            source = f"{files[CONFIG]}: {ADDED}"
            return cls(record, _named(source, _added, record[ADDED]), source)
        if older and is_there(files[SPECIAL]):
            record = record | read_json(files[SPECIAL])
        settings = cls(record, {}, str(files[ADDED_FILE]))
        if not older or not is_there(files[ADDED_FILE]):
            return settings
        special = {str(token.content) for token in settings.special_tokens()}
        ids = read_json(files[ADDED_FILE])
        return cls(record, _named(settings.source, _older, ids, special), settings.source)

    def text(self, role: str) -> str | None:
        """The text of a special token by its role, such as "bos_token"; None where there is none."""
        token = self._special(self.record.get(role))
        return None if token is None else str(token.content)

    def flag(self, name: str, default: bool = False) -> bool:
        """A setting that is true or false; `default` where it is missing or null."""
        value = self.record.get(name)
        return default if not isinstance(value, bool) else value

    @property
    def tokenizer_class(self) -> str | None:
        """The class of transformers that reads this tokenizer, without "Fast" behind its name."""
        name = self.record.get("tokenizer_class")
        return name.removesuffix("Fast") if isinstance(name, str) else None

    def special_tokens(self) -> Iterator[AddedToken]:
        """The special tokens of all roles, then those without one."""
        values = [self.record.get(role) for role in ROLES]
        for name in EXTRAS:
            extra = self.record.get(name)
            values += (
                extra.values() if isinstance(extra, Mapping) else extra if isinstance(extra, list) else ()
            )
        yield from (token for value in values if (token := self._special(value)) is not None)

    @staticmethod
    def _special(value: Any) -> AddedToken | None:
        """A special token, given by its text or as an object."""
        entry = value if isinstance(value, Mapping) else {"content": value, "normalized": False}
        content = entry.get("content")
        if not isinstance(content, str) or not content:
            return None
        flags = {flag: entry[flag] for flag in FLAGS if isinstance(entry.get(flag), bool)}
        return AddedToken(content, **flags | {"special": True})


def _named(source: str, call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _added(given: Any) -> dict[int, AddedToken]:
    """Tokens of an "added_tokens_decoder": ids, each with a token's text and flags."""
    if not isinstance(given, Mapping):
        raise ValueError(f"expected an object, got {type(given).__name__}; download it again")
    return dict(sorted((_id(name), _token(name, entry)) for name, entry in given.items()))


def _id(name: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) < 10):
        raise ValueError(f"expected ids of tokens, got {name[:40]!r}; download it again")
    return int(name)


def _token(name: str, entry: Any) -> AddedToken:
    content = entry.get("content") if isinstance(entry, Mapping) else None
    if not isinstance(content, str) or not content:
        raise ValueError(f"expected the content of token {name}, got {str(entry)[:60]!r}; download it again")
    # Where a flag is left out, as AddedToken has it: special tokens alone are not normalised.
    given = {"normalized": not entry.get("special", False)} | entry
    flags = {flag: given.get(flag, False) for flag in FLAGS}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(
            f"expected true or false for {', '.join(FLAGS)} of token {name}, got {list(flags.values())}"
        )
    return AddedToken(content, **flags)


def _older(given: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """Tokens of an `added_tokens.json`: texts, each with its id."""
    for text, number in given.items():
        if type(number) is not int or not 0 <= number < 10**9 or not text:
            raise ValueError(
                f"expected ids of tokens, got {str(number)[:40]!r} for {text!r}; download it again"
            )
    by_id = sorted((number, text) for text, number in given.items())
    return {
        number: AddedToken(text, special=text in special, normalized=text not in special)
        for number, text in by_id
    }
