"""Groups of options: in which boxes, and in which order, the help of a command shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, make_dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, get_type_hints

from tyro.conf import OmitArgPrefixes

from layerscope_jax.cli.args import arg

WITHOUT_PREFIX: Any = OmitArgPrefixes
"""Options of a group have the names that they would have without it."""

Groups = Mapping[str, tuple[str, ...]]
"""Title of a group -> names of its options; a command has those of them that it knows."""

ENGINE_GROUPS: Groups = {
    "prompt": (
        "prompt",
        "prompts",
        "prompt_column",
        "chat",
        "system",
        "chat_template",
        "chat_template_kwargs",
    ),
    "length": ("max_new_tokens", "min_new_tokens", "stop", "include_stop_str_in_output", "ignore_eos"),
    "sampling": (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "n",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "json_schema",
        "generation_config",
    ),
    "memory and policy": (
        "device_budget",
        "host_budget",
        "policy",
        "predictor",
        "profile",
        "max_num_seqs",
        "prefix_cache",
        "devices",
        "numerics",
        "emulated_link_bandwidth",
    ),
    "weights": ("expert_format", "dense_format", "dtype", "revision"),
    "output": ("out", "json", "timeline", "bound", "logprobs", "prompt_logprobs"),
    "many servers": ("ray", "workers", "nodes", "worker_timeout", "worker_start_timeout", "worker_retries"),
}
"""Groups of commands that run an engine: first what most people use."""


class Grouped:
    """What a command line is parsed into: a field for each group of a command's options.

    Attributes:
        command: the command.
        groups: names of the fields that are groups.
    """

    command: ClassVar[type]
    groups: ClassVar[tuple[str, ...]]

    def flat(self) -> Any:
        """Returns the command, which has all options itself."""
        values = {name: value for name, value in vars(self).items() if name not in self.groups}
        for name in self.groups:
            values |= vars(getattr(self, name))
        return self.command(**values)


@cache
def grouped(command: type) -> type:
    """Returns the dataclass to parse a command line into: the command's own, unless it has `GROUPS`.

    Options that are in no group stay first, those of each group are in its order.
    """
    groups: Groups = getattr(command, "GROUPS", {})
    if not groups:
        return command
    hints = get_type_hints(command, include_extras=True)
    left = {each.name: each for each in fields(command)}
    parts: list[tuple[str, Any]] = []
    for title, names in groups.items():
        if own := [left.pop(name) for name in names if name in left]:
            part: Any = make_dataclass(title.title().replace(" ", ""), [_same(each, hints) for each in own])
            parts.append((title.replace(" ", "_"), Annotated[WITHOUT_PREFIX[part], arg(name=title, help="")]))
    return make_dataclass(
        command.__name__,
        [*(_same(each, hints) for each in left.values()), *parts],
        bases=(Grouped,),
        namespace={"command": command, "groups": tuple(name for name, _ in parts)},
        kw_only=True,
    )


def _same(given: Field[Any], hints: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """Returns a field as `make_dataclass` takes it."""
    default = {} if given.default is MISSING else {"default": given.default}
    return given.name, hints[given.name], field(kw_only=True, **default)
