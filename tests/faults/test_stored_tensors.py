"""Which tensors a folder holds: the ones that its index means, whole, and none of another file or size."""

import json
import os
import shutil
import time

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import SMALLEST as CONFIG
from helpers import in_time, random_decoder
from sharded import INDEX, sharded, tensors, write

from layerscope_jax import ModelConfig, load, save
from layerscope_jax.checkpoints import safetensors_io
from layerscope_jax.checkpoints.weight_names import Naming

pytestmark = pytest.mark.usefixtures("quick_compiles")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROUTER = "model.layers.1.mlp.gate.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(random_decoder(CONFIG), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(saved, tmp_path / "model")


def change(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def router(model):
    return np.asarray(model.dense["layers"][1]["router"]["weight"])


# Which file


@pytest.mark.parametrize("first", ["an-overlay", "zz-overlay"])
def test_the_index_says_which_of_two_files_holds_a_tensor(folder, first):
    """Whatever their names' order."""
    new = {ROUTER: np.full((4, 16), 7, np.float32)}
    names = sharded(folder, new)
    os.rename(folder / "an-overlay.safetensors", folder / f"{first}.safetensors")
    names[ROUTER] = f"{first}.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    np.testing.assert_array_equal(router(load(folder)), new[ROUTER])


def test_a_tensor_that_the_index_does_not_name_is_passed_over(folder):
    sharded(folder, {ROUTER: np.zeros((4, 16), np.float32)}, another=np.zeros(3, np.float32))
    with pytest.warns(
        UserWarning, match=r"does not name 1 tensors of its shards, which are passed over: anot"
    ):
        load(folder)


def test_tensors_that_are_not_where_the_index_says_are_named(folder):
    names = sharded(folder)
    other = {"part-0.safetensors": "part-1.safetensors", "part-1.safetensors": "part-0.safetensors"}
    names |= {ROUTER: other[names[ROUTER]], "made.up": "part-0.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(
        ValueError, match=r"2 tensors are not in the files that it names: made\.up in part-0"
    ) as e:
        load(folder)
    assert f"{ROUTER} in {names[ROUTER]}" in str(e.value)


@pytest.mark.parametrize("path", ["../model.safetensors", "a/../../b", "/etc/passwd", "", "..", "a\0b"])
def test_an_index_stays_in_its_folder(folder, path):
    names = sharded(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": names | {ROUTER: path}}))
    with pytest.raises(ValueError, match=r"weight_map: expected files inside its folder"):
        load(folder)


def test_one_file_goes_before_an_index(folder):
    held = tensors(folder)
    sharded(folder)
    write(folder, "model.safetensors", held | {ROUTER: np.full((4, 16), 3, np.float32)})
    with pytest.warns(
        UserWarning, match=r"model\.safetensors alone is read, as by transformers, and not part-0"
    ):
        model = load(folder)
    assert (router(model) == 3).all()


def test_an_index_of_the_one_file_says_nothing_new(folder):
    names = dict.fromkeys(tensors(folder), "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    load(folder)


def test_shards_need_no_index_if_they_share_no_tensor(folder):
    expected = tensors(folder)[ROUTER]
    sharded(folder)
    (folder / INDEX).unlink()
    (folder / "._part-0.safetensors").write_bytes(b"a file manager's own")
    np.testing.assert_array_equal(router(load(folder)), expected)
    write(folder, "part-2.safetensors", {ROUTER: np.zeros((4, 16), np.float32)})
    with pytest.raises(ValueError, match=rf"expected each tensor in one file, .* got {ROUTER} in part-\d"):
        load(folder)


# Head and embedding


@pytest.fixture
def tied(tmp_path):
    save(random_decoder(ModelConfig(**vars(CONFIG) | {"tie_embeddings": True})), tmp_path / "tied")
    return tmp_path / "tied"


def test_a_head_that_differs_from_the_embedding_is_used(tied, tmp_path):
    held = tensors(tied)
    write(tied, "model.safetensors", held | {HEAD: held[EMBEDDING] + 1})
    with pytest.warns(
        UserWarning, match=r"lm_head\.weight and model\.embed_tokens\.weight differ; both are used"
    ):
        model = load(tied)
    np.testing.assert_array_equal(np.asarray(model.dense["head"]), held[EMBEDDING] + 1)
    np.testing.assert_array_equal(model.dense["embedding"], held[EMBEDDING])
    save(model, tmp_path / "again")
    again = load(tmp_path / "again")
    np.testing.assert_array_equal(again.dense["head"], model.dense["head"])


def test_one_value_in_the_last_piece_makes_another_head(tied, monkeypatch):
    monkeypatch.setattr(safetensors_io, "PIECE", 100)
    held = tensors(tied)
    head = held[EMBEDDING].copy()
    write(tied, "model.safetensors", held | {HEAD: head})
    assert "head" not in load(tied).dense
    head[-1, -1] += 1
    write(tied, "model.safetensors", held | {HEAD: head})
    with pytest.warns(UserWarning, match="differ"):
        assert "head" in load(tied).dense


def test_a_head_alone_is_the_embedding_too(tied, tmp_path):
    held = tensors(tied)
    embedding = held.pop(EMBEDDING)
    write(tied, "model.safetensors", held | {HEAD: embedding})
    model = load(tied)
    assert model.config.tie_embeddings
    np.testing.assert_array_equal(model.dense["embedding"], embedding)
    save(model, tmp_path / "again")
    assert tensors(tmp_path / "again").keys() == held.keys() | {EMBEDDING}


# Sizes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: expected 1000000 layers, found tensors of 2"),
        (
            {"num_experts": 10**7},
            r"expected shape \[10000000, 16\] \(num_experts, hidden_size\), found \[4, 16\]",
        ),
        ({"vocab_size": 2**31 - 1}, r"\(vocab_size, hidden_size\), found \[32, 16\]"),
        ({"hidden_size": 2**30, "head_dim": 2**29}, r"\(num_attention_heads \* head_dim, hidden_size\)"),
        (
            {"num_experts": 10**12},
            "num_experts: expected a whole number from 1 to 2147483647, got 1000000000000",
        ),
        (
            {"max_position_embeddings": 10**12},
            "max_position_embeddings: expected a whole number from 1 to 10737",
        ),
        ({"num_experts": 10**4000}, "num_experts: .* got a whole number of more than 60 digits"),
        (
            {"intermediate_size": 2**31 - 1},
            r"experts\.0\.gate_proj\.weight: expected shape \[2147483647, 16\]",
        ),
    ],
)
def test_sizes_that_the_tensors_do_not_have_are_refused_before_anything_is_made(folder, settings, words):
    change(folder, **settings)
    began = time.process_time()
    with pytest.raises(ValueError, match=words):
        in_time(lambda: load(folder), 60)
    assert time.process_time() - began < 30  # a decoder of a million layers takes hours


def test_a_size_is_refused_though_the_tensor_that_says_so_is_missing(folder, monkeypatch):
    monkeypatch.setattr(Naming, "of", None)
    change(folder, num_experts=10**7)
    held = tensors(folder)
    for layer in range(2):
        del held[f"model.layers.{layer}.mlp.gate.weight"]
    write(folder, "model.safetensors", held)
    with pytest.raises(ValueError, match=r"\(num_experts, hidden_size\), found no such tensor"):
        load(folder)


def test_the_longest_context_is_none_of_the_caches(folder):
    from layerscope_jax import Engine, OffloadConfig

    change(folder, max_position_embeddings=2**30)
    with Engine(load(folder), OffloadConfig(policy="host-only")) as engine:
        assert len(engine.generate([[1, 2, 3]], max_new_tokens=2).token_ids[0]) <= 2


# Files


def test_a_file_that_is_written_over_while_it_is_read_is_named(folder):
    stored = safetensors_io.stored_tensors(folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[stored[ROUTER].start] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(0, 0))
    with pytest.raises(ValueError, match=r"model\.safetensors was changed while it was read"):
        stored[ROUTER].read()


def test_a_file_that_is_replaced_or_gone_while_it_is_read_is_named(folder):
    stored = safetensors_io.stored_tensors(folder)
    file = folder / "model.safetensors"
    os.rename(file, folder / "old")
    with pytest.raises(ValueError, match=r"model\.safetensors: No such file or directory while it was read"):
        stored[ROUTER].read()
    file.write_bytes((folder / "old").read_bytes())
    with pytest.raises(ValueError, match="was changed while it was read"):
        stored[ROUTER].read()


def header(entries, data=b"", length=None):
    text = json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        header({"a": ONE | {"data_offsets": [0, 4]}}, bytes(4)),
        header({"a": ONE | {"data_offsets": [8, 0]}}, bytes(8)),
        header({"a": ONE | {"data_offsets": [-8, 0]}}, bytes(8)),
        header({"a": ONE | {"dtype": "F33"}}, bytes(8)),
        header({"a": ONE | {"shape": [2**63, 2**63]}}, bytes(8)),
        header({"a": ONE | {"shape": [-2]}}, bytes(8)),
        header({"a": ONE, "b": ONE}, bytes(8)),
        header({"a": ONE}, bytes(12)),
        header({"a": ONE}, bytes(8), length=2**62),
        header({"a": {}}, b""),
        header([1]),
        bytes(8),
        b"",
        (20).to_bytes(8, "little") + b"[" * 20,
        (100_000).to_bytes(8, "little") + b'{"a":' * 20_000,
    ],
)
def test_a_header_that_does_not_fit_is_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a complete safetensors file"):
        load(folder)


