"""The tokenizer and the packed arrays: nothing is lost, nothing leaks between splits. No network."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from predictor.documents import Document, write_documents
from tools.shipped_model import tokenizer as module
from tools.shipped_model.corpus import HELDOUT_DOMAINS, TRAIN_DOMAINS

TEXTS = (
    "def add(a, b):\n    return a + b  # 1234 + 5\n\n\n\tif x:\r\n",
    "naïve café — “quotes” … 日本語 🙂\u2028 \x00 end",
    "  leading and trailing  ",
    "",
    "a literal <|endoftext|> and <|pad|> in a document",
)


@pytest.fixture(scope="module")
def small():
    """A tokenizer of 300 entries, taught on a few lines."""
    tokenizer = module.train_tokenizer(["the cat sat on the mat, the end. 12 "] * 20, vocabulary=300)
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture
def corpus(tmp_path):
    """A corpus of six documents a domain."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for domain in (*TRAIN_DOMAINS, *HELDOUT_DOMAINS):
        texts = [f"{domain} number {i}: the cat sat on the mat. " * 3 for i in range(6)]
        write_documents(
            folder / f"{domain}.jsonl", [Document(id=f"{domain}/{i}", text=t) for i, t in enumerate(texts)]
        )
    return folder


def arrays(out, split, domain):
    folder = out / split
    names = json.loads((folder / f"{domain}.ids.json").read_text())
    return np.load(folder / f"{domain}.npy"), np.load(folder / f"{domain}.offsets.npy"), names


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestTokenizer:
    def test_special_ids(self, small):
        assert small.token_to_id("<|endoftext|>") == 0
        assert small.token_to_id("<|pad|>") == 1

    @pytest.mark.parametrize("text", TEXTS)
    def test_round_trip(self, small, text):
        assert small.decode(small.encode(text).ids, skip_special_tokens=False) == text

    @given(st.text())
    def test_round_trip_of_any_text(self, small, text):
        assert small.decode(small.encode(text).ids, skip_special_tokens=False) == text

    def test_digits_stand_alone(self, small):
        assert len(small.encode("1212").ids) == 4

    def test_training_is_deterministic(self):
        first, second = (module.train_tokenizer(TEXTS * 5, vocabulary=300).to_str() for _ in range(2))
        assert first == second

    def test_sample_is_bounded_and_the_same_in_any_order(self):
        documents = [Document(id=str(i), text="é" * 50) for i in range(20)]
        texts = module.sample(documents, max_bytes=450)
        assert len(texts) == 4
        assert texts == module.sample(documents[::-1], max_bytes=450)

    def test_saved_files(self, small, tmp_path):
        module.save_tokenizer(small, tmp_path)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
            None,
            "<|endoftext|>",
            "<|pad|>",
        )
        again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert again.encode(TEXTS[0]).ids == small.encode(TEXTS[0]).ids


class TestPacking:
    def test_texts_come_back(self, small):
        ids, offsets = module.pack(small, TEXTS)
        assert (ids.dtype, offsets.dtype) == (np.uint16, np.int64)
        assert (offsets[0], offsets[-1]) == (0, len(ids))
        assert np.flatnonzero(ids == 0).tolist() == (offsets[1:] - 1).tolist()
        for text, start, end in zip(TEXTS, offsets, offsets[1:], strict=False):
            assert small.decode(ids[start : end - 1].tolist(), skip_special_tokens=False) == text

    def test_build_packs_each_document_into_one_split(self, corpus, tmp_path):
        out = tmp_path / "tokens"
        table = module.build(corpus, out)
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
        for domain in TRAIN_DOMAINS:
            seen = []
            for split in ("train", "heldout"):
                ids, offsets, names = arrays(out, split, domain)
                assert len(offsets) == len(names) + 1
                seen += names
                for name, start, end in zip(names, offsets, offsets[1:], strict=False):
                    number = name.split("/")[1]
                    text = tokenizer.decode(ids[start : end - 1].tolist())
                    assert text.startswith(f"{domain} number {number}:")
            assert sorted(seen) == [f"{domain}/{i}" for i in range(6)]
            assert len(arrays(out, "heldout", domain)[2]) >= 2
        assert (out / "READY").read_text() == table

    def test_evaluation_domain_is_never_trained_on(self, corpus, tmp_path):
        module.build(corpus, tmp_path / "tokens")
        for domain in HELDOUT_DOMAINS:
            assert not (tmp_path / f"tokens/train/{domain}.npy").exists()
            assert len(arrays(tmp_path / "tokens", "heldout", domain)[2]) == 6

    def test_interrupted_run_goes_on(self, corpus, tmp_path, monkeypatch):
        out = tmp_path / "tokens"
        module.build(corpus, out)
        whole = contents(out)
        (out / "READY").unlink()
        (out / "train/verse.npy").unlink()
        packed = []
        write = module.write_packed

        def counted(folder, domain, *rest):
            packed.append((folder, domain))
            write(folder, domain, *rest)

        monkeypatch.setattr(module, "write_packed", counted)
        monkeypatch.setattr(module, "train_tokenizer", lambda texts: pytest.fail("trained again"))
        module.build(corpus, out)
        assert packed == [(out / "train", "verse")]
        assert contents(out) == whole

    def test_new_tokenizer_packs_everything_again(self, corpus, tmp_path):
        out = tmp_path / "tokens"
        module.build(corpus, out)
        whole = contents(out)
        (out / "tokenizer.json").unlink()
        np.save(out / "train/verse.npy", np.zeros(3, np.uint16))
        module.build(corpus, out)
        assert contents(out) == whole


class TestErrors:
    def run(self, corpus, out, capsys):
        with pytest.raises(SystemExit) as stop:
            module.main(["--corpus", str(corpus), "--out", str(out)])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    def test_missing_corpus(self, tmp_path, capsys):
        message = self.run(tmp_path / "nowhere", tmp_path / "tokens", capsys)
        assert "novels.jsonl, got no such file" in message
        assert "tools.shipped_model.corpus --out" in message

    def test_unwritable_folder(self, corpus, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert str(tmp_path / "file") in self.run(corpus, tmp_path / "file/tokens", capsys)
