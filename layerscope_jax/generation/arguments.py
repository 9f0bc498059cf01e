"""Arguments of a call: prompts and settings as `Request`s, and the call's own options."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from layerscope_jax.checkpoints.model import Model
from layerscope_jax.generation.requests import SETTINGS, Request, are_ids, are_objects, is_list
from layerscope_jax.models.config import ModelConfig
from layerscope_jax.scheduling.costs import HardwareProfile
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.units import is_integer

logger = logging.getLogger(__name__)

ENGINES = ("max_num_seqs", "prefill_chunk_size")
"""Settings of an engine, given when it is made and not to a call."""


NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


def check_settings(settings: Iterable[str], options: Sequence[str] = ()) -> None:
    """Refuses settings that no request has.

    Args:
        settings: their names.
        options: names of the call's other arguments, which the caller may have meant.

    Raises:
        ValueError: naming each, with the nearest known name.
    """
    unknown = []
    for name in settings:
        if name in ENGINES:
            unknown.append(f"{name!r} (an engine has it: OffloadConfig({name}=))")
        elif name not in SETTINGS:
            near = difflib.get_close_matches(name, [*SETTINGS, *options, *ENGINES], 1)
            unknown.append(repr(name) + (f" (did you mean {near[0]!r}?)" if near else ""))
    if unknown:
        raise ValueError(f"expected settings among {', '.join(SETTINGS)}, got {', '.join(unknown)}")


def make_request(
    prompt: str | Sequence[int] | Request, settings: dict[str, Any], defaults: Mapping[str, Any] = NO_SETTINGS
) -> Request:
    """Returns a prompt as a `Request`.

    Args:
        prompt: as in `Engine.submit`.
        settings: for a prompt that is not a `Request`.
        defaults: settings of such a prompt that are not among `settings`.

    Raises:
        ValueError: for a value that is not a prompt, for settings that are unknown or out of range, and for
            any settings beside a `Request`, which has its own.
    """
    check_settings(settings)
    if isinstance(prompt, Request):
        if settings:
            raise ValueError(
                f"{', '.join(settings)} cannot be given beside a Request, whose own settings are used; "
                "set it in the Request"
            )
        return prompt
    settings = {**defaults, **settings}
    Request(prompt="", **settings)  # checks the settings first, so that errors in them do not name the prompt
    try:
        return _request(0, prompt, settings)
    except ValueError as error:
        raise ValueError(str(error).replace("prompt 0", "the prompt")) from None


def make_requests(
    prompts: Sequence[str | Sequence[int] | Request],
    settings: dict[str, Any],
    options: Sequence[str] = (),
    defaults: Mapping[str, Any] = NO_SETTINGS,
) -> list[Request]:
    """Returns one `Request` for each prompt.

    Args:
        prompts: as in `Engine.generate`.
        settings: for the prompts that are not `Request`s.
        options: names of the call's other arguments.
        defaults: settings of those prompts that are not among `settings`.

    Raises:
        ValueError: if there are no prompts, or they are not a list; for unknown settings; and for any
            settings if all prompts are `Request`s, which have their own.
    """
    check_settings(settings, options)
    if isinstance(prompts, Request) or not is_list(prompts):
        raise ValueError(
            f"prompts must be a list of prompts, got {str(prompts)[:40]!r}{kind_of(prompts)}; "
            "put it in a list"
        )
    if isinstance(prompts, np.ndarray | jax.Array) and prompts.ndim == 0:
        raise ValueError(f"prompts must be a list of prompts, got the number {prompts}; put it in a list")
    if not len(prompts):
        raise ValueError("prompts must hold at least one prompt, got an empty list; add a prompt")
    if any(isinstance(prompt, int | np.integer) or getattr(prompt, "ndim", 1) == 0 for prompt in prompts):
        raise ValueError(
            f"prompts must be a list of prompts, each text or a list of token ids, got {str(prompts)[:40]}; "
            "put the ids of a single prompt in another list, as in [[5, 6, 7]]"
        )
    if settings and all(isinstance(prompt, Request) for prompt in prompts):
        raise ValueError(
            f"{', '.join(settings)} cannot be given beside prompts that are all Requests, whose own settings "
            "are used; set it in each Request"
        )
    settings = {**defaults, **settings}
    Request(prompt="", **settings)  # checks the settings first, so that errors in them name no prompt
    return [
        prompt if isinstance(prompt, Request) else _request(index, prompt, settings)
        for index, prompt in enumerate(prompts)
    ]


def kind_of(value: Any) -> str:
    """Returns what is wrong with a collection that is not a list, in words; empty for other values."""
    if isinstance(value, Mapping):
        return ", a dict, whose keys are no list"
    return ", a set, which has no order" if isinstance(value, Set) else ""


def _request(index: int, prompt: Any, settings: dict[str, Any]) -> Request:
    if isinstance(prompt, jax.Array) and not isinstance(prompt, jax.core.Tracer):
        prompt = np.asarray(prompt)
    if not (isinstance(prompt, str) or are_ids(prompt)):
        raise ValueError(
            f"prompt {index} must be text, a list of token ids or a Request, got {repr(prompt)[:60]}"
            + (
                "; put a conversation into a Request(messages=...)"
                if are_objects(prompt) and len(prompt)
                else ""
            )
        )
    return Request(prompt=prompt, **settings)


def need_costs(costs: HardwareProfile | None) -> None:
    """Refuses a bound on the time where a machine's costs are not known.

    Raises:
        ValueError: if `costs` is None.
    """
    if costs is None:
        raise ValueError(
            "a bound needs the costs of this machine: pass the file that `layerscope calibrate` wrote as "
            "OffloadConfig(profile=), or choose a policy that weighs costs; and set a device_budget that "
            "does not hold every expert"
        )


def batch_of(
    config: ModelConfig,
    prompt_tokens: int,
    max_num_seqs: int | None,
    most: int,
    new_tokens: int,
    settings: Mapping[str, Any],
) -> list[Request]:
    """Returns a batch of equal requests: `max_num_seqs`, or the `most` that an engine runs at once.

    Args:
        settings: of the requests, except for what ends them.

    Raises:
        ValueError: naming each size that is invalid, or more than the model takes; and for settings that are
            unknown or out of range.
    """
    check_settings(settings, ("prompt_tokens", "new_tokens"))
    problems = Problems()
    if "max_new_tokens" in settings:
        problems.add("max_new_tokens is called new_tokens here; use that")
    for name, size in {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}.items():
        counts = is_integer(size) and 1 <= size < 2**31
        problems.expect(counts, name, "a whole number, 1 or more", size)
    count = most if max_num_seqs is None else max_num_seqs
    problems.expect(is_integer(count) and count >= 1, "max_num_seqs", "1 or more", count)
    if is_integer(count) and count > most:
        problems.add(
            f"max_num_seqs must be at most the engine's own, {most}, got {count}; "
            "make an engine with a larger OffloadConfig(max_num_seqs=)"
        )
    if is_integer(prompt_tokens) and prompt_tokens >= config.max_position_embeddings:
        problems.add(
            f"prompt_tokens must be less than the model's context of {config.max_position_embeddings}, "
            f"got {prompt_tokens}"
        )
    problems.raise_any()
    others = {"max_new_tokens": int(new_tokens), "stop": None, "stop_token_ids": ()}
    request = Request(prompt=[0] * int(prompt_tokens), **{**settings, **others})
    return [request] * max(1, int(count) // request.n)


def check_options(on_token: Any, **switches: Any) -> None:
    """Refuses invalid options of a call.

    Args:
        on_token: must be None or callable.
        **switches: must be True or False.

    Raises:
        ValueError: naming each invalid option.
    """
    problems = Problems()
    for name, value in switches.items():
        problems.expect(isinstance(value, bool), name, "True or False", value)
    fits = on_token is None or callable(on_token)
    problems.expect(fits, "on_token", "a function of a Token, or None", on_token)
    problems.raise_any()


def defaults_of(model: Model) -> Mapping[str, Any]:
    """Returns the settings that a model's checkpoint recommends, and logs them if there are any."""
    if model.generation_defaults:
        logger.warning(
            "%s recommends %s, which requests have unless they say otherwise; turn that off with "
            "generation_config='none'",
            model.path,
            ", ".join(f"{name}={value}" for name, value in model.generation_defaults.items()),
        )
    return model.generation_defaults
