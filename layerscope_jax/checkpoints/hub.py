"""Checkpoints by their name on the Hugging Face hub, such as "allenai/OLMoE-1B-7B-0924".

`huggingface_hub` downloads them into its own cache, which other programs share, and obeys its own environment
variables: HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE. A complete file is not fetched again;
incomplete weights are continued, also by another process (`layerscope_jax.checkpoints.hub_weights`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from layerscope_jax.checkpoints.hub_weights import Download, network_error
from layerscope_jax.checkpoints.other_formats import ADAPTER, other_format
from layerscope_jax.support import interrupts
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.errors import MachineError

NAME = re.compile(r"[a-zA-Z0-9_][\w.-]*/[a-zA-Z0-9_][\w.-]*", re.ASCII)

SHIPPED = Path(__file__).parents[1] / "shipped"
"""The small model that comes with the package."""

WEIGHTS = "*.safetensors"

TAKEN = [
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    WEIGHTS,
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    ADAPTER,
]
"""What is downloaded, as patterns of file names: all that is read here, and what says that it is no model."""

LEFT = ["*/*.safetensors", "consolidated*"]
"""What is not, though it looks like that: second copies of the weights, under their authors' own names."""


def is_hub_name(checkpoint: str | Path) -> bool:
    """Whether a checkpoint is named as on the hub, by "organisation/name", and is no path.

    Whatever is there under this name is a path; so are a `Path`, and a text that begins with "/", "." or "~",
    ends with "/", or has more than one "/".

    >>> is_hub_name("allenai/OLMoE-1B-7B-0924"), is_hub_name("./allenai/OLMoE-1B-7B-0924")
    (True, False)
    """
    return (
        isinstance(checkpoint, str) and bool(NAME.fullmatch(checkpoint)) and not os.path.lexists(checkpoint)
    )


def folder_of(checkpoint: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """Returns the folder of a checkpoint; one that is named as on the hub is downloaded first.

    Args:
        checkpoint: a folder, a name on the hub, or "shipped" for the model in the package, unless there is a
            folder of that name.
        revision: branch, tag or commit of a checkpoint on the hub; None for its main branch.
        weights: whether its weights are downloaded too.

    Raises:
        ValueError: if there is no such folder, the hub has or gives no such checkpoint, or it cannot be
            reached and the checkpoint is not in the cache.
    """
    problems = Problems()
    problems.expect(isinstance(checkpoint, str | Path), "folder", "a folder or a name on the hub", checkpoint)
    named = isinstance(revision, str) and bool(revision)
    problems.expect(revision is None or named, "revision", "a branch, tag or commit, or None", revision)
    problems.raise_any()
    if is_hub_name(checkpoint):
        return _download(str(checkpoint), revision, weights)
    folder = Path(checkpoint)
    if checkpoint == "shipped" and not folder.exists():
        folder = SHIPPED
    if not folder.is_dir():
        raise MachineError(
            f"{folder}: expected a folder with config.json and safetensors files, or a name on the Hugging "
            'Face hub, "organisation/name"; found no such folder; check the path'
        )
    if revision is not None:
        raise ValueError(
            f"revision is of a checkpoint on the hub, but {checkpoint} is a folder; leave revision out, or "
            "give a name that no folder has"
        )
    return folder


def _download(name: str, revision: str | None, weights: bool) -> Path:
    import huggingface_hub  # imported late, because only names need it
    from huggingface_hub import errors
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        """A progress bar by which a download notices Ctrl-C."""

        def update(self, n: float | None = 1) -> bool | None:
            interrupts.check()
            return super().update(n)

    def snapshot(revision: str | None, taken: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=taken, ignore_patterns=LEFT, tqdm_class=Bar
            )
        )

    network = network_error()
    try:
        folder = snapshot(revision, [pattern for pattern in TAKEN if pattern != WEIGHTS])
        if weights:
            Download(name, commit := folder.name, Bar).run([WEIGHTS], LEFT)
            snapshot(commit, [WEIGHTS])  # gives them their names, and fetches those not in Git LFS
        if weights and not any(folder.glob(WEIGHTS)):
            names = huggingface_hub.HfApi().list_repo_files(name, revision=revision)
            what = other_format(names) or f"expected safetensors files, found none among {len(names)} files"
            raise ValueError(f"{_where(name)} holds no checkpoint that can be loaded: {what}")
    except errors.HFValidationError as error:
        raise ValueError(f"{_where(name)} cannot exist: {error}") from error
    except (OSError, RuntimeError, network) as error:  # RuntimeError is of hf_xet, which fetches large files
        of_network = isinstance(error, ConnectionError | TimeoutError | RuntimeError | network)
        if isinstance(error, OSError) and error.errno is not None and not of_network:
            raise  # of the disk
        raise MachineError(f"{_where(name)} {_explained(error, name, revision)}") from error
    return folder


def _where(name: str) -> str:
    return f"{name}: there is no such folder, and as a checkpoint on {_endpoint()} it"


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _explained(error: BaseException, name: str, revision: str | None) -> str:
    """Returns what went wrong with a download, and what to do about it."""
    from huggingface_hub import constants, errors

    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    responses = [response for cause in causes if (response := getattr(cause, "response", None)) is not None]
    status = responses[-1].status_code if responses else None
    kept = "what has been downloaded is kept"
    if constants.HF_HUB_OFFLINE:
        return (
            f"is not complete in the cache, {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids a download; "
            "unset HF_HUB_OFFLINE, or copy the checkpoint into the cache"
        )
    if any(isinstance(cause, errors.GatedRepoError) for cause in causes) or status == 403:
        return (
            f"may not be read: accept its licence on {_endpoint()}/{name}, and set HF_TOKEN to a token of "
            "the account that did"
        )
    if any(isinstance(cause, errors.RevisionNotFoundError) for cause in causes):
        return f"has no revision {revision!r}; give revision a branch, a tag or a commit that it has"
    if status in (401, 404):
        return (
            "does not exist, or may not be read without permission: check the name; if it is private, set "
            "HF_TOKEN to a token that may read it"
        )
    if status == 429:
        return (
            f"cannot be read now, after too many requests (429); wait a few minutes, or set HF_TOKEN; {kept}"
        )
    if status is not None:
        return f"cannot be read: the server answered {status}; try again later; {kept}"
    what = " ".join(str(causes[-1]).split())[:200]
    return (
        f"could not be downloaded whole ({what}); check the network, HF_ENDPOINT and the proxy, and try "
        f"again: {kept}"
    )
