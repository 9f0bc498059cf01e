"""An expert with biases is four arrays, on the link, in the bank and for whoever computes it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, bits, random_decoder
from links import A, B, Link, collect, right

from layerscope_jax import ExpertBank, ExpertId, Model
from layerscope_jax.formats import PlainFormat
from layerscope_jax.models.experts import BiasedWeights, ExpertBody
from layerscope_jax.offload.link import Transfers

BODY = ExpertBody("clamped", bias=True, limit=0.7)
CONFIG = replace(TINY, expert_body=BODY)
NAMES = BiasedWeights._fields


@pytest.fixture(scope="module")
def decoder():
    return random_decoder(CONFIG)


@pytest.fixture(scope="module")
def bank(decoder):
    return Model.from_decoder(decoder).bank


def test_the_bank_holds_and_stacks_them(decoder, bank):
    assert bank.format == PlainFormat("float32", BODY)
    assert bank.expert_bytes == 4 * (3 * 32 * 20 + 2 * 20 + 32)
    for layer, stacks in enumerate(decoder.experts[layer].weights() for layer in range(CONFIG.num_layers)):
        assert stacks._fields == NAMES
        for array, again in zip(stacks, bank.stacked(layer), strict=True):
            np.testing.assert_array_equal(array, again)
        for name in NAMES:
            np.testing.assert_array_equal(getattr(bank[ExpertId(layer, 3)], name), getattr(stacks, name)[3])


def test_a_decoder_is_read_layer_by_layer_once(decoder, monkeypatch):
    read = []
    whole = np.asarray
    monkeypatch.setattr(np, "asarray", lambda array, *others: (read.append(array), whole(array, *others))[1])
    Model.from_decoder(decoder)
    stacks = [array for array in read if isinstance(array, jax.Array) and array.shape[:1] == (8,)]
    assert len(stacks) == len(NAMES) * CONFIG.num_layers


def test_each_array_is_a_chunk_of_the_link(bank, monkeypatch):
    monkeypatch.setattr("links.NAMES", NAMES)
    link = Link(bank, gated=True)
    transfers = Transfers(bank, jax.devices()[0], None, link)
    transfers.ahead = 0
    transfers.submit([], [A])
    link.until_begun(1)
    transfers.submit([B], [])  # waits for the one chunk that has begun
    link.allow(8)
    arrived = collect(transfers, [A, B])
    assert link.begun == [(A, "gate"), *((B, name) for name in NAMES), *((A, name) for name in NAMES[1:])]
    assert right(bank, arrived)
    assert transfers.stats.demand_bytes == transfers.stats.prefetch_bytes == bank.expert_bytes
    transfers.close()


def test_a_bank_is_converted_with_its_biases_and_its_body(bank):
    wide = bank.converted(PlainFormat("bfloat16"))  # which computes SwiGLU
    assert wide.format == PlainFormat("bfloat16", BODY)
    assert wide.expert_bytes == bank.expert_bytes // 2
    for one, other in zip(bank[A], wide[A], strict=True):
        np.testing.assert_array_equal(bits(np.asarray(one).astype(jnp.bfloat16)), bits(other))


def test_a_bank_without_a_format_says_that_it_does_not_know_their_body(bank):
    with pytest.raises(ValueError, match="experts with biases needs format="):
        ExpertBank(bank.layers)
