"""Records traces: runs a model over real text and stores each router's inputs and choices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from layerscope_jax.checkpoints.identity import ModelIdentity, weights_digest
from layerscope_jax.checkpoints.model import Model
from layerscope_jax.config import OffloadConfig
from layerscope_jax.engine import Engine
from layerscope_jax.generation.progress import Advance, bar, counted_by
from layerscope_jax.generation.scheduler import batch_rows
from layerscope_jax.models.cache import new_caches
from layerscope_jax.models.rotary import PAD_POSITION
from layerscope_jax.prediction.trace_index import Passage, Split, TraceHeader
from layerscope_jax.prediction.traces import Trace, TraceWriter
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.runtime.layerwise import LayerByLayer
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.locks import locked_folder
from predictor.documents import (
    MIN_HELDOUT,
    Document,
    cut_blocks,
    heldout_ids,
    numbered,
    read_documents,
    stable_hash,
)
from predictor.pca import Basis, Moments, reduce
from predictor.routers import Routers

CHUNK_PASSAGES = 64
PIECE_CHARS = 2000  # at least, of a text that is cut for want of documents
SHORTEST = 16  # tokens; shorter ends of documents are left out


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """Settings of a recording.

    Attributes:
        text: files: JSON lines of {"id", "text"} (`.jsonl`), whose domain is the file's name, or plain texts,
            each a document of the domain named as its folder.
        out: folder for the trace; an interrupted trace is continued.
        heldout_domains: domains of which no document is used for training predictors. Of the others, about
            one document in twenty is held out, by a hash of its id: those that the shipped model was not
            trained on.
        train_tokens, heldout_tokens: maximum number of tokens of each domain.
        length: maximum number of tokens of a passage; clipped to the model's context.
        prompt: share of a passage that is its prompt, read in prefill; its other tokens are decode steps.
        hidden: P, components that hidden states are reduced to, clipped to the model's width; 0 for none.
        pca_tokens: number of tokens of training documents that the PCA is fitted to.
        batch_size: number of passages that run at once.
        offload: settings of the engine; by default as many experts are on the device as fit there.
        seed: seed of the order of the passages.
    """

    text: tuple[Path, ...]
    out: Path
    heldout_domains: tuple[str, ...] = ()
    train_tokens: int = 100_000
    heldout_tokens: int = 10_000
    length: int = 256
    prompt: float = 0.5
    hidden: int = 512
    pca_tokens: int = 32_768
    batch_size: int = 16
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        problems = Problems()
        problems.at_least(self, train_tokens=0, heldout_tokens=0, length=SHORTEST, hidden=0)
        problems.at_least(self, pca_tokens=2, batch_size=1)
        problems.expect(0 < self.prompt <= 1, "prompt", "in (0, 1]", self.prompt)
        if not self.text:
            problems.add("text must name at least one file, got none")
        problems.raise_any()


def record(model: Model, config: RecordConfig) -> Trace:
    """Runs the model over the text and returns the finished trace.

    Each passage is one forward pass. Apart from rounding, a causal model's state at a position does not
    depend on the tokens after it: rows past the prompt equal decode steps fed with the document's own tokens.

    Raises:
        ValueError: for text that cannot be read, or a folder that holds another trace or is in use by another
            run.
    """
    domains = read_domains(config.text)
    passages = passages_of(model, config, domains)
    length = min(config.length, model.config.max_position_embeddings)
    header = TraceHeader(
        model=ModelIdentity.of(model),
        hidden=min(config.hidden, model.config.hidden_size),
        settings={
            "text": digest(domains),
            "weights": weights_digest(model),
            "dtype": str(np.dtype(model.bank.dtype)),
            "heldout_domains": list(config.heldout_domains),
            "train_tokens": config.train_tokens,
            "heldout_tokens": config.heldout_tokens,
            "length": length,
            "prompt": config.prompt,
            "pca_tokens": config.pca_tokens if config.hidden else 0,
            "seed": config.seed,
        },
    )
    with locked_folder(config.out):
        writer = TraceWriter(config.out, header)
        Routers.of(model).save(config.out)
        if writer.done != [passage for passage, _ in passages[: len(writer.done)]]:
            raise ValueError(f"{config.out} holds a trace of other passages; choose another folder")
        if not writer.complete:
            with Engine(model, _layer_by_layer(config)) as engine:
                _record(Tap(engine), passages, config, writer)
            writer.finish()
    return Trace.open(config.out)


def passages_of(
    model: Model, config: RecordConfig, domains: dict[str, list[Document]] | None = None
) -> list[tuple[Passage, list[int]]]:
    """Returns the passages that would be recorded, with their tokens.

    Args:
        model: the model, for its tokenizer and context.
        config: settings of the recording.
        domains: the text, if it has been read.

    Raises:
        ValueError: for text that cannot be read, or a model without a tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("recording from text needs a tokenizer; add the tokenizer files of the checkpoint")
    domains = read_domains(config.text) if domains is None else domains
    missing = set(config.heldout_domains) - domains.keys()
    if missing:
        raise ValueError(
            f"heldout-domains must be some of {', '.join(sorted(domains))}, got {', '.join(sorted(missing))}"
        )
    return choose(domains, model.tokenizer, min(config.length, model.config.max_position_embeddings), config)


