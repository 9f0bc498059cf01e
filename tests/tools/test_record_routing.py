"""What is packed of a trace is its held-out routing, and what predictors say of just those tokens."""

import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import CHOICES, EXPERTS, LAYERS, untrained, write_trace

from layerscope_jax.simulation.routing import Routing
from predictor.dataset import load_rows
from predictor.routers import Routers
from tools.record_routing import Packing, pack

pytestmark = pytest.mark.usefixtures("quick_compiles")

PACKING = Packing(requests=8, steps=4, prompt=(3, 8), kept=5, levels=51, gate_look_ahead=1)


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


def test_too_few_passages_are_said(trace):
    with pytest.raises(ValueError, match="expected 64 held-out passages of 12 tokens or more, got 12"):
        pack(trace, untrained(trace), Packing(steps=4, prompt=(3, 8)), progress=False)
    with pytest.raises(ValueError, match="expected held-out passages of 128 tokens or more, got none"):
        pack(trace, untrained(trace), Packing(), progress=False)
    with pytest.raises(ValueError, match="levels must be a divisor of 255, such as 15, 51 or 255, got 20"):
        pack(trace, untrained(trace), Packing(levels=20), progress=False)
    with pytest.raises(ValueError, match="prompt must be two lengths, the smaller one first, got 8 and 3"):
        pack(trace, untrained(trace), Packing(prompt=(8, 3)), progress=False)
