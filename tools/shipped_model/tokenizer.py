"""Train a byte-level BPE tokenizer on a corpus, and pack the corpus into arrays of token ids.

`python -m tools.shipped_model.tokenizer --corpus build/corpus --out build/tokens`

For each domain and split (`train`, `heldout`) it writes `SPLIT/DOMAIN.npy` (uint16, every document followed
by `<|endoftext|>`), `DOMAIN.offsets.npy` (int64, where each document starts, with the end appended) and
`DOMAIN.ids.json`; a table of sizes, `READY`, comes last. A run that was cut off goes on where it stopped;
delete `--out` after fetching a changed corpus.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from layerscope_jax.support.entry import run

    run("tools.shipped_model.tokenizer")

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from layerscope_jax.support import exits
from layerscope_jax.support.files import replace_files, write_file
from layerscope_jax.support.locks import locked_folder
from predictor.documents import Document, heldout_ids, read_documents, stable_hash
from tools.shipped_model.corpus import HELDOUT_DOMAINS, TRAIN_DOMAINS

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
VOCABULARY = 4096
SAMPLE_BYTES = 6_000_000
BATCH = 32  # documents between two steps of the progress bar

Splits = dict[str, dict[str, list[Document]]]


def read_splits(corpus: Path) -> Splits:
    """Read every domain under `corpus` and split it by document: `{split: {domain: documents}}`.

    Raises:
        ValueError: a domain's file is missing or does not read.
    """
    splits: Splits = {"train": {}, "heldout": {}}
    for domain in (*TRAIN_DOMAINS, *HELDOUT_DOMAINS):
        path = corpus / f"{domain}.jsonl"
        if not path.exists():
            raise ValueError(
                f"expected {path}, got no such file; "
                f"run `python -m tools.shipped_model.corpus --out {corpus}` first"
            )
        documents = read_documents(path)
        if domain in HELDOUT_DOMAINS:
            splits["heldout"][domain] = documents
            continue
        heldout = heldout_ids([document.id for document in documents])
        splits["train"][domain] = [d for d in documents if d.id not in heldout]
        splits["heldout"][domain] = [d for d in documents if d.id in heldout]
    return splits


def sample(documents: Iterable[Document], *, max_bytes: int = SAMPLE_BYTES) -> list[str]:
    """Return the same texts every time, at most `max_bytes` together: no domain is to drown another."""
    texts, size = [], 0
    for document in sorted(documents, key=lambda document: stable_hash(document.id)):
        size += len(document.text.encode())
        if size > max_bytes:
            break
        texts.append(document.text)
    return texts


def train_tokenizer(texts: Iterable[str], *, vocabulary: int = VOCABULARY) -> Tokenizer:
    """Train a byte-level BPE of `vocabulary` entries: any text encodes, and decodes to itself.

    Digits stand alone, so that numbers of any length are spelt the same way.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write `tokenizer_config.json` and `tokenizer.json` as Hugging Face's loaders read them."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": PADDING,
        "clean_up_tokenization_spaces": False,
    }
    write_file(out / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_file(out / "tokenizer.json", tokenizer.to_str(pretty=False))


def pack(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode `texts` one after another, each followed by `<|endoftext|>`.

    Returns:
        The ids (uint16) and the start of each text with the end appended (int64): text `i` lies in
        `ids[offsets[i] : offsets[i + 1] - 1]`.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = [[*encoding.ids, end] for encoding in tokenizer.encode_batch_fast(list(texts))]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return np.array([token for ids in encoded for token in ids], np.uint16), offsets


def write_packed(
    folder: Path, domain: str, documents: Sequence[Document], ids: np.ndarray, offsets: np.ndarray
) -> None:
    """Write the three files of one domain, the ids last: where they stand, the other two do."""
    (folder / f"{domain}.npy").unlink(missing_ok=True)

    names = json.dumps([document.id for document in documents])
    replace_files(
        folder,
        {f"{domain}.ids.json": names, f"{domain}.offsets.npy": offsets, f"{domain}.npy": ids},
    )


def is_packed(folder: Path, domain: str, documents: Sequence[Document]) -> bool:
    """Tell whether `write_packed` finished with just these documents before."""
    if not (folder / f"{domain}.npy").exists():
        return False
    names = json.loads((folder / f"{domain}.ids.json").read_text(encoding="utf-8"))
    return names == [document.id for document in documents]


def build(corpus: Path, out: Path) -> str:
    """Train the tokenizer and pack every domain; returns the table of sizes that `READY` holds.

    Raises:
        ValueError: `corpus` is not complete.
        OSError: `out` cannot be written to.
    """
    splits = read_splits(corpus)
    out.mkdir(parents=True, exist_ok=True)
    (out / "READY").unlink(missing_ok=True)
    path = out / "tokenizer.json"
    if not path.exists():
        for stale in out.glob("*/*.npy"):  # they hold another tokenizer's ids
            stale.unlink()
        print(f"training a tokenizer of {VOCABULARY} entries")
        texts = [text for documents in splits["train"].values() for text in sample(documents)]
        save_tokenizer(train_tokenizer(texts), out)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True  # in a document, "<|endoftext|>" is text like any other
    with Progress() as progress:
        for split, domains in splits.items():
            for domain, documents in domains.items():
                if is_packed(out / split, domain, documents):
                    continue
                task = progress.add_task(f"{split} {domain}", total=len(documents))
                packed = []
                for start in range(0, len(documents), BATCH):
                    texts = [document.text for document in documents[start : start + BATCH]]
                    packed.append(pack(tokenizer, texts))
                    progress.advance(task, len(texts))
                ids = np.concatenate([ids for ids, _ in packed])
                lengths = np.concatenate([np.diff(offsets) for _, offsets in packed])
                write_packed(
                    out / split, domain, documents, ids, np.cumsum(np.r_[0, lengths], dtype=np.int64)
                )
    table = size_table(out, splits)
    write_file(out / "READY", table)
    return table


def size_table(out: Path, splits: Splits) -> str:
    """Return a table of tokens per domain and split, and how many bytes of text a token stands for."""
    rows = [
        f"{'domain':<14}{'train tokens':>14}{'docs':>6}{'heldout tokens':>16}{'docs':>6}{'bytes/token':>13}"
    ]
    for domain in splits["heldout"]:
        counts, texts = {}, []
        for split in ("train", "heldout"):
            documents = splits[split].get(domain, [])
            counts[split] = len(np.load(out / split / f"{domain}.npy", mmap_mode="r")) if documents else 0
            texts += documents
        size = sum(len(document.text.encode()) for document in texts)
        # the ends of text stand for no bytes
        tokens = sum(counts.values()) - len(texts)
        train, heldout = (len(splits[split].get(domain, [])) for split in ("train", "heldout"))
        rows.append(
            f"{domain:<14}{counts['train']:>14,}{train:>6}{counts['heldout']:>16,}{heldout:>6}"
            f"{size / tokens:>13.2f}"
        )
    return "\n".join(rows) + "\n"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a tokenizer on a corpus and pack the corpus into arrays of token ids."""

    corpus: Path
    """Folder that tools.shipped_model.corpus wrote."""
    out: Path
    """Folder for tokenizer.json and the arrays."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 and a message if the corpus is missing or `--out` unwritable."""

    def run(args: list[str]) -> None:
        options = tyro.cli(Options, args=args)
        with locked_folder(options.out):
            print(build(options.corpus, options.out))

    exits.end(run, args)
