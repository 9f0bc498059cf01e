"""A checkpoint's tokenizer, whichever files it comes in, as one `tokenizers.Tokenizer`.

`tokenizer.json` wins. Without it, a vocabulary (`tokenizer.model`, `tiktoken.model`, or `vocab.json` with
`merges.txt`) is completed by the settings beside it, as transformers 5 does: tokens are added, special ones
too, and the tokens that begin and end a text are put around it if `add_bos_token` and `add_eos_token` say so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from layerscope_jax.checkpoints.byte_level_files import CLASSES, RESERVED, read_merges, read_tiktoken
from layerscope_jax.checkpoints.sentencepiece_files import CONTROL, SentencePieceModel
from layerscope_jax.checkpoints.tokenizer_settings import FLAGS, TokenizerSettings
from layerscope_jax.support.files import is_there

VOCABULARIES = ("tokenizer.model", "tiktoken.model", "vocab.json", "merges.txt")
"""Files of tokenizers without a `tokenizer.json`."""

BY_MODEL = {"qwen2_moe": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer", "olmoe": "GPTNeoXTokenizer"}
"""The class of a tokenizer by the `model_type` of `config.json`, where `tokenizer_config.json` names none."""

REMEDY = (
    "prompts must be token ids, unless you add tokenizer.json (transformers: "
    "AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
)


def tokenizer_file(folder: Path) -> str | None:
    """Returns the name of the file that `read_tokenizer` begins with; None where there is none."""
    names = ("tokenizer.json", *VOCABULARIES)
    return next((name for name in names if is_there(folder / name)), None)


def read_tokenizer(folder: Path, vocab_size: int, model_type: str | None = None) -> Tokenizer | None:
    """The tokenizer of a folder; None where it has none that can be read.

    It encodes what it is given, all of it and nothing else: the length that a tokenizer was once told to cut
    or to fill texts to is saved with it, and is not meant for prompts.

    Args:
        folder: with a tokenizer's files, and maybe `tokenizer_config.json`, whose added tokens count too.
        vocab_size: of the model.
        model_type: of `config.json`.

    Warns:
        UserWarning: of a tokenizer whose kind is not known.

    Raises:
        ValueError: if a file is damaged, or files do not fit together.
    """
    if is_there(folder / "tokenizer.json"):
        tokenizer = _from_json(folder / "tokenizer.json")
        settings = TokenizerSettings.read(folder, older=False)
        _add(tokenizer, settings, settings.added.items(), vocab_size, "tokenizer.json")
        return tokenizer
    if is_there(folder / "tokenizer.model"):
        return _from_sentencepiece(folder / "tokenizer.model", vocab_size)
    if is_there(folder / "tiktoken.model"):
        return _from_tiktoken(folder / "tiktoken.model", vocab_size)
    if is_there(folder / "vocab.json") and is_there(folder / "merges.txt"):
        return _from_merges(folder, vocab_size, model_type)
    return None


def _from_json(file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except BaseException as error:  # tokenizers raises nothing narrower, and panics past Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise ValueError(f"{file}: expected a tokenizer, got {error}; download it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _from_sentencepiece(file: Path, vocab_size: int) -> Tokenizer:
    settings = TokenizerSettings.read(file.parent)
    try:
        model = SentencePieceModel.read(file.read_bytes())
        model = model.renamed({number: str(token.content) for number, token in settings.added.items()})
        tokenizer = model.tokenizer(prefix_each=settings.flag("legacy", True))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{file}: expected a model of SentencePiece, got {error}; download it again"
        ) from None
    added: Iterable[tuple[int, AddedToken]] = settings.added.items()
    if model.adds_prefix:  # names are looked for in the text as it is, before a space is put before its parts
        added = [(number, _with(token, normalized=False)) for number, token in added]
    _add(tokenizer, settings, added, vocab_size, file.name)
    control = [text for text, _, kind in model.pieces if kind == CONTROL]
    roles = {"bos_token": model.bos, "eos_token": model.eos, "unk_token": model.unk}
    _finish(tokenizer, settings, roles, control)
    return tokenizer


def _from_tiktoken(file: Path, vocab_size: int) -> Tokenizer | None:
    settings = TokenizerSettings.read(file.parent)
    if settings.tokenizer_class != "TikTokenTokenizer":
        _warn(file, f"the class {settings.tokenizer_class}, not TikTokenTokenizer, whose pattern is known")
        return None
    tokenizer = read_tiktoken(file)
    last = min(tokenizer.get_vocab_size() + RESERVED, vocab_size)
    _add(tokenizer, settings, settings.added.items(), vocab_size, file.name)
    _reserve(tokenizer, last)
    _finish(tokenizer, settings, {})
    return tokenizer


def _from_merges(folder: Path, vocab_size: int, model_type: str | None) -> Tokenizer | None:
    settings = TokenizerSettings.read(folder)
    name = settings.tokenizer_class or BY_MODEL.get(str(model_type))
    if name not in CLASSES:
        _warn(
            folder / "vocab.json", f"the class {name}, none of {', '.join(CLASSES)}, whose patterns are known"
        )
        return None
    kind = CLASSES[name]
    tokenizer = read_merges(folder, kind, settings.flag("add_prefix_space"))
    _add(tokenizer, settings, settings.added.items(), vocab_size, "vocab.json")
    _finish(tokenizer, settings, kind.roles)
    return tokenizer


def _warn(file: Path, what: str) -> None:
    warnings.warn(f"{file} cannot be read: tokenizer_config.json says {what}; {REMEDY}", stacklevel=5)


def _add(
    tokenizer: Tokenizer,
    settings: TokenizerSettings,
    tokens: Iterable[tuple[int, AddedToken]],
    vocab_size: int,
    vocabulary: str,
) -> None:
    """Adds tokens that the tokenizer lacks or has with other flags, under the ids that they are given.

    Raises:
        ValueError: naming a token that cannot have its id.
    """
    had = tokenizer.get_added_tokens_decoder()
    for number, token in tokens:
        content = str(token.content)
        if number in had and (had[number].content, _flags(had[number])) == (content, _flags(token)):
            continue
        if tokenizer.token_to_id(content) is None:
            if number >= vocab_size:
                raise ValueError(
                    f"{settings.source}: expected ids below the model's vocab_size of {vocab_size}, got "
                    f"{number} for {content!r}; take both files from one model"
                )
            _reserve(tokenizer, number)
        tokenizer.add_tokens([token])
        if (given := tokenizer.token_to_id(content)) != number:
            raise ValueError(
                f"{settings.source}: expected {content!r} to have the id {number}, got {given} from "
                f"{vocabulary}; take both files from one model"
            )


def _reserve(tokenizer: Tokenizer, number: int) -> None:
    """Takes the ids up to `number`, since the next one that is free is what a new token gets."""
    gaps = range(tokenizer.get_vocab_size(), number)
    tokenizer.add_tokens([AddedToken(f"<|reserved_token_{gap}|>", special=True) for gap in gaps])


def _finish(
    tokenizer: Tokenizer, settings: TokenizerSettings, roles: Any, control: Iterable[str] = ()
) -> None:
    """Adds special tokens that are no tokens yet, and puts those around a text that belong there.

    Args:
        tokenizer: with all tokens that have ids of their own.
        settings: of the checkpoint.
        roles: texts of special tokens that the settings do not name.
        control: texts of further special tokens.
    """
    texts = {role: settings.text(role) or text for role, text in roles.items()}
    texts["bos_token"] = texts.get("bos_token") or settings.text("bos_token")
    texts["eos_token"] = texts.get("eos_token") or settings.text("eos_token")
    plain = [AddedToken(text, special=True, normalized=False) for text in (*texts.values(), *control) if text]
    for token in (*settings.special_tokens(), *plain):
        had = {added.content for added in tokenizer.get_added_tokens_decoder().values()}
        if token.content not in had:
            tokenizer.add_tokens([token])
    begin = [texts["bos_token"]] if settings.flag("add_bos_token") and texts["bos_token"] else []
    end = [texts["eos_token"]] if settings.flag("add_eos_token") and texts["eos_token"] else []
    if begin or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            special_tokens=[(text, tokenizer.token_to_id(text)) for text in {*begin, *end}],
        )


def _with(token: AddedToken, **flags: bool) -> AddedToken:
    return AddedToken(token.content, **dict(zip(FLAGS, _flags(token), strict=True)) | flags)


def _flags(token: AddedToken) -> tuple[bool, ...]:
    return tuple(getattr(token, flag) for flag in FLAGS)