def test_a_header_that_changes_after_it_was_checked_is_refused(folder, monkeypatch):
    file = folder / "model.safetensors"
    check = safetensors.safe_open

    def swapped(*arguments, **settings):
        opened = check(*arguments, **settings)
        file.write_bytes(header({"a": {"dtype": "F32"}}))
        return opened

    monkeypatch.setattr(safetensors, "safe_open", swapped)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a complete safetensors file"):
        load(folder)


def test_a_tensor_without_numbers_is_one_of_another_shape(folder):
    write(folder, "model.safetensors", tensors(folder) | {"model.norm.weight": np.zeros((0,), np.float32)})
    assert safetensors_io.stored_tensors(folder)["model.norm.weight"].read().shape == (0,)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: expected shape \[16\], found \[0\]"):
        load(folder)


def test_links_are_followed_and_those_to_nowhere_named(folder):
    expected = tensors(folder)[ROUTER]
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for name in ("model.safetensors", "config.json"):
        os.rename(folder / name, blobs / name)
        (folder / name).symlink_to(blobs / name)
    np.testing.assert_array_equal(router(load(folder)), expected)
    for name in ("tokenizer.json", "generation_config.json", "model.safetensors"):
        (blobs / name).unlink(missing_ok=True)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(blobs / name)
        with pytest.raises(
            ValueError, match=f"{name}: expected a file, got a link to .*, which is not there"
        ):
            load(folder)
        if name != "model.safetensors":
            (folder / name).unlink()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
