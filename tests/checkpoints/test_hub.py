"""Checkpoints by their name on a hub on this machine: what is fetched, and what goes wrong."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import BRANCH, COMMIT, NAME, Hub, serving

from layerscope_jax.checkpoints.description import describe
from layerscope_jax.checkpoints.hub import folder_of, is_hub_name
from layerscope_jax.checkpoints.model import load
from layerscope_jax.cli import main as cli
from layerscope_jax.support import interrupts

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "olmoe"
OLMOE = {name: (GOLDEN / name).read_bytes() for name in ("config.json", "model.safetensors")}
WEIGHTS = "model.safetensors"
OTHERS = (
    "README.md",
    "pytorch_model.bin",
    "model.gguf",
    "original/model.safetensors",
    "original/config.json",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "onnx/model.onnx",
    "modeling_tiny.py",
)
"""Files beside a checkpoint that nothing here reads."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and no waiting between tries."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def left_over(cache):
    """Whatever looks like a file of the checkpoint but is not whole."""
    blobs = [file for file in cache.rglob("blobs/*") if file.suffix != ".incomplete"]
    return [file for file in blobs if file.read_bytes() not in OLMOE.values()]


def refusal(name=NAME, revision=None):
    with pytest.raises(ValueError, match=r"^\S+: |^\w+ (must be|is) ") as raised:
        folder_of(name, revision)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# Names and paths


@pytest.mark.parametrize(
    "path",
    ["./a/b", "/a/b", "a/b/", "a/b/c", "a", "~/a", "../a", "a//b", "a/.b", "", "a b/c", Path("a/b"), "a\\b"],
)
def test_a_path_is_no_name(path):
    assert not is_hub_name(path)


def test_what_is_there_is_a_path():
    assert is_hub_name("a/b")
    Path("a/b").mkdir(parents=True)
    assert not is_hub_name("a/b")
    Path("a/c").symlink_to("nowhere")
    assert not is_hub_name("a/c")


def test_a_folder_is_asked_of_no_hub():
    Path("tiny").mkdir()
    Path(NAME).symlink_to(GOLDEN)
    with serving(Hub(OLMOE)) as hub:
        assert load(NAME).path == Path(NAME)
        assert load(f"./{NAME}/").path == Path(NAME)
    assert not hub.requests


@pytest.mark.parametrize("path", ["nowhere", "./tiny/olmoe", "tiny/olmoe/", "/tiny/olmoe"])
def test_what_is_neither_is_refused_naming_both(path):
    with serving(Hub(OLMOE)) as hub:
        assert 'or a name on the Hugging Face hub, "organisation/name"; found no such folder' in refusal(path)
    assert not hub.requests


def test_a_folder_has_no_revision():
    assert "revision is of a checkpoint on the hub, but" in refusal(str(GOLDEN), "main")
    assert "revision must be a branch, tag or commit, or None, got ''" in refusal(NAME, "")
    assert "folder must be a folder or a name on the hub, got 3" in refusal(3)


# What is fetched


def test_a_checkpoint_is_fetched_once(cache):
    chat = {"chat_template.jinja": b"{{ 1 }}", "tokenizer_config.json": b"{}"}
    with serving(Hub(OLMOE | chat | dict.fromkeys(OTHERS, b"other"))) as hub:
        model = load(NAME)
        assert hub.fetched() == OLMOE.keys() | chat.keys()
        assert model.path == folder_of(NAME)
        assert model.path.is_relative_to(cache)
        assert {file.name for file in model.path.iterdir()} == OLMOE.keys() | chat.keys()
        files = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
        assert len(files) == 4
    assert model.config == load(GOLDEN).config


def test_a_revision_is_asked_for():
    older = "f" * 40
    with serving(Hub(OLMOE, {BRANCH: COMMIT, "v1": older, COMMIT: COMMIT, older: older})):
        assert folder_of(NAME, "v1").name == folder_of(NAME, older).name == older
        assert folder_of(NAME).name == folder_of(NAME, BRANCH).name == COMMIT


def test_without_weights_only_small_files_are_fetched(cache):
    index = {"model.safetensors.index.json": b"{}"}
    with serving(Hub(OLMOE | index)) as hub:
        folder = folder_of(NAME, weights=False)
        assert hub.fetched() == {"config.json", *index}
        found = describe(folder)
        assert found.stored is None
        assert found.layers == 3
        assert hub.fetched() == {"config.json", *index}


def test_a_gated_checkpoint_is_read_with_a_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(Hub(OLMOE, token="hf_secret")):
        assert (folder_of(NAME) / WEIGHTS).read_bytes() == OLMOE[WEIGHTS]


def test_a_connection_that_breaks_once_is_no_trouble(cache):
    with serving(Hub(OLMOE, cuts={WEIGHTS: [100_000]})) as hub:
        assert (folder_of(NAME) / WEIGHTS).read_bytes() == OLMOE[WEIGHTS]
    assert ("GET", f"/{NAME}/resolve/{COMMIT}/{WEIGHTS}", "bytes=100000-") in hub.requests
    assert not left_over(cache)


def test_after_a_failure_only_what_is_missing_is_fetched(cache):
    with serving(Hub(OLMOE, cuts={WEIGHTS: [100_000] + [0] * 20})):
        assert "could not be downloaded whole" in (message := refusal())
        assert "try again: what has been downloaded is kept" in message
    assert not left_over(cache)
    with serving(Hub(OLMOE)) as hub:
        assert (folder_of(NAME) / WEIGHTS).read_bytes() == OLMOE[WEIGHTS]
        assert hub.fetched() == {WEIGHTS}
        assert hub.ranges(WEIGHTS) == ["bytes=100000-"]


