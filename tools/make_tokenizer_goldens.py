"""Write small tokenizers of every kind that checkpoints come with, and how transformers encodes odd texts.

    python tools/make_tokenizer_goldens.py

Needs transformers, sentencepiece, tiktoken and protobuf; the tests only read what it wrote, so they need none
of them. The texts come from tests/odd_texts.py, and are not stored.
"""

import base64
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
try:
    import sentencepiece
    import tiktoken
    import transformers
    from odd_texts import PROSE, odd_texts
    from tiktoken.load import load_tiktoken_bpe
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    from layerscope_jax.checkpoints.byte_level_files import KIMI
    from layerscope_jax.checkpoints.tokenizer_files import read_tokenizer
except ImportError as error:
    sys.exit(
        f"make_tokenizer_goldens.py needs transformers, sentencepiece, tiktoken and protobuf ({error}).\n"
        "The goldens are committed: only making them anew needs these packages, e.g. in an environment of "
        "their own."
    )

FOLDER = ROOT / "tests" / "golden" / "tokenizers"
COUNT, SEED = 1000, 11
CORPUS = odd_texts(3000, SEED + 1) + [PROSE, *PROSE.split(". ")] * 20
RULES = [
    ("\u00a0", " "),
    ("\u3000", " "),
    ("\u200b", ""),
    ("\ufb01", "fi"),
    ("\uff21", "A"),
    ("\u00bd", "1/2"),
]
"""Replacements of characters: the compiled map of all of NFKC would take 240 KB."""


def added(special=True, **flags):
    return {
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": special,
    } | flags


def common(line):
    """The common characters of a line: others would leave no room for pieces of several."""
    return "".join(letter for letter in line if 32 <= ord(letter) < 127 or letter in "éüΩабвあ中한")


def nfkc(folder):
    """Unigram with NFKC, whose map is too large to be stored."""
    train_sentencepiece(folder, model_type="unigram", normalization_rule_name="nmt_nfkc")
    write(folder, "mixtral", tokenizer_class="LlamaTokenizer")


def train_sentencepiece(folder, **options):
    """Writes `tokenizer.model`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(filter(None, map(common, CORPUS))),
        model_writer=model,
        vocab_size=700,
        character_coverage=1.0,
        byte_fallback=True,
        num_threads=1,
        max_sentence_length=100_000,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def mixtral(folder):
    """BPE as Llama and Mixtral have it: text as it is, a space before each part of it."""
    train_sentencepiece(
        folder, model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False
    )
    tokens = {0: "<unk>", 1: "<s>", 2: "</s>"}
    write(
        folder,
        "mixtral",
        tokenizer_class="LlamaTokenizer",
        add_bos_token=True,
        add_eos_token=False,
        legacy=True,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=None,
        added_tokens_decoder={str(number): {"content": text} | added() for number, text in tokens.items()},
    )


def llama(folder):
    """The same model, with a space before the text alone, tokens of its own, and an end."""
    (folder / "tokenizer.model").write_bytes((FOLDER / "mixtral" / "tokenizer.model").read_bytes())
    size = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).vocab_size()
    write(
        folder,
        "llama",
        tokenizer_class="LlamaTokenizer",
        legacy=False,
        add_bos_token=False,
        add_eos_token=True,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        added_tokens_decoder={
            "0": {"content": "<unk>"} | added(),
            "1": {"content": "<s>"} | added(),
            "2": {"content": "</s>"} | added(),
            str(size): {"content": "<|user|>"} | added(rstrip=True),
            str(size + 1): {"content": "<think>"} | added(special=False),
        },
    )


def unigram(folder):
    """Unigram with replaced characters, joined spaces, pieces that the user defined, and older files."""
    rules = folder / "rules.tsv"
    rules.write_text(
        "".join(
            f"{' '.join(f'{ord(c):X}' for c in old)}\t{' '.join(f'{ord(c):X}' for c in new)}\n"
            for old, new in RULES
        )
    )
    train_sentencepiece(
        folder,
        model_type="unigram",
        normalization_rule_tsv=str(rules),
        remove_extra_whitespaces=True,
        user_defined_symbols=["<sep>", "ISH"],
        control_symbols=["<ctrl>"],
    )
    rules.unlink()
    size = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).vocab_size()
    write(folder, "mixtral", tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=True)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size, "<tool>": size + 1}))
    special = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"} | added(), "pad_token": "</s>"}
    del special["eos_token"]["special"]
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def qwen2(folder):
    """Byte-level BPE as Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.model.save(str(folder))
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    size = tokenizer.get_vocab_size()
    write(
        folder,
        "qwen3_moe",
        tokenizer_class="Qwen2Tokenizer",
        add_bos_token=False,
        add_prefix_space=False,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        added_tokens_decoder={
            str(size + at): {"content": text} | added(special=text != "<think>")
            for at, text in enumerate(tokens)
        },
    )