def test_a_folder_in_the_place_of_a_file_is_named(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}: expected a"):
        load(folder)


def test_a_file_in_the_place_of_a_folder_is_named(folder):
    with pytest.raises(ValueError, match=r"config\.json: expected a folder with config\.json"):
        load(folder / "config.json")


def test_a_pipe_is_not_waited_for(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"model\.safetensors: expected a safetensors file, got a folder, pipe"
    ):
        in_time(lambda: load(folder), 30)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_files_that_may_not_be_read_are_named(folder, monkeypatch, name):
    """By an error of the system's, for root may read everything."""
    opened = type(folder).open

    def refused(path, *arguments, **settings):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **settings)

    monkeypatch.setattr(type(folder), "open", refused)
    with pytest.raises(ValueError, match=rf"{name}: expected a file that can be read, got Permission denied"):
        load(folder)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_matrices_of_one_row_keep_their_numbers(tmp_path, dtype):
    """They lie the same when turned, so that JAX may take over the memory that others are read into."""
    config = ModelConfig(
        **vars(CONFIG) | {"num_experts": 1, "experts_per_token": 1, "moe_intermediate_size": 1}
    )
    decoder = random_decoder(config)
    save(decoder, tmp_path)
    model = load(tmp_path, dtype=dtype)
    kind = jnp.dtype(dtype or "float32")
    for layer in range(2):
        expected = decoder.layers[layer].router.weight[...].astype(kind)
        np.testing.assert_array_equal(model.dense["layers"][layer]["router"]["weight"], expected)
        for matrix in ("gate", "up", "down"):
            expected = getattr(decoder.experts[layer], matrix)[...][0].astype(kind)
            np.testing.assert_array_equal(getattr(model.bank.layers[layer][0], matrix), expected)
