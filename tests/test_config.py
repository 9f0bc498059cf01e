"""Sizes in bytes, as people write them."""

import pytest

from layerscope_jax import OffloadConfig, parse_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("8GiB", 2**33),
        ("500 MB", 500_000_000),
        (" 1.5 KiB ", 1536),
        ("0", 0),
        ("7", 7),
        ("7B", 7),
        ("2TB", 2 * 10**12),
        ("9007199254740993", 9007199254740993),
        (12, 12),
        (2**63 - 1, 2**63 - 1),
    ],
)
def test_sizes(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize(
    "size", ["", "GiB", "8 Gb", "8gib", "-1", "1e9", "1.5.2MB", "inf", "٣MB", None, 2.0, True, -3]
)
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match="budget must be a size such as"):
        parse_bytes(size, "budget")


@pytest.mark.parametrize("size", ["9" * 400 + "TiB", "8388608TiB", 2**63, 10**400])
def test_no_size_is_past_what_64_bits_count(size):
    with pytest.raises(ValueError, match=r"budget must be less than 2\*\*63 bytes, got .{1,40}$"):
        parse_bytes(size, "budget")


@pytest.mark.parametrize("chunk", [0, 15, -16])
def test_a_chunk_holds_at_least_a_short_prompt(chunk):
    with pytest.raises(ValueError, match=f"prefill_chunk_size must be 16 tokens or more, got {chunk}"):
        OffloadConfig(prefill_chunk_size=chunk)
