"""Families of models (`Family`), and the reader of their Hugging Face `config.json` (`ConfigReader`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerscope_jax.models.config import ModelConfig
from layerscope_jax.models.config_keys import HARMLESS, NEUTRAL
from layerscope_jax.models.weights import Weight
from layerscope_jax.support.checks import Problems

REQUIRED: Any = object()  # the default of a setting that must be given

UNKNOWN = "unknown key, which may change what the model computes"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One Hugging Face architecture: its settings, its weights, and the layer parts that only it has.

    Attributes:
        architecture: HF's class name, as in `architectures` of `config.json`.
        model_type: HF's short name, also used as `ModelConfig.family`.
        read_config: function from `config.json` as a dict to a `ModelConfig`; raises one ValueError that
            names everything that is wrong.
        write_config: the reverse, without `architectures`, `model_type` and `dtype`.
        weights: table of its tensors; see `layerscope_jax.models.weights`.
        ignored: names of tensors to ignore if the model has no place for them; `*` matches any text.
        attentions, feed_forwards: its own kinds of layer parts, by their names in its configs; see
            `layerscope_jax.models.kinds`.
    """

    architecture: str
    model_type: str
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    weights: tuple[Weight, ...]
    ignored: tuple[str, ...] = ("lm_head.weight", "*rotary_emb.inv_freq")
    attentions: Mapping[str, Any] = field(default_factory=dict)
    feed_forwards: Mapping[str, Any] = field(default_factory=dict)

    def tensor_of(self, place: str) -> str | None:
        """Returns HF's tensor name for a place of the table; None if the table does not have the place."""
        return next((row.tensor for row in self.weights if row.place == place), None)


MOST = 2**31 - 1
"""Largest size in a config: sizes are 32-bit integers."""

MOST_LISTED = 2**16
"""Largest number of layers for which the dense layers are listed one by one."""

MOST_POSITIONS = 2**30
"""Longest context: `PAD_POSITION` is larger than any of its positions."""

LARGEST = 3e38
"""Approximate largest number of float32, the dtype in which a config's numbers are used."""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return (_whole(value) or isinstance(value, float)) and 0 < value < LARGEST  # which NaN is not


