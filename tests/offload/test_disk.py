"""Reads of experts from files: any range, with and without direct reads, and changed files."""

import ctypes
import os

import numpy as np
import pytest
from disk_models import on_disk
from helpers import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from links import random_bank

from layerscope_jax import ExpertId
from layerscope_jax.offload import disk
from layerscope_jax.offload.disk import File, Piece, aligned
from layerscope_jax.support.errors import ReadError
from layerscope_jax.support.files import state_of

SIZE = 3 * disk.BLOCK + 1234


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("disk") / "some.bin"
    content = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    content.tofile(path)
    return path, content


def piece_of(path, start, size):
    with path.open("rb") as opened:
        return Piece(path, start, size, (size,), np.dtype(np.uint8), state_of(opened.fileno()))


def read(piece, direct=True):
    with pytest.MonkeyPatch.context() as patch:
        if not direct:
            patch.setattr(disk, "DIRECT", 0)
        file = File(piece.file)
        assert direct or not file.direct
        memory = (ctypes.c_char * piece.size)()
        try:
            file.read(piece, memory, aligned(disk.CHUNK))
        finally:
            file.close()
    return np.frombuffer(memory, np.uint8)


@given(
    st.integers(0, SIZE - 1),
    st.integers(1, SIZE),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
    st.integers(1, SIZE),
)
@settings(deadline=None, max_examples=60)
def test_any_range_is_read_in_any_pieces(written, start, size, blocks, direct, most):
    """With small chunks, and reads that the system cuts short."""
    path, content = written
    size = min(size, SIZE - start)

    def short(number, memories, offset):
        return os.preadv(number, [memories[0][: max(disk.BLOCK, most - most % disk.BLOCK)]], offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "CHUNK", blocks * disk.BLOCK)
        patch.setattr(disk, "preadv", short)
        np.testing.assert_array_equal(
            read(piece_of(path, start, size), direct), content[start : start + size]
        )


@pytest.mark.parametrize("direct", [True, False])
def test_a_cut_or_changed_file_is_refused_by_its_name(tmp_path, direct):
    path = tmp_path / "shard.bin"
    path.write_bytes(bytes(3 * disk.BLOCK))
    piece = piece_of(path, 5, 2 * disk.BLOCK)
    os.truncate(path, disk.BLOCK + 100)
    with pytest.raises(ReadError, match=r"shard\.bin was cut off since it was loaded; load the model again"):
        read(piece, direct)
    path.write_bytes(bytes(4 * disk.BLOCK))
    with pytest.raises(ReadError, match=r"shard\.bin was changed since it was loaded"):
        read(piece, direct)
    path.unlink()
    with pytest.raises(ReadError, match=r"shard\.bin: No such file"):
        read(piece, direct)


def test_a_replaced_file_stays_readable_as_it_was(tmp_path):
    path = tmp_path / "shard.bin"
    path.write_bytes(b"old" * 100)
    piece, file, memory = piece_of(path, 3, 30), File(path), (ctypes.c_char * 30)()
    other = tmp_path / "other"
    other.write_bytes(b"new" * 100)
    other.replace(path)
    file.read(piece, memory, aligned(disk.CHUNK))
    assert bytes(memory) == b"old" * 10
    file.close()


def test_a_bank_on_the_disk_gives_the_experts_of_the_one_in_memory(tmp_path):
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Holder:
        bank: object
        device: object = None

    bank = random_bank()
    same = on_disk(Holder(bank), tmp_path).bank
    assert (same.expert_bytes, same.total_bytes, same.sizes) == (
        bank.expert_bytes,
        bank.total_bytes,
        bank.sizes,
    )
    assert list(same) == list(bank)
    for expert in (ExpertId(0, 0), ExpertId(1, 5)):
        for ours, theirs in zip(same[expert], bank[expert], strict=True):
            assert ours.sharding.memory_kind == "pinned_host"
            np.testing.assert_array_equal(bits(ours), bits(theirs))
    with pytest.raises(ValueError, match="experts='memory'"):
        same.converted(bank.format)