def gpt2(folder):
    """The same vocabulary, parted as GPT-2 does, with a beginning, and no tokens but the one of its class."""
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((FOLDER / "qwen2" / name).read_bytes())
    write(folder, "gpt2", tokenizer_class="GPT2Tokenizer", add_bos_token=True)


def neox(folder):
    """The same vocabulary, parted as GPT-NeoX does."""
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((FOLDER / "qwen2" / name).read_bytes())
    write(folder, "olmoe", tokenizer_class="GPTNeoXTokenizer", add_prefix_space=True)


def kimi(folder):
    """Ranks of tiktoken, as Moonlight and Kimi have them."""
    tokenizer = Tokenizer.from_str(json.dumps(_kimi_trained()))
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    lines = []
    for text, rank in sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1]):
        token = bytes(letters[letter] for letter in text)
        lines.append(f"{base64.b64encode(token).decode()} {rank}\n")
    (folder / "tiktoken.model").write_text("".join(lines))
    names = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 256: "[UNK]", 257: "[PAD]"}
    write(
        folder,
        "deepseek_v3",
        tokenizer_class="TikTokenTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        pad_token="[PAD]",
        additional_special_tokens=["<|im_end|>", "<|im_user|>"],
        added_tokens_decoder={
            str(len(lines) + at): {"content": text} | added(special=at != 3) for at, text in names.items()
        },
    )


def _kimi_trained():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(KIMI), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return json.loads(tokenizer.to_str())


def write(folder, model_type, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}) + "\n")


def reference(name, folder):
    """What encodes as the checkpoint's users know it."""
    if name != "kimi":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        print(f"{name}: {type(tokenizer).__name__}")
        return tokenizer.encode
    # Transformers runs this checkpoint's own code, which is tiktoken with these names.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = {int(number): entry["content"] for number, entry in settings["added_tokens_decoder"].items()}
    ranks = load_tiktoken_bpe(str(folder / "tiktoken.model"))
    special = {names.get(at, f"<|reserved_token_{at}|>"): at for at in range(len(ranks), len(ranks) + 258)}
    encoding = tiktoken.Encoding("kimi", pat_str=KIMI, mergeable_ranks=ranks, special_tokens=special)
    return lambda text: encoding.encode(text, allowed_special="all")


CASES = (mixtral, llama, unigram, qwen2, gpt2, neox, kimi)
NAMES = (
    "<s>",
    "</s>",
    "<|im_end|>",
    "<|user|>",
    "<think>",
    "<sep>",
    "ISH",
    "<ctrl>",
    "[BOS]",
    "<|endoftext|>",
    "<tool>",
)


def digest(ids):
    return np.frombuffer(hashlib.blake2b(np.array(ids, "<i4").tobytes(), digest_size=8).digest(), "<u8")[0]


def compare(make, folder):
    """Makes a tokenizer, prints where this library encodes differently, returns the ids of transformers."""
    make(folder)
    texts = odd_texts(COUNT, SEED, NAMES)
    encode, ours = reference(make.__name__, folder), read_tokenizer(folder, 5000)
    ids = [encode(text) for text in texts]
    wrong = [at for at, text in enumerate(texts) if ours.encode(text).ids != ids[at]]
    print(f"{make.__name__}: {sum(map(len, ids))} tokens, {len(wrong)} texts differ", flush=True)
    for at in wrong[:8]:
        print(repr(texts[at]), "\n  theirs", ids[at][:40], "\n  ours  ", ours.encode(texts[at]).ids[:40])
    return ids


def main():
    for make in CASES:
        folder = FOLDER / make.__name__
        folder.mkdir(parents=True, exist_ok=True)
        ids = compare(make, folder)
        np.savez_compressed(
            folder / "golden.npz",
            lengths=np.array([len(each) for each in ids], np.int16),
            digests=np.array([digest(each) for each in ids]),
        )
    with tempfile.TemporaryDirectory() as temporary:
        compare(nfkc, Path(temporary))
    versions = {module.__name__: module.__version__ for module in (transformers, sentencepiece, tiktoken)}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