def shown(value: Any) -> str:
    """Returns a value as text for a message, shortened if it is long.

    >>> shown("a" * 1000)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."
    """
    if _whole(value) and abs(value) >= 10**60:
        return f"a whole number of more than 60 digits{' below 0' * (value < 0)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class ConfigReader:
    """Reads settings one by one, collects everything that is wrong, and raises it once, in `check`.

    A setting may go by several keys; the first that is present and not null counts. Reading a wrong value
    returns a harmless stand-in, so that the other settings can still be checked.

    >>> reader = ConfigReader({"hidden_size": 64, "num_hidden_layers": "two"})
    >>> reader.integer("hidden_size"), reader.integer("num_key_value_heads", default=4)
    (64, 4)
    >>> reader.integer("num_hidden_layers"), reader.integer("num_experts", "num_local_experts")
    (1, 1)
    >>> reader.check()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: missing: num_experts (or num_local_experts); num_hidden_layers: expected a whole number ...
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.missing: list[str] = []
        self.problems = Problems()
        self._read_keys: set[str] = set()

    def integer(self, *keys: str, default: Any = REQUIRED, most: int = MOST) -> Any:
        """Reads a positive whole number; `default` if it is not given."""
        what = f"a whole number from 1 to {most}"
        return self._read(keys, default, lambda v: _whole(v) and 0 < v <= most, what, 1)

    def number(self, *keys: str, default: Any = REQUIRED) -> Any:
        """Reads a positive number; `default` if it is not given."""
        return self._read(keys, default, _positive, "a finite number above 0", 1.0)

    def flag(self, *keys: str, default: bool) -> bool:
        """Reads true or false; `default` if it is not given."""
        return self._read(keys, default, lambda value: isinstance(value, bool), "true or false", False)

    def expect(self, key: str, supported: Any, why: str) -> None:
        """Reads a setting that must be `supported`, null or left out; anything else is a problem."""
        self._read_keys.add(key)
        value = self.config.get(key)
        same = value == supported and (type(value) is bool) == (type(supported) is bool)
        if value is not None and not same:
            expected = "null" if supported is None else repr(supported)
            self.problems.add(f"{key}: expected {expected}, got {shown(value)}; {why}")

    def rope_theta(self, default: float) -> float:
        """Reads the base of the rotary embedding, which older and newer configs keep under different keys."""
        # As in transformers 5: an old `rope_scaling` replaces `rope_parameters`, whose own `rope_theta` beats
        # the one beside it.
        name = "rope_scaling" if self.config.get("rope_scaling") else "rope_parameters"
        rope = self.config.get(name) or {}
        if not isinstance(rope, Mapping):
            self.problems.add(f"{name}: expected an object or null, got {shown(rope)}")
            rope = {}
        self._read_keys |= {"rope_scaling", "rope_parameters", "rope_theta"}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            self.problems.add(
                f"{name}: expected rope_type 'default', got {shown(kind)}; scaled rotary embeddings are not "
                "supported"
            )
        for key, value in rope.items():
            neutral = NEUTRAL.get(key)
            if key not in ("rope_type", "type", "rope_theta") and value not in (None, neutral):
                self.problems.add(f"{name}.{key}: {UNKNOWN}, got {shown(value)}")
        theta = next(
            (v for v in (rope.get("rope_theta"), self.config.get("rope_theta")) if v is not None), None
        )
        if theta is not None and not _positive(theta):
            self.problems.add(f"rope_theta: expected a finite number above 0, got {shown(theta)}")
            theta = None
        return default if theta is None else float(theta)

    def stop_token_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Reads `eos_token_id`: an id of the vocabulary, a list of them, or null."""
        self._read_keys.add("eos_token_id")
        given = self.config.get("eos_token_id")
        ids = [] if given is None else given if isinstance(given, list) else [given]
        if not all(_whole(token) and 0 <= token < vocab_size for token in ids):
            self.problems.add(
                f"eos_token_id: expected a token id from 0 to {vocab_size - 1} (vocab_size {vocab_size}), a "
                f"list of them or null, got {shown(given)}"
            )
            return ()
        return tuple(ids)

    def layer_types(self, sliding_window: int | None) -> None:
        """Reads `layer_types`: every layer must have the kind of attention that `sliding_window` implies."""
        self._read_keys.add("layer_types")
        kind = "full_attention" if sliding_window is None else "sliding_attention"
        given = self.config.get("layer_types")
        if given is not None and (not isinstance(given, list) or any(item != kind for item in given)):
            self.problems.add(
                f"layer_types: expected {kind!r} for every layer, got {shown(given)}; models that mix kinds "
                "of attention are not supported"
            )

    def dense_layers(self, num_layers: int) -> tuple[int, ...]:
        """Reads which decoder layers have no experts, from `mlp_only_layers` and `decoder_sparse_step`."""
        self._read_keys.add("mlp_only_layers")
        step = self.integer("decoder_sparse_step", default=1)
        given = self.config.get("mlp_only_layers")
        listed = [] if given is None else given
        if not isinstance(listed, list) or not all(map(_whole, listed)):
            self.problems.add(
                f"mlp_only_layers: expected a list of layer numbers or null, got {shown(given)}"
            )
            return ()
        if step == 1:
            return tuple(sorted({layer for layer in listed if 0 <= layer < num_layers}))
        if num_layers > MOST_LISTED:
            self.problems.add(
                f"decoder_sparse_step: expected 1 in a model of more than {MOST_LISTED} layers, got {step}"
            )
            return ()
        only = set(listed)
        return tuple(layer for layer in range(num_layers) if layer in only or (layer + 1) % step)

    def shared(self, *, theta: float, norm_eps: float, max_position_embeddings: int) -> dict[str, Any]:
        """Reads the settings that all built-in families share, given the defaults in which they differ."""
        self.expect("hidden_act", "silu", "other activations are not supported")
        self.expect(
            "quantization_config", None, "quantized weights are not supported: use the original checkpoint"
        )
        for key, value in NEUTRAL.items():
            self.expect(key, value, "other values are not supported")
        heads = self.integer("num_attention_heads")
        hidden = self.integer("hidden_size")
        head_dim = self.integer("head_dim", default=max(1, hidden // heads))
        if head_dim % 2 and not (self.missing or self.problems.found):
            self.problems.add(f"head_dim: expected an even number (it is rotated in pairs), got {head_dim}")
        wrong = len(self.missing + self.problems.found)
        vocab_size = self.integer("vocab_size")
        tokens = vocab_size if len(self.missing + self.problems.found) == wrong else MOST
        return {
            "vocab_size": vocab_size,
            "hidden_size": hidden,
            "num_layers": self.integer("num_hidden_layers"),
            "num_heads": heads,
            "head_dim": head_dim,
            "num_experts": self.integer("num_experts", "num_local_experts"),
            "experts_per_token": self.integer("num_experts_per_tok"),
            "rope_theta": self.rope_theta(theta),
            "max_position_embeddings": self.integer(
                "max_position_embeddings", default=max_position_embeddings, most=MOST_POSITIONS
            ),
            "norm_eps": self.number("rms_norm_eps", default=norm_eps),
            "tie_embeddings": self.flag("tie_word_embeddings", default=False),
            "stop_token_ids": self.stop_token_ids(tokens),
        }

    def check(self, *harmless: str) -> None:
        """Raises ValueError if a setting is missing or wrong, or if a key that was never read has a value.

        Args:
            harmless: keys that change no logit of this family, in addition to those of `HARMLESS`.
        """
        known = HARMLESS | self._read_keys | set(harmless)
        for key, value in self.config.items():
            if key not in known and value is not None:
                self.problems.add(f"{key}: {UNKNOWN}, got {shown(value)}")
        if self.missing:
            self.problems.found.insert(0, f"missing: {', '.join(self.missing)}")
        self.problems.raise_any()

    def _read(
        self, keys: tuple[str, ...], default: Any, valid: Callable[[Any], bool], what: str, stand_in: Any
    ) -> Any:
        self._read_keys |= set(keys)
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if valid(value):
                return value
            self.problems.add(f"{key}: expected {what}, got {shown(value)}")
            return stand_in
        if default is REQUIRED:
            others = f" (or {', '.join(keys[1:])})" if keys[1:] else ""
            self.missing.append(keys[0] + others)
            return stand_in
        return default


def write_shared(config: ModelConfig) -> dict[str, Any]:
    """Returns the settings that all built-in families share, as transformers 5 spells them."""
    stops = config.stop_token_ids
    return {
        "bos_token_id": None,
        "eos_token_id": None if not stops else stops[0] if len(stops) == 1 else list(stops),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_heads,
        "num_experts_per_tok": config.experts_per_token,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": None,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }
