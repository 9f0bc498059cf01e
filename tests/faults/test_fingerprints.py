"""Checkpoints that compute something else have another fingerprint; those that lie otherwise do not."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import TINY, byte_tokenizer, random_model

from layerscope_jax.checkpoints import fingerprint as fingerprints
from layerscope_jax.checkpoints.fingerprint import SAMPLE_BYTES, SAMPLES, WHOLE, fingerprint
from layerscope_jax.checkpoints.identity import ModelIdentity, weights_digest
from layerscope_jax.offload.bank import ExpertBank

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tensors():
    """Small ones, a large one, and among experts one more that is as large as in a real model's tail."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    held = {"norm": draw(64), "router": draw(8, 64)}
    held |= {f"experts.{index}": draw(64, 512) for index in range(64)}
    assert held["experts.0"].nbytes > WHOLE > held["router"].nbytes
    return held


def write(folder, tensors, shards=1):
    folder.mkdir(exist_ok=True)
    for file in folder.glob("*"):
        file.unlink()
    names = {name: f"part-{number % shards}.safetensors" for number, name in enumerate(tensors)}
    for part in set(names.values()):
        held = {name: np.ascontiguousarray(tensors[name]) for name in tensors if names[name] == part}
        safetensors.numpy.save_file(held, folder / part)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    (folder / "config.json").write_text('{"a": 1}')
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def changed(array, at):
    array = array.copy()
    array.reshape(-1)[at] += 1
    return array


def test_every_tensor_counts(tensors, tmp_path):
    found = {fingerprint(write(tmp_path / "a", tensors))}
    changes = [tensors | {name: array + 1} for name, array in tensors.items()]
    changes += [
        tensors | {"norm": changed(tensors["norm"], -1)},
        tensors | {"router": changed(tensors["router"], 77)},
        tensors | {"experts.5": changed(tensors["experts.5"], -1)},
        tensors | {"norm": tensors["norm"].view(np.int32)},
        tensors | {"router": tensors["router"].reshape(64, 8)},
        {name.replace("norm", "nrom"): array for name, array in tensors.items()},
        {name: array for name, array in tensors.items() if name != "experts.63"},
        tensors | {"experts.0": tensors["experts.1"], "experts.1": tensors["experts.0"]},
    ]
    found |= {fingerprint(write(tmp_path / "a", other)) for other in changes}
    assert len(found) == 1 + len(changes)
    assert all(len(name) == 12 and int(name, 16) >= 0 for name in found)


def test_how_it_lies_does_not_count(tensors, tmp_path):
    found = fingerprint(write(tmp_path / "a", tensors))
    assert fingerprint(write(tmp_path / "b", dict(reversed(tensors.items())), shards=5)) == found
    (tmp_path / "b" / "left over.safetensors").write_bytes(b"what the index does not name")
    assert fingerprint(tmp_path / "b") == found


@pytest.mark.parametrize(
    ("name", "content", "counts"),
    [
        ("config.json", {"a": 2}, True),
        ("generation_config.json", {"eos_token_id": 3}, True),
        ("generation_config.json", {"temperature": 0.6, "transformers_version": "5"}, False),
        ("tokenizer_config.json", {"added_tokens_decoder": {"280": {"content": "<x>"}}}, True),
        ("tokenizer_config.json", {"tokenizer_class": "A"}, False),
    ],
)
def test_of_the_configs_what_changes_the_output_counts(tensors, tmp_path, name, content, counts):
    folder = write(tmp_path / "a", {"norm": tensors["norm"]})
    for file in ("generation_config.json", "tokenizer_config.json"):
        (folder / file).write_text("{}")
    before = fingerprint(folder)
    (folder / name).write_text(json.dumps(content))
    assert (fingerprint(folder) != before) == counts


def test_a_tokenizer_counts(tensors, tmp_path):
    folder = write(tmp_path / "a", {"norm": tensors["norm"]})
    before = fingerprint(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<more>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert fingerprint(folder) != before


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "vocab.json", "tokenizer_config.json", "added_tokens.json"]
)
def test_a_tokenizer_of_several_files_counts(tensors, tmp_path, name):
    folder = write(tmp_path / "a", {"norm": tensors["norm"]})
    (folder / "tokenizer.json").unlink()
    (folder / "tiktoken.model").write_bytes(b"YQ== 0")
    before = fingerprint(folder)
    (folder / name).write_text('{"add_bos_token": true}')
    assert fingerprint(folder) != before


def test_of_a_large_tensor_little_is_read(tensors, tmp_path, monkeypatch):
    folder, pread, read = write(tmp_path / "a", tensors), fingerprints.pread, []

    def counted(opened, size, start):
        read.append(size)
        return pread(opened, size, start)

    monkeypatch.setattr(fingerprints, "pread", counted)
    fingerprint(folder)
    small = [array.nbytes for array in tensors.values() if array.nbytes <= WHOLE]
    assert sorted(read) == sorted(small + [SAMPLE_BYTES] * SAMPLES * 64)


def test_every_array_of_a_model_in_memory_counts():
    """As traces need it: routers alone are the same in two models whose experts differ."""
    model = random_model(replace(TINY, num_layers=2, num_experts=3))
    found = {weights_digest(model)}
    dense = jax.tree.leaves(model.dense)
    for turn in range(len(dense)):
        leaves = [leaf.at[(-1,) * leaf.ndim].add(1) if turn == at else leaf for at, leaf in enumerate(dense)]
        tree = jax.tree.unflatten(jax.tree.structure(model.dense), leaves)
        found.add(weights_digest(replace(model, dense=tree)))
    for expert in model.bank:
        weights = model.bank[expert]
        layers = [list(layer) for layer in model.bank.layers]
        layers[expert.layer][expert.expert] = weights._replace(up=weights.up + 1)
        found.add(weights_digest(replace(model, bank=ExpertBank(tuple(map(tuple, layers))))))
    assert len(found) == 1 + len(dense) + 6
    assert ModelIdentity.of(model).routers == ModelIdentity.of(replace(model, path=None)).routers


def test_a_dtype_that_holds_the_same_numbers_is_the_same_model():
    model = random_model(replace(TINY, num_layers=1, num_experts=2), dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.dense)
    experts = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.bank.layers)
    assert weights_digest(replace(model, dense=wide, bank=ExpertBank(experts))) == weights_digest(model)


def test_what_cannot_be_loaded_has_none(tmp_path):
    with pytest.raises(ValueError, match="found neither"):
        fingerprint(tmp_path)
