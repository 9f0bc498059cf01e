"""Weights on a hub on this machine that one process begins to download and another one has."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import NAME, Hub, serving

from layerscope_jax.checkpoints.hub import folder_of

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "olmoe"
OLMOE = {name: (GOLDEN / name).read_bytes() for name in ("config.json", "model.safetensors")}
WEIGHTS = "model.safetensors"
SIZE = len(OLMOE[WEIGHTS])
HALF = SIZE // 2
CHUNK = 10_000

PROCESS = f"""
import sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}
from layerscope_jax.checkpoints.hub import folder_of
print(folder_of(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@contextmanager
def another_process(hub, cache):
    """A process that downloads the checkpoint into the same cache; killed at the end if it still runs."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(cache),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, "-c", PROCESS, NAME]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process, condition):
    """Returns when a condition holds, which the process brings about."""
    while not condition():
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"the process ended: {process.stderr.read().decode()[-2000:]}")


def begun(cache):
    """The file that holds what came of the weights, and its size; None if there is no such file."""
    for file in cache.rglob("*.incomplete"):
        if file.stat().st_size > len(OLMOE["config.json"]):
            return file, file.stat().st_size
    return None


def killed_half_way(cache):
    """Has a process killed while it downloads the weights; returns its partial file and how much it holds."""
    with serving(Hub(OLMOE, pauses={WEIGHTS: HALF})) as hub, another_process(hub, cache) as process:
        wait_for(process, lambda: (begun(cache) or (None, 0))[1] > HALF - 2 * CHUNK)
        process.kill()
        process.wait()
    file, size = begun(cache)
    assert HALF - 2 * CHUNK < size <= HALF
    return file, size


def only_whole_files(cache):
    return not list(cache.rglob("*.incomplete"))


def test_a_later_process_continues_what_a_killed_one_began(cache):
    _, size = killed_half_way(cache)
    with serving(Hub(OLMOE)) as hub:
        folder = folder_of(NAME)
        assert hub.ranges(WEIGHTS) == [f"bytes={size}-"]
        assert hub.sent[WEIGHTS] == SIZE - size
        assert "config.json" not in hub.sent
    assert (folder / WEIGHTS).read_bytes() == OLMOE[WEIGHTS]
    assert (folder / WEIGHTS).is_symlink()
    assert only_whole_files(cache)
    (repo,) = huggingface_hub.scan_cache_dir(cache).repos  # as other tools see the cache
    assert [revision.commit_hash for revision in repo.revisions] == [folder.name]


def test_a_file_that_changed_in_between_is_fetched_whole(cache):
    killed_half_way(cache)
    changed = OLMOE | {WEIGHTS: OLMOE[WEIGHTS][::-1]}
    newer = "f" * 40
    with serving(Hub(changed, {"main": newer, newer: newer})) as hub:
        folder = folder_of(NAME)
        assert hub.ranges(WEIGHTS) == [None]
    assert folder.name == newer
    assert (folder / WEIGHTS).read_bytes() == changed[WEIGHTS]


@pytest.mark.parametrize("trouble", ["one bit", "too long", "whole but wrong"])
def test_a_partial_file_that_is_wrong_is_dropped(cache, trouble):
    file, size = killed_half_way(cache)
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(
        {"one bit": content, "too long": bytes(SIZE + 1), "whole but wrong": bytes(SIZE)}[trouble]
    )
    with serving(Hub(OLMOE)) as hub:
        folder = folder_of(NAME)
        assert hub.ranges(WEIGHTS) == ([f"bytes={size}-"] if trouble == "one bit" else []) + [None]
    assert (folder / WEIGHTS).read_bytes() == OLMOE[WEIGHTS]
    assert only_whole_files(cache)


def test_a_server_that_knows_no_ranges_sends_all(cache):
    killed_half_way(cache)
    with serving(Hub(OLMOE, ranges_served=False)) as hub:
        assert (folder_of(NAME) / WEIGHTS).read_bytes() == OLMOE[WEIGHTS]
        assert hub.sent[WEIGHTS] == SIZE
    assert only_whole_files(cache)


def test_bytes_that_are_not_the_listed_ones_are_no_checkpoint(cache):
    with (
        serving(Hub(OLMOE, wrong={WEIGHTS})),
        pytest.raises(ValueError, match="another SHA-256 than the hub lists"),
    ):
        folder_of(NAME)
    assert only_whole_files(cache)
    assert not list(cache.rglob(WEIGHTS))


def test_two_processes_download_once(cache):
    with serving(Hub(OLMOE, pauses={WEIGHTS: HALF})) as hub, another_process(hub, cache) as first:
        wait_for(first, lambda: hub.sent[WEIGHTS])
        listed = len(hub.requests)
        with another_process(hub, cache) as second:
            wait_for(second, lambda: any("/tree/" in path for _, path, _ in hub.requests[listed:]))
            hub.go.set()
            folders = {process.communicate()[0].decode().strip() for process in (first, second)}
        assert hub.sent[WEIGHTS] == SIZE
        assert hub.ranges(WEIGHTS) == [None]
    (folder,) = folders
    assert (Path(folder) / WEIGHTS).read_bytes() == OLMOE[WEIGHTS]
    assert only_whole_files(cache)


def test_who_waits_takes_over_when_the_other_is_killed(cache):
    with serving(Hub(OLMOE, pauses={WEIGHTS: HALF})) as hub, another_process(hub, cache) as first:
        wait_for(first, lambda: (begun(cache) or (None, 0))[1] > HALF - 2 * CHUNK)
        listed = len(hub.requests)
        with another_process(hub, cache) as second:
            wait_for(second, lambda: any("/tree/" in path for _, path, _ in hub.requests[listed:]))
            first.kill()
            first.wait()
            hub.go.set()
            folder = second.communicate()[0].decode().strip()
        assert hub.ranges(WEIGHTS)[0] is None
        assert hub.ranges(WEIGHTS)[1].startswith("bytes=1")
    assert (Path(folder) / WEIGHTS).read_bytes() == OLMOE[WEIGHTS]
    assert only_whole_files(cache)
