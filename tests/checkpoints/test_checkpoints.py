"""Loading and saving: bit for bit, in the right memory, and all that is wrong with a folder said at once."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from helpers import SMALLEST, random_decoder
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from layerscope_jax.checkpoints import safetensors_io
from layerscope_jax.checkpoints.model import Model, load
from layerscope_jax.checkpoints.saving import save
from layerscope_jax.checkpoints.weight_names import plain_names
from layerscope_jax.models import Decoder
from layerscope_jax.scheduling.plan import ExpertId

pytestmark = pytest.mark.usefixtures("quick_compiles")

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(file.parent.name for file in GOLDEN.glob("*/golden.npz"))
DTYPES = ["float32", "bfloat16", "float16"]
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


TINY = replace(SMALLEST, num_kv_heads=2, head_dim=8)


def tiny(dtype=jnp.float32, **changes):
    """A random model, for which nothing is compiled."""
    return random_decoder(replace(TINY, **changes), dtype=dtype)


def bits(tree):
    """Every array of a tree as unsigned integers, so that equal means bit for bit."""
    arrays = (np.asarray(leaf) for leaf in jax.tree.leaves(tree))
    return [(a.shape, a.dtype, a.view(f"u{a.dtype.itemsize}").tolist()) for a in arrays]


def all_of(decoder):
    return bits(nnx.to_pure_dict(nnx.state(decoder)))


def tensors_of(folder):
    """Every tensor of a folder, by the safetensors package: an eye of its own on what we wrote."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: array for file in files for name, array in safetensors.numpy.load_file(file).items()}


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint in float32, freshly saved."""
    save(tiny(), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, **changes):
    """Replaces, adds or (None) takes away tensors of a folder."""
    tensors = tensors_of(folder) | changes
    kept = {name: array for name, array in tensors.items() if array is not None}
    safetensors.numpy.save_file(kept, folder / "model.safetensors")


# Round trips


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, dtype):
    decoder = tiny(jnp.dtype(dtype))
    save(decoder, tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == decoder.config
    assert loaded.path == tmp_path
    assert loaded.bank.dtype == dtype
    assert all_of(loaded.whole()) == all_of(decoder)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("case", CASES)
def test_saving_a_checkpoint_of_transformers_gives_the_same_tensors(tmp_path, case):
    save(load(GOLDEN / case), tmp_path)
    written, original = tensors_of(tmp_path), plain_names(tensors_of(GOLDEN / case))
    original = {name: array for name, array in original.items() if not name.startswith("model.visual.")}
    assert written.keys() == original.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)
    assert load(tmp_path).config == load(GOLDEN / case).config


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", ["save", "load"])
def test_converts_to_another_dtype(tmp_path, dtype, stage):
    decoder = tiny()
    save(decoder, tmp_path, dtype=dtype if stage == "save" else None)
    loaded = load(tmp_path, dtype=dtype if stage == "load" else None)
    expected = jax.tree.map(lambda a: a.astype(dtype), nnx.to_pure_dict(nnx.state(decoder)))
    assert all_of(loaded.whole()) == bits(expected)


def test_a_model_of_a_decoder_computes_the_same(tmp_path):
    decoder = Decoder(TINY, rngs=nnx.Rngs(0))  # as the training code makes them
    save(decoder, tmp_path)
    tokens = jnp.arange(10).reshape(2, 5)
    compute = nnx.jit(lambda decoder: decoder(tokens)[0])
    expected = compute(decoder)
    for model in (Model.from_decoder(decoder), load(tmp_path)):
        np.testing.assert_array_equal(compute(model.whole()), expected)


def test_shards_may_part_the_matrices_of_an_expert(folder):
    expected = all_of(load(folder).whole())
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"part-{number % 3}.safetensors" for number, name in enumerate(sorted(tensors))}
    assert len({weight_map[EXPERT.replace("down", matrix)] for matrix in ("gate", "up", "down")}) == 3
    for shard in set(weight_map.values()):
        part = {name: array for name, array in tensors.items() if weight_map[name] == shard}
        safetensors.numpy.save_file(part, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert all_of(load(folder).whole()) == expected

    (folder / "part-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing: part-1\.safetensors; download or copy"):
        load(folder)


@pytest.mark.parametrize(
    ("named", "expected"), [("float16", "float16"), ("float32", "float32"), (None, None)]
)
def test_tensors_of_several_dtypes_become_the_one_that_the_config_names(folder, named, expected):
    rewrite(folder, **{EXPERT: tensors_of(folder)[EXPERT].astype(np.float16)})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": named}
    (folder / "config.json").write_text(json.dumps(config))
    if expected is None:
        with pytest.raises(ValueError, match="F16, F32 and the dtype None; choose a dtype with dtype="):
            load(folder)
        expected = "float32"
        model = load(folder, dtype=expected)
    else:
        model = load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves((model.dense, model.bank.layers))} == {np.dtype(expected)}


def test_tokenizer_and_stop_tokens_come_along(folder):
    assert load(folder).tokenizer is None
    Tokenizer(WordLevel({"hello": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    model = load(folder)
    assert model.tokenizer.encode("hello").ids == [0]
    assert model.config.stop_token_ids == (3, 4)


# Memory


def test_experts_lie_in_pinned_host_memory_and_the_rest_on_the_device(folder):
    model = load(folder, mmap=False)
    kinds = lambda tree: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}  # noqa: E731
    assert kinds(model.bank.layers) == {"pinned_host"}
    assert kinds(model.dense) == {"device"}
    assert kinds(nnx.to_pure_dict(nnx.state(model.whole()))) == {"device"}


def test_loads_beside_the_device_that_is_asked_for(folder):
    device = jax.devices()[-1]
    assert device != jax.devices()[0], "conftest.py asks for several CPU devices"
    model = load(folder, device=device, mmap=False)
    assert {leaf.device for leaf in jax.tree.leaves((model.dense, model.bank.layers))} == {device}


def test_views_of_experts_are_the_pinned_memory_itself(folder):
    bank = load(folder, mmap=False).bank
    expert = ExpertId(1, 3)
    for view, matrix in zip(bank.views(expert), bank[expert], strict=True):
        assert view.ctypes.data == matrix.unsafe_buffer_pointer()
        assert view.flags.c_contiguous
    np.testing.assert_array_equal(bank.views(expert)[2], tensors_of(folder)[EXPERT])


def test_only_one_tensor_is_in_memory_beside_the_model(folder, monkeypatch):
    array_of = safetensors_io.StoredTensor.array
    alive, counts = weakref.WeakValueDictionary(), []

    def counted(tensor, buffer):
        array = array_of(tensor, buffer)
        if sorted(tensor.shape) == [16, 24]:  # an expert's
            alive[tensor.start] = array
            counts.append(len(alive))
        return array

    monkeypatch.setattr(safetensors_io.StoredTensor, "array", counted)
    bank = load(folder).bank
    assert len(counts) == 2 * 4 * 3
    views = [np.asarray(view) for expert in bank for view in bank.views(expert)]
    # JAX 0.9 keeps the memory that was read into: then it is the model's own.
    own = sum(any(np.shares_memory(array, view) for view in views) for array in alive.values())
    assert max(counts) <= own + 2  # JAX may let go of the last one a moment late


# What can be wrong with a folder


def test_every_wrong_tensor_is_named_at_once(folder):
    router = "model.layers.0.mlp.gate.weight"
    rewrite(
        folder,
        **{
            EXPERT: None,
            "model.norm.weight": np.ones(17, np.float32),
            router: np.ones((4, 16), np.int8),
            "model.layers.2.mlp.gate.weight": np.ones((4, 16), np.float32),
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        },
    )
    with pytest.raises(ValueError, match=r"4 tensors do not match config\.json") as raised:
        load(folder)
    assert {line.strip() for line in str(raised.value).splitlines()[1:]} == {
        f"{EXPERT}: expected shape [16, 24], found no such tensor",
        "model.norm.weight: expected shape [16], found [17]",
        f"{router}: expected dtype F32, BF16, F16, found I8",
        "model.layers.2.mlp.gate.weight: expected no such tensor, found shape [4, 16]",
    }


def test_a_tied_head_may_be_there_twice_but_an_own_head_must_be_there(tmp_path):
    save(tiny(tie_embeddings=True), tmp_path)
    assert "lm_head.weight" not in tensors_of(tmp_path)
    rewrite(tmp_path, **{"lm_head.weight": tensors_of(tmp_path)["model.embed_tokens.weight"]})
    assert "head" not in load(tmp_path).dense
    save(tiny(), tmp_path)
    rewrite(tmp_path, **{"lm_head.weight": None})
    with pytest.raises(
        ValueError, match=r"1 tensors .*\n  lm_head.weight: expected shape \[32, 16\], found no"
    ):
        load(tmp_path)


def test_a_long_list_of_wrong_tensors_ends_with_their_number(tmp_path):
    save(tiny(num_experts=64), tmp_path)
    rewrite(tmp_path, **{name: None for name in tensors_of(tmp_path) if ".experts." in name})
    with pytest.raises(ValueError, match=r"(?s)384 tensors do not match .*and 284 more$") as raised:
        load(tmp_path)
    assert len(str(raised.value).splitlines()) == 102


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_file_that_was_cut_off_is_named(folder, kept):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(
        ValueError, match=r"model\.safetensors: expected a complete .* download or copy it again"
    ):
        load(folder)


def test_a_file_that_shrinks_while_it_is_read_is_named(folder):
    stored = safetensors_io.stored_tensors(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: stored[EXPERT].start + 8])
    with pytest.raises(ValueError, match=r"model\.safetensors was cut off"):
        stored[EXPERT].read()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, "config.json: expected this file, found none"),
        ("config.json", "{", "config.json: expected JSON"),
        ("config.json", "[]", "config.json: expected a JSON object, got list"),
        ("config.json", "{}", "config.json: expected one of the architectures"),
        ("generation_config.json", "nonsense", "generation_config.json: expected JSON"),
        ("model.safetensors", None, "found neither"),
        ("tokenizer.json", "{}", "tokenizer.json: expected a tokenizer"),
    ],
)
def test_a_bad_or_missing_file_is_named(folder, file, content, words):
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ValueError, match=words):
        load(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_bad_index_is_named(folder, index):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json: expected a 'weight_map'"):
        load(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: expected a folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["int8", "float64", "bf16"])
def test_other_dtypes_are_refused(folder, name):
    with pytest.raises(ValueError, match=f"dtype must be one of float32, bfloat16, float16, got '{name}'"):
        load(folder, dtype=name)


# Saves that fail


@pytest.mark.parametrize("before", [False, True], ids=["new folder", "over another checkpoint"])
def test_a_failing_save_leaves_nothing_half_written(folder, tmp_path, before):
    decoder = tiny()
    last = decoder.experts[1].down
    last[...] = last[...].at[3].set(1e30)
    target = tmp_path / "target"
    if before:
        shutil.copytree(folder, target)
    found = {file.name: file.read_bytes() for file in target.glob("*")}
    assert len(found) == (2 if before else 0)
    with pytest.raises(ValueError, match=f"{EXPERT} holds numbers too large for float16"):
        save(decoder, target, dtype="float16")
    assert {file.name: file.read_bytes() for file in target.glob("*")} == found


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write to .*file/model: "):
        save(tiny(), tmp_path / "file" / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 8}, r"sliding_window=8 \(it would become None\)"),
        ({"qk_norm": "head"}, r"qk_norm='head' \(it would become 'all'\)"),
        ({"head_dim": 16}, "head_dim: expected 8, got 16"),
        ({"family": "mixtral", "normalize_top_k": False, "qk_norm": "none"}, "normalize_top_k=False"),
        ({"family": "mixtral"}, "MixtralForCausalLM has no tensors for layers.0.attention.k_norm.scale"),
        ({"family": "gpt"}, "family must be one of olmoe, .*, got 'gpt'"),
    ],
)
def test_a_model_that_its_family_cannot_express_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        save(tiny(**changes), tmp_path / "model")
    assert not (tmp_path / "model").exists()