def read_domains(files: Iterable[Path]) -> dict[str, list[Document]]:
    """Returns documents by domain; see `RecordConfig.text`.

    Raises:
        ValueError: for a file that cannot be read.
    """
    domains: dict[str, list[Document]] = {}
    for path in files:
        try:
            if path.suffix == ".jsonl":
                domains.setdefault(path.stem, []).extend(read_documents(path))
            else:
                text = path.read_text(encoding="utf-8")
                domains.setdefault(path.absolute().parent.name, []).append(Document(id=str(path), text=text))
        except OSError as error:
            raise ValueError(f"text: {path}: expected a file of text, got {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"text: {path}: expected UTF-8 text, got {error.reason} at {error.start}"
            ) from None
        except ValueError as error:  # it names the file and the line
            raise ValueError(f"text: {error}") from None
    return domains


def digest(domains: dict[str, list[Document]]) -> str:
    """Returns a digest of all text, so that no trace is continued with another text."""
    digested = hashlib.blake2b(digest_size=8)
    for domain in sorted(domains):
        for document in domains[domain]:
            digested.update(f"{domain}\0{document.id}\0{document.text}\0".encode())
    return digested.hexdigest()


def choose(
    domains: dict[str, list[Document]], tokenizer: Tokenizer, length: int, config: RecordConfig
) -> list[tuple[Passage, list[int]]]:
    """Returns the passages to record with their tokens, shuffled so that any part is a representative sample.

    Complete documents are taken in the order of a hash of their ids, up to the number of tokens.
    """
    chosen: list[tuple[Passage, list[int]]] = []
    for domain, whole in domains.items():
        documents = whole if domain in config.heldout_domains else divided(whole)
        ids = [document.id for document in documents]
        if domain in config.heldout_domains:
            heldout = set(ids)
        else:
            try:
                heldout = heldout_ids(ids)
            except ValueError as error:
                raise ValueError(
                    f"domain {domain}: {error} (each line of a .jsonl file is one; a plain text is cut at "
                    f"blank lines into some of {PIECE_CHARS:,} characters), or hold the domain out as a whole"
                ) from None
        room = {"train": config.train_tokens, "heldout": config.heldout_tokens}
        # Not the hash that splits, by which the held-out documents come first.
        for document in sorted(documents, key=lambda document: stable_hash(f"{config.seed}/{document.id}")):
            split: Split = "heldout" if document.id in heldout else "train"
            if room[split] < SHORTEST:
                continue
            tokens = tokenizer.encode(document.text).ids[: room[split]]
            for start in range(0, len(tokens), length):
                piece = tokens[start : start + length]
                if len(piece) >= SHORTEST:
                    prompt = max(1, round(config.prompt * len(piece)))
                    chosen.append((Passage(domain, document.id, split, start, prompt, len(piece)), piece))
                    room[split] -= len(piece)
    order = np.random.default_rng(config.seed).permutation(len(chosen))
    return [chosen[index] for index in order]


def divided(documents: Sequence[Document]) -> Sequence[Document]:
    """Returns documents, those of a domain that has too few to hold any out cut at blank lines.

    >>> book = Document(id="book", text=(chr(10) * 2).join(["a line of a book " * 150] * 4))
    >>> [piece.id for piece in divided([book])]
    ['book/000', 'book/001', 'book/002', 'book/003']
    """
    if len(documents) > MIN_HELDOUT:
        return documents
    return [
        piece
        for document in documents
        for piece in numbered(document.id, cut_blocks(document.text, chars=PIECE_CHARS))
    ]


