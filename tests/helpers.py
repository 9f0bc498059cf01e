"""What several tests share: tiny random models, a hand-made profile, and calls that may not hang."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from layerscope_jax import Decoder, HardwareProfile, Model, ModelConfig, TimeTable
from layerscope_jax.models.layers import abstract
from layerscope_jax.offload import link
from layerscope_jax.runtime.whole import WholeModel

TINY = ModelConfig(
    family="olmoe",
    vocab_size=61,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=8,
    experts_per_token=2,
    moe_intermediate_size=20,
    normalize_top_k=True,
    qk_norm="head",
    max_position_embeddings=96,
)

SMALLEST = replace(
    TINY,
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_experts=4,
    moe_intermediate_size=24,
    qk_norm="all",
    max_position_embeddings=64,
    stop_token_ids=(0,),
)
"""Of what is written to files."""

PROFILE = HardwareProfile(
    host_ms=TimeTable((1, 64), (1.0, 8.0)),
    device_ms=TimeTable((1, 64), (0.2, 0.4)),
    transfer_ms=2.0,
    source="made up",
)
"""The host is faster up to about 11 tokens."""

MACHINE = {
    "cpu",
    "cores",
    "memory_bytes",
    "device",
    "load_average",
    "versions",
    "commit",
    "changed_since_commit",
}
"""What a benchmark says of the machine."""


@contextmanager
def one_jit(wanted: bool = True) -> Iterator[None]:
    """Within, engines go through everything resident in one jitted function a step, as on accelerators."""
    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            patch.setattr(WholeModel, "is_faster_on", lambda device: True)
        yield


@lru_cache
def abstract_decoder(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A decoder without its numbers."""
    return nnx.split(abstract(lambda rngs: Decoder(config, rngs=rngs, dtype=jnp.float32)))


def random_decoder(config: ModelConfig, seed: int = 0, dtype: Any = np.float32) -> Decoder:
    """A decoder with weights of unit gain, so that routing is spread and no two logits are nearly equal.

    Drawn by NumPy: nothing is compiled.
    """
    rng = np.random.default_rng(seed)
    graphdef, state = abstract_decoder(config)

    def draw(path: tuple, shape: tuple[int, ...]) -> jax.Array:
        if len(shape) > 1 and path[-1] != "embedding":  # drawn as [in, out]: what tests expect is of these
            noise = rng.standard_normal((*shape[:-2], shape[-1], shape[-2])).swapaxes(-1, -2)
        else:
            noise = rng.standard_normal(shape)
        if path[-1] == "scale":
            values = 1 + 0.1 * noise
        elif path[-1] == "bias":
            values = 0.1 * noise
        else:
            values = noise / np.sqrt(shape[-1]) * (2 if "router" in path else 1)
        return jax.device_put(values.astype(dtype))  # which compiles nothing, as `jnp.asarray` does

    leaves = {path: draw(path, leaf.shape) for path, leaf in flatten_dict(nnx.to_pure_dict(state)).items()}
    return nnx.merge(graphdef, unflatten_dict(leaves))


def random_model(config: ModelConfig = TINY, seed: int = 0, dtype: Any = np.float32, **changes: Any) -> Model:
    return Model.from_decoder(random_decoder(replace(config, **changes), seed, dtype))


def in_time(call: Callable[[], Any], seconds: float = 60) -> Any:
    """What `call` gives or raises; fails instead of hanging. The limit is far beyond what it should take."""
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"still not done after {seconds} s"
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


@contextmanager
def not_ignored(number: signal.Signals) -> Iterator[None]:
    """Within, a process that is started does not ignore a signal, as what a shell runs beside itself does.

    What a handler of this process does is of no account: another program begins without it.
    """
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def once(call: Callable[..., Any]) -> Callable[..., Any]:
    """Gives everybody what the first call gives: what it compiles need not be compiled again."""
    found: list[Any] = []

    def first(*arguments: Any) -> Any:
        if not found:
            found.append(call(*arguments))
        return found[0]

    return first


def bits(array: Any) -> np.ndarray:
    """The raw bits of an array, so that equal means equal."""
    array = np.asarray(array)
    return array.view(f"u{array.itemsize}")


class Copies:
    """Stands between an engine and `jax.device_put`: counts what arrives, and fails as it is told.

    Args:
        rate: how often a copy fails, at the start or at the end; never `most` times in a row for one matrix.
        seed: of those failures.

    Attributes:
        broken: while set, every copy fails.
        moved: bytes of copies that succeeded.
        failed: copies that did not.
    """

    def __init__(self, rate: float = 0.0, seed: int = 0, most: int = 3):
        self.rate, self.most = rate, most
        self.rng = np.random.default_rng(seed)
        self.in_a_row: dict[int, int] = {}
        self.broken = False
        self.moved = self.failed = 0

    def __call__(self, array: jax.Array, sharding: jax.sharding.Sharding) -> Any:
        row = self.in_a_row.get(id(array), 0)
        fails = self.broken or (row < self.most - 1 and self.rng.random() < self.rate)
        self.in_a_row[id(array)] = row + 1 if fails else 0
        if not fails:
            self.moved += array.nbytes
            return jax.device_put(array, sharding)
        self.failed += 1
        if self.rng.random() < 0.5:
            raise OSError("injected: did not start")
        return BrokenOff()


@contextmanager
def copying_by(copy: Callable[[jax.Array, jax.sharding.Sharding], Any]) -> Iterator[None]:
    """Engines that are made within put every matrix on the device by `copy`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link, "start_copy", copy)
        yield


class BrokenOff:
    """A copy that began and does not end well."""

    def block_until_ready(self) -> jax.Array:
        raise OSError("injected: broke off")


VOCABULARY = 280
EOS, PAD = 278, 279
PROMPTS = [[5, 200, 7], [17], list(range(30, 44)), [9, 9, 9, 100, 3]]
"""For `spelling_model`."""


def byte_tokenizer() -> Tokenizer:
    """A token a byte, twenty-two idle ids, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    vocabulary |= {f"idle{index}": 256 + index for index in range(22)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    assert tokenizer.add_special_tokens(["<eos>", "<pad>"]) == 2
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def fallback_tokenizer() -> Tokenizer:
    """As Llama's and Mixtral's: letters, and tokens such as "<0xE2>" for the bytes of all others."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    words = ["\u2581", "\u2581a", "\u2581\u2581", "a", "b", "c", "x", ".", "\u2581.", "\ufffd", "é"]
    vocabulary |= {word: 256 + index for index, word in enumerate(words)}
    vocabulary |= {f"idle{index}": 267 + index for index in range(11)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    assert tokenizer.add_special_tokens(["<eos>", "<pad>"]) == 2
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


@lru_cache
def spelling_model() -> Model:
    """A random model that speaks in single bytes."""
    model = random_model(vocab_size=VOCABULARY, num_layers=2, seed=4)
    return replace(model, tokenizer=byte_tokenizer())
