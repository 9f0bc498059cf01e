"""A dense model dealt to experts computes what it computed before."""

import jax.numpy as jnp
import numpy as np
import pytest

from layerscope_jax import load
from tools.dense_to_moe import Dense, in_halves, write

pytestmark = pytest.mark.usefixtures("quick_compiles")

BYTES = ["<|end|>", *"abcdefgh"]
FIELDS = {
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 24,
    "llama.block_count": 2,
    "llama.context_length": 32,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e4,
    "llama.vocab_size": len(BYTES),
    "tokenizer.ggml.tokens": [*BYTES, "ab"],
    "tokenizer.ggml.token_type": [3, *[1] * len(BYTES)],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": "",
}
SHAPES = {
    "attn_norm": (16,),
    "ffn_norm": (16,),
    "attn_q": (16, 16),
    "attn_k": (8, 16),
    "attn_v": (8, 16),
    "attn_output": (16, 16),
    "ffn_gate": (24, 16),
    "ffn_up": (24, 16),
    "ffn_down": (16, 24),
}


class Tiny(Dense):
    """A model of random numbers, without a file."""

    def __init__(self, **changes):
        self.fields = FIELDS | {"llama.vocab_size": len(BYTES) + 1} | changes

    def __getitem__(self, key):
        return self.fields[key]

    def tensors(self):
        rng = np.random.default_rng(0)
        for layer in range(2):
            for name, shape in SHAPES.items():
                yield f"blk.{layer}.{name}", rng.standard_normal(shape).astype(np.float32)
        yield "token_embd", rng.standard_normal((len(BYTES) + 1, 16)).astype(np.float32)
        yield "output_norm", np.ones(16, np.float32)


def test_any_number_of_experts_computes_the_same(tmp_path):
    tokens, positions = jnp.array([[1, 2, 3, 9, 4]]), jnp.arange(5)[None]
    found = []
    for experts in (1, 4):
        write(Tiny(), experts, tmp_path / str(experts))
        model = load(tmp_path / str(experts), dtype="float32")
        assert model.config.num_experts == model.config.experts_per_token == experts
        found.append(model.whole()(tokens, positions)[0])
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)
    assert np.std(found[0]) > 0.1
    assert model.tokenizer.encode("abc").ids == [9, 3]
    assert model.tokenizer.encode("<|end|>a").ids == [0, 1]


def test_heads_are_rotated_in_halves():
    assert in_halves(np.arange(8)[:, None], 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("experts", [0, 3, 16])
def test_a_network_that_cannot_be_dealt_is_refused(tmp_path, experts):
    with pytest.raises(ValueError, match="a power of two that divides 24"):
        write(Tiny(), experts, tmp_path / "out")
    assert not list(tmp_path.iterdir())
