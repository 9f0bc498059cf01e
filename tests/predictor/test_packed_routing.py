"""What is packed of a trace is its held-out routing, and what predictors say of just those tokens."""

import re
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import CHOICES, EXPERTS, LAYERS, MODEL, untrained, write_trace

from layerscope_jax.simulation.routing import Routing
from predictor.dataset import load_rows
from predictor.fitted import load_or_fit
from predictor.routers import Routers
from predictor.routing import MOST_ROWS, Packing, pack, requests_of

pytestmark = pytest.mark.usefixtures("quick_compiles")

PACKING = Packing(requests=8, decode_steps=4, prompt_tokens=(3, 8), kept=5, levels=51, gate_look_ahead=1)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write_trace(tmp_path_factory.mktemp("routing") / "trace")


@pytest.fixture(scope="module")
def packed(trace, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "small.npz"
    pack(trace, untrained(trace), PACKING, progress=False).save(path)
    return Routing.load(path)


def test_requests_are_heldout_passages_of_all_domains(trace, packed):
    assert packed.domains == ("letters", "verse") * 4
    assert packed.header["heldout_domains"] == ["letters"]
    assert len(set(packed.header["documents"])) == 8
    assert packed.prefill_lengths.min() >= 3
    assert packed.prefill_lengths.max() <= 8
    for request, document in enumerate(packed.header["documents"]):
        rows = load_rows(trace, lambda passage, document=document: passage.document == document)
        assert rows.passages[0].split == "heldout"
        length = packed.prefill_lengths[request]
        np.testing.assert_array_equal(packed.prefill_experts[request, :length], rows.experts[:length])
        np.testing.assert_array_equal(packed.decode_experts[:, request], rows.experts[length : length + 4])


def test_forecasts_are_of_the_decoded_tokens(trace, packed):
    llapor = untrained(trace)
    assert packed.forecasts["llapor"].experts.shape == (4, 8, LAYERS, 2, 5)
    assert packed.forecasts["gate"].experts.shape == (4, 8, LAYERS, 1, 5)
    request, step = 3, 2
    document, length = packed.header["documents"][request], packed.prefill_lengths[request]
    rows = load_rows(trace, lambda passage: passage.document == document)
    at = slice(length + step, length + step + 1)
    for layer, params in enumerate(llapor.params(Routers.load(trace.folder))):
        seen = (array[at, layer] for array in (rows.hidden, rows.experts, rows.weights))
        probabilities = np.asarray(llapor.predict_reduced(params, *map(jnp.asarray, seen)))[:, 0]  # [W, E]
        experts, kept = (part[step, request, layer] for part in packed.forecasts["llapor"])
        for horizon in range(2):
            true = np.sort(probabilities[horizon])[::-1][:5]
            np.testing.assert_allclose(probabilities[horizon, experts[horizon]], true, atol=1e-6)
            np.testing.assert_allclose(kept[horizon] / 255, true, atol=0.51 / 51)
            assert (kept[horizon] % (255 // 51) == 0).all()


def test_the_gate_says_nothing_of_the_next_step(packed):
    probabilities = packed.forecasts["gate"].probabilities
    assert (probabilities[:, :, -1] == 0).all()
    assert (probabilities[:, :, :-1].max(-1) > 0).all()


def test_recall_is_of_each_horizon(packed):
    recall = packed.header["recall"]
    assert recall["llapor"].keys() == recall["previous-token"].keys() == {"this_step", "next_step"}
    assert recall["gate"].keys() == {"this_step"}
    # The synthetic hidden states hardly change from layer to layer, and its tokens do not hang together.
    assert recall["gate"]["this_step"][0] > 0.6 > recall["previous-token"]["this_step"][0] > CHOICES / EXPERTS


def test_without_a_predictor_the_gate_forecasts(trace, packed):
    """The same requests, and of them just what needs no training."""
    alone = pack(trace, None, replace(PACKING, gate_look_ahead=9), progress=False)
    np.testing.assert_array_equal(alone.decode_experts, packed.decode_experts)
    np.testing.assert_array_equal(alone.prefill_experts, packed.prefill_experts)
    assert (*alone.forecasts, alone.look_ahead) == ("gate", LAYERS)
    assert alone.header["recall"].keys() == {"gate", "previous-token"}
    for here, there in zip(alone.forecasts["gate"], packed.forecasts["gate"], strict=True):
        np.testing.assert_array_equal(here[:, :, :, :1], there)


def test_a_linear_map_is_packed_beside_it(trace, packed, tmp_path):
    """For benchmarks, which ask what LLaPor is worth above it."""
    linear = load_or_fit(tmp_path, trace, (1, 2), 2000, progress=False).linear
    found = pack(trace, untrained(trace), PACKING, linear=linear, progress=False)
    assert set(found.forecasts) - set(packed.forecasts) == {"linear"}
    assert found.forecasts["linear"].experts.shape == packed.forecasts["llapor"].experts.shape
    assert found.header["recall"]["linear"]["this_step"][0] > 0.6  # it begins from the routers' own


def test_as_many_requests_as_there_are(trace):
    found, most = requests_of(trace, Packing(decode_steps=4, prompt_tokens=(3, 8)))
    assert (found, most) == (12, MOST_ROWS)
    assert requests_of(trace, Packing(requests=5, decode_steps=4, prompt_tokens=(3, 8)))[0] == 5


@pytest.mark.parametrize(
    ("packing", "settings", "said"),
    [
        (
            Packing(requests=64, decode_steps=4, prompt_tokens=(3, 8)),
            {"heldout_tokens": 9000},
            "expected 64 held-out passages of 12 tokens or more (the longest prompt and the decode steps), "
            "got 12 of 12; record about 624 held-out tokens more, some 2 kB of English text in documents of "
            "that length: within --heldout-tokens, which was 9,000, all of a domain in --heldout-domains",
        ),
        (
            Packing(),
            {},
            "expected 4 held-out passages of 128 tokens or more (the longest prompt and the decode steps), "
            "got 0 of 12; record about 512 held-out tokens more, some 2 kB of English text in documents of "
            "that length: all of a domain in --heldout-domains are held out, and of others about one "
            "document in 20; or ask for shorter requests (prompt_tokens, decode_steps): 4 passages have 16",
        ),
        (
            Packing(),
            {"length": 16},
            "record it anew in passages of that length, with --length (it was 16); or",
        ),
    ],
)
def test_too_few_passages_are_said(trace, packing, settings, said):
    trace = replace(trace, header=replace(trace.header, settings=settings))
    with pytest.raises(ValueError, match=re.escape(said)):
        pack(trace, None, packing, progress=False)


def test_experts_that_a_file_cannot_name_are_refused(trace):
    large = replace(trace, header=replace(trace.header, model=replace(MODEL, num_experts=257)))
    with pytest.raises(ValueError, match=r"at most 256 experts a layer, which .* can name, got 257"):
        pack(large, None, PACKING, progress=False)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(
        ValueError, match=r"decode_steps must be 1 or more, got 0; prompt_tokens must be two"
    ) as error:
        Packing(decode_steps=0, prompt_tokens=(8, 3), levels=20)
    assert "the smaller one first, got 8 and 3; levels must be a divisor of 255" in str(error.value)