class Tap:
    """Runs passages through an engine and collects the inputs and choices of every router."""

    def __init__(self, engine: Engine):
        self.engine, self.runner = engine, cast(LayerByLayer, engine.runner)  # exact engines run so

    def run(self, passages: Sequence[list[int]]) -> tuple[jax.Array, np.ndarray, np.ndarray]:
        """Returns hidden states [N, L, D], experts [N, L, K] and weights [N, L, K] of all tokens."""
        model, rows, width = self.engine.model, batch_rows(len(passages)), max(map(len, passages))
        tokens = np.zeros((rows, width), np.int32)
        positions = np.full((rows, width), PAD_POSITION, np.int32)
        for row, passage in enumerate(passages):
            tokens[row, : len(passage)] = passage
            positions[row, : len(passage)] = np.arange(len(passage))
        real = np.flatnonzero(positions.reshape(-1) != PAD_POSITION)
        seen: list[tuple[jax.Array, jax.Array, jax.Array]] = []
        self.runner.tap = lambda layer, *arrays: seen.append(arrays)
        try:
            caches = new_caches(model.config, rows, width, model.bank.dtype, self.engine.device)
            self.runner.step(tokens, positions, np.zeros(rows, np.int32), caches, None)
        finally:
            self.runner.tap = None
        hidden, experts, weights = zip(*seen, strict=True)

        def together(parts: Sequence) -> np.ndarray:
            return np.stack([np.asarray(part)[real] for part in parts], 1)

        return jnp.stack([x[real] for x in hidden], 1), together(experts), together(weights)


def _record(
    tap: Tap, passages: list[tuple[Passage, list[int]]], config: RecordConfig, writer: TraceWriter
) -> None:
    left, done = passages[len(writer.done) :], len(writer.done)
    account = Account()
    tap.runner.reset(account)  # no call counts the steps
    total = sum(len(tokens) for _, tokens in left)
    with bar(f"{done} of {len(passages)} passages", total, lambda: counted_by(account)) as advance:
        basis = _basis(tap, passages, config, writer, advance) if writer.header.hidden else None
        for chunk in batches(left, CHUNK_PASSAGES):
            parts: dict[str, list[np.ndarray]] = {name: [] for name in ("experts", "weights", "hidden")}
            for batch in batches(chunk, config.batch_size):
                hidden, experts, weights = tap.run([tokens for _, tokens in batch])
                parts["experts"].append(experts)
                parts["weights"].append(weights)
                if basis is not None:
                    reduced = reduce(hidden, jnp.asarray(basis.mean), jnp.asarray(basis.components))
                    parts["hidden"].append(np.asarray(reduced).astype(np.float16))
                done, tokens = done + len(batch), sum(len(tokens) for _, tokens in batch)
                advance(tokens, tokens, f"{done} of {len(passages)} passages")
            arrays = {name: np.concatenate(pieces) for name, pieces in parts.items() if pieces}
            arrays["tokens"] = np.concatenate([np.asarray(tokens, np.int32) for _, tokens in chunk])
            writer.write([passage for passage, _ in chunk], arrays)


def _basis(
    tap: Tap,
    passages: list[tuple[Passage, list[int]]],
    config: RecordConfig,
    writer: TraceWriter,
    advance: Advance,
) -> Basis:
    """Returns the trace's PCA, fitted to its first training passages, or read if the trace is continued."""
    if writer.done:
        return Basis.load(writer.folder)
    moments: Moments | None = None
    training = [tokens for passage, tokens in passages if passage.split == "train"]
    for batch in batches(training, config.batch_size):
        hidden = tap.run(batch)[0]
        advance(0, sum(map(len, batch)), "fitting the PCA")
        moments = (moments or Moments.start(hidden)).add(hidden)
        if moments.rows >= config.pca_tokens:
            break
    if moments is None:
        raise ValueError(
            "expected training documents to fit the PCA on, got none; hold fewer domains out, raise "
            "train-tokens, or record without hidden states"
        )
    basis = moments.basis(writer.header.hidden)
    basis.save(writer.folder)
    return basis


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _layer_by_layer(config: RecordConfig) -> OffloadConfig:
    """Returns the settings with steps that run layer by layer, because recording taps every layer.

    Device memory is left free for the caches that recording makes.
    """
    size, length = config.batch_size, config.length
    return replace(config.offload, numerics="exact", max_num_seqs=size, context=length)