def test_an_interrupt_loses_nothing(cache, monkeypatch):
    with serving(Hub(OLMOE)) as hub:

        def check():
            if any(file.stat().st_size for file in cache.rglob("*.incomplete")) and hub.fetched() >= {
                WEIGHTS
            }:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(interrupts, "check", check)  # as after Ctrl-C
            with pytest.raises(KeyboardInterrupt):
                folder_of(NAME)
        (begun,) = cache.rglob("*.incomplete")
        size = begun.stat().st_size
        assert 0 < size < len(OLMOE[WEIGHTS])
        assert (folder_of(NAME) / WEIGHTS).read_bytes() == OLMOE[WEIGHTS]
        assert hub.ranges(WEIGHTS) == [None, f"bytes={size}-"]


def test_weights_that_are_not_in_git_lfs(cache):
    with serving(Hub(OLMOE, lfs=False)):
        assert (folder_of(NAME) / WEIGHTS).read_bytes() == OLMOE[WEIGHTS]
    assert not left_over(cache)


def test_the_cache_is_enough_without_a_network(monkeypatch):
    with serving(Hub(OLMOE)) as hub:
        folder = folder_of(NAME)
        hub.requests.clear()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert folder_of(NAME) == folder
        assert not hub.requests
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with unreachable():
        assert folder_of(NAME) == folder


# What goes wrong


@contextmanager
def unreachable():
    """A hub at a port where nobody listens."""
    with socket.socket() as taken, pytest.MonkeyPatch.context() as patch:
        taken.bind(("127.0.0.1", 0))
        patch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        yield


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ({"answers": (403, "GatedRepo")}, "may not be read: accept its licence on http://127.0.0.1:"),
        ({"answers": (401, "GatedRepo")}, "and set HF_TOKEN to a token of the account that did"),
        ({"token": "hf_other"}, "may not be read: accept its licence"),
        ({"api_answers": (401, "RepoNotFound")}, "check the name; if it is private, set HF_TOKEN"),
        ({"api_answers": (404, "RepoNotFound")}, "does not exist, or may not be read without permission"),
        ({"api_answers": (429, "")}, "after too many requests (429); wait a few minutes, or set HF_TOKEN"),
        ({"answers": (429, "")}, "after too many requests (429)"),
        ({"api_answers": (503, "")}, "the server answered 503; try again later"),
        (
            {"answers": (500, "")},
            "the server answered 500; try again later; what has been downloaded is kept",
        ),
    ],
)
def test_an_answer_that_is_no_file_is_explained(cache, trouble, words):
    with serving(Hub(OLMOE, **trouble)) as hub:
        message = refusal()
    assert message.startswith(f"{NAME}: there is no such folder, and as a checkpoint on {hub.url} it ")
    assert words in message
    assert not left_over(cache)


def test_names_that_the_hub_does_not_have():
    with serving(Hub(OLMOE)):
        assert "tiny/other: there is no such folder, and as a checkpoint on" in refusal("tiny/other")
        assert "it has no revision 'v9'; give revision a branch, a tag or a commit" in refusal(NAME, "v9")
        assert "cannot exist: " in refusal("tiny/a--b")


def test_a_server_that_is_not_there(monkeypatch):
    with unreachable():
        assert "could not be downloaded whole (" in (message := refusal())
        assert "check the network, HF_ENDPOINT and the proxy" in message
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE forbids a download; unset HF_HUB_OFFLINE" in refusal()


@pytest.mark.parametrize(
    "error", [RuntimeError("CAS: reset"), ConnectionResetError(104, "CAS: reset"), TimeoutError("CAS: reset")]
)
def test_errors_of_the_store_of_large_files_are_explained(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "could not be downloaded whole (" in (message := refusal())
    assert "CAS: reset); check the network" in message


def test_an_error_of_the_disk_is_not_the_networks(cache):
    cache.write_text("a file where the cache should be")
    with serving(Hub(OLMOE)), pytest.raises(OSError, match="cache") as raised:
        folder_of(NAME)
    assert raised.value.errno


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["config.json", "pytorch_model.bin"], "got weights as PyTorch pickles them (pytorch_model.bin)"),
        (["model-q4.gguf"], "got weights in GGUF, the format of llama.cpp (model-q4.gguf)"),
        (["config.json", "consolidated.safetensors"], "whose names are of the model's authors"),
        (["adapter_config.json", "adapter_model.bin"], "got an adapter (LoRA, say)"),
        (["README.md"], "expected safetensors files, found none among 1 files"),
    ],
)
def test_a_checkpoint_without_safetensors_is_named_for_what_it_is(files, words):
    with serving(Hub(dict.fromkeys(files, b"{}"))):
        message = refusal()
    assert "holds no checkpoint that can be loaded: expected " in message
    assert words in message


def test_the_command_line_takes_names_and_revisions(tmp_path, monkeypatch, capsys):
    """In a process of its own, which reads the environment as users set it; then in this one, offline."""
    with serving(Hub(OLMOE, {"v1": COMMIT, COMMIT: COMMIT}, token="hf_secret")) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}
        command = ["generate", NAME, "--revision", "v1", "--prompt", "Call me Ishmael."]
        done = subprocess.run(
            [sys.executable, "-m", "layerscope_jax.cli", *command],
            capture_output=True,
            text=True,
            env={**os.environ, **settings, "PYTHONPATH": str(ROOT)},
        )
        line = done.stderr.strip().splitlines()[-1]
        assert (done.returncode, line.partition(";")[0]) == (
            2,
            "error: --prompt 'Call me Ishmael.': the prompt is text, but the model has no tokenizer",
        )
        assert hub.fetched() == OLMOE.keys()
        asked = len(hub.requests)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert cli.main(command) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1] == line
        assert len(hub.requests) == asked
