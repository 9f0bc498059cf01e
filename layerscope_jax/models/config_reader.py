"""Reads the settings of a Hugging Face `config.json`, and says all that is wrong with them at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from layerscope_jax.models.config_keys import HARMLESS, NEUTRAL
from layerscope_jax.models.config_values import (
    MOST,
    MOST_LISTED,
    MOST_POSITIONS,
    UNKNOWN,
    is_positive,
    is_whole,
    shown,
)
from layerscope_jax.models.experts import Activation, ExpertBody
from layerscope_jax.models.quantisation import read_quantisation
from layerscope_jax.models.rope_config import read_rope
from layerscope_jax.support.checks import Problems

REQUIRED: Any = object()  # the default of a setting that must be given

HIDDEN_ACTS: dict[Activation, str] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "clamped": "silu",  # as gpt-oss's config says
}
"""Activations, and what `hidden_act` calls them."""

SYNONYMS = {"silu": ("swish",), "gelu_pytorch_tanh": ("gelu_new",)}


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
        self._name = ""  # of the object that it reads, in front of keys

    def mark_read(self, *keys: str) -> None:
        """Keys that are read in another way."""
        self._read_keys |= set(keys)

    def inside(self, name: str, config: Mapping[str, Any]) -> ConfigReader:
        """A reader of an object of the config, whose problems are collected here."""
        reader = ConfigReader(config)
        reader.missing, reader.problems, reader._name = self.missing, self.problems, f"{name}."
        return reader

    def integer(self, *keys: str, default: Any = REQUIRED, most: int = MOST) -> Any:
        """Reads a positive whole number; `default` if it is not given."""
        what = f"a whole number from 1 to {most}"
        return self._read(keys, default, lambda v: is_whole(v) and 0 < v <= most, what, 1)

    def number(self, *keys: str, default: Any = REQUIRED) -> Any:
        """Reads a positive number; `default` if it is not given."""
        return self._read(keys, default, is_positive, "a finite number above 0", 1.0)

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

    def stop_token_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Reads `eos_token_id`: an id of the vocabulary, a list of them, or null."""
        self._read_keys.add("eos_token_id")
        given = self.config.get("eos_token_id")
        ids = [] if given is None else given if isinstance(given, list) else [given]
        if not all(is_whole(token) and 0 <= token < vocab_size for token in ids):
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

    def activation(self) -> Activation:
        """Reads `hidden_act`."""
        self._read_keys.add("hidden_act")
        value = self.config.get("hidden_act")
        for activation, name in HIDDEN_ACTS.items():
            if value is None or value in (name, *SYNONYMS.get(name, ())):
                return activation
        self.problems.add(
            f"hidden_act: expected one of {', '.join(sorted(set(HIDDEN_ACTS.values())))}, got {shown(value)}"
        )
        return "silu"

    def numbers(self, *keys: str, default: Any = REQUIRED) -> Any:
        """Reads a list of positive numbers, as a tuple; `default` if it is not given."""

        def valid(value: Any) -> bool:
            return isinstance(value, list) and bool(value) and all(map(is_positive, value))

        found = self._read(keys, default, valid, "a list of finite numbers above 0", [1.0])
        return tuple(map(float, found)) if isinstance(found, list) else found

    def first_dense(self, num_layers: int, default: int) -> tuple[int, ...]:
        """Reads `first_k_dense_replace`: so many layers at the beginning have no experts."""
        count = self.count("first_k_dense_replace", default=default)
        return tuple(range(min(count, num_layers)))

    def text(self, key: str, supported: Sequence[str], default: str) -> str:
        """Reads a text that must be one of some; `default` if it is not given."""
        what = f"one of {', '.join(supported)}"
        return self._read((key,), default, lambda value: value in supported, what, default)

    def layers_of_kind(
        self, key: str, kind: str, other: str, num_layers: int, default: Sequence[int]
    ) -> tuple[int, ...]:
        """Reads a list that gives one of two kinds for each layer: returns the layers of the first kind.

        Args:
            key: of the list.
            kind, other: names of both kinds.
            num_layers: of the model.
            default: layers of the first kind, if the list is not given.
        """
        self._read_keys.add(key)
        given = self.config.get(key)
        if given is None:
            return tuple(layer for layer in default if layer < num_layers)
        if not isinstance(given, list) or any(item not in (kind, other) for item in given):
            self.problems.add(f"{key}: expected a list of {kind!r} and {other!r}, got {shown(given)}")
            return ()
        if len(given) != num_layers:
            self.problems.add(f"{key}: expected {num_layers} layers, got {len(given)}")
            return ()
        return tuple(layer for layer, item in enumerate(given) if item == kind)

    def count(self, *keys: str, default: Any = REQUIRED) -> Any:
        """Reads a whole number that may be 0; `default` if it is not given."""
        what = f"a whole number from 0 to {MOST}"
        return self._read(keys, default, lambda v: is_whole(v) and 0 <= v <= MOST, what, 0)

    def windows(self, num_layers: int, window: int | None, default: Sequence[int] = ()) -> dict[str, Any]:
        """Reads `layer_types`, for layers of which some attend within a window.

        Args:
            num_layers: of the model.
            window: positions of the window; None where no layer has one.
            default: layers that have it, if nothing is said of them.

        Returns:
            `sliding_window` and `full_attention_layers` of a `ModelConfig`.
        """
        kinds = ("sliding_attention", "full_attention")
        windowed = self.layers_of_kind("layer_types", *kinds, num_layers, default)
        if not windowed or window is None:
            return {"sliding_window": None}
        full = tuple(layer for layer in range(num_layers) if layer not in windowed)
        return {"sliding_window": window, "full_attention_layers": full}

    def dense_layers(self, num_layers: int) -> tuple[int, ...]:
        """Reads which decoder layers have no experts, from `mlp_only_layers` and `decoder_sparse_step`."""
        self._read_keys.add("mlp_only_layers")
        step = self.integer("decoder_sparse_step", default=1)
        given = self.config.get("mlp_only_layers")
        listed = [] if given is None else given
        if not isinstance(listed, list) or not all(map(is_whole, listed)):
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

    def shared(
        self,
        *,
        theta: float,
        norm_eps: float,
        max_position_embeddings: int,
        partial: float | None = None,
        rotated: int | None = None,
        experts: Sequence[str] = ("num_experts", "num_local_experts"),
        choices: Sequence[str] = ("num_experts_per_tok",),
    ) -> dict[str, Any]:
        """Reads the settings that all built-in families share, given the defaults in which they differ.

        Args:
            theta, norm_eps, max_position_embeddings: the class's defaults.
            partial: part of a head that is rotated, if nothing is said of it; None if the class always
                rotates all.
            rotated: numbers of a head that may be rotated; None for `head_dim`.
            experts, choices: keys of the numbers of experts, and of those of a token.
        """
        self.mark_read("quantization_config")
        self.problems.check(read_quantisation, self.config.get("quantization_config"))
        for key, value in NEUTRAL.items():
            self.expect(key, value, "other values are not supported")
        heads = self.integer("num_attention_heads")
        context = self.integer(
            "max_position_embeddings", default=max_position_embeddings, most=MOST_POSITIONS
        )
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
            "num_experts": self.integer(*experts),
            "experts_per_token": self.integer(*choices),
            "expert_body": ExpertBody(self.activation()),
            **read_rope(self, theta, rotated or head_dim, context, partial),
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
            self.problems.add(f"{self._name}{key}: expected {what}, got {shown(value)}")
            return stand_in
        if default is REQUIRED:
            others = f" (or {', '.join(keys[1:])})" if keys[1:] else ""
            self.missing.append(self._name + keys[0] + others)
            return stand_in
        return default
