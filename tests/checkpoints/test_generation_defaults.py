"""Settings that a checkpoint recommends, from the files as they are published."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerscope_jax.checkpoints.generation_defaults import NUMBERS, WHOLE, generation_defaults
from layerscope_jax.checkpoints.model import load

GOLDEN = Path(__file__).parents[1] / "golden" / "olmoe"


@pytest.mark.parametrize(
    ("file", "defaults"),
    [
        ({}, {}),
        ({"eos_token_id": [1, 2], "pad_token_id": 0, "transformers_version": "5.24.0"}, {}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 3},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        ),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 1, "min_p": 0.05}, {"temperature": 1, "min_p": 0.05}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
        ({"temperature": 0.6, "top_k": 50}, {}),  # without do_sample, transformers takes the likeliest token
        ({"do_sample": None, "temperature": None, "max_new_tokens": None}, {}),
        (
            {"repetition_penalty": 1.05, "max_new_tokens": 2048, "min_new_tokens": 1},
            {"max_new_tokens": 2048, "min_new_tokens": 1, "repetition_penalty": 1.05},
        ),
        ({"max_length": 4096, "num_beams": 1, "suppress_tokens": [3], "typical_p": 1.0}, {}),
    ],
)
def test_files_as_they_are_published(file, defaults):
    assert generation_defaults(file) == defaults


@pytest.mark.parametrize("value", ["0.7", True, [1], -2, 2.5e9])
@pytest.mark.parametrize("name", [*WHOLE, *NUMBERS])
def test_what_is_out_of_range_is_refused_even_if_it_is_not_used(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a (whole )?number .*; correct it, or remove it"):
        generation_defaults({name: value})


def test_everything_wrong_is_said_at_once():
    with pytest.raises(ValueError, match=r"do_sample must be .*; top_k must be .*; top_p must be ") as raised:
        generation_defaults({"do_sample": "yes", "top_k": 0.5, "top_p": 0})
    assert "do_sample must be true or false, got 'yes'" in str(raised.value)


@given(
    st.dictionaries(
        st.sampled_from([*WHOLE, *NUMBERS, "do_sample", "num_beams"]), st.integers() | st.floats()
    )
)
def test_whatever_is_taken_is_a_setting_in_range(file):
    try:
        defaults = generation_defaults(file)
    except ValueError:
        return
    assert defaults.keys() <= WHOLE.keys() | NUMBERS.keys()
    assert generation_defaults(defaults | {"do_sample": True}) == {"temperature": 1.0} | defaults


def test_a_loaded_model_has_them(tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "model")
    assert load(folder).generation_defaults == {}
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "top_p": 0.9, "eos_token_id": 5}))
    model = load(folder)
    assert model.generation_defaults == {"temperature": 1.0, "top_p": 0.9}
    assert model.config.stop_token_ids == (5,)
    file.write_text(json.dumps({"top_p": 9, "eos_token_id": 10**6}))
    with pytest.raises(
        ValueError, match=r"generation_config\.json: .*1000000.*; top_p must be a number in \(0, 1\]"
    ):
        load(folder)
