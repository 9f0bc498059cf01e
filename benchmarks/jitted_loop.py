"""What an engine can at best be as fast as: the whole of decoding as one jitted loop."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layerscope_jax import Decoder, Model
from layerscope_jax.generation.scheduler import bucket
from layerscope_jax.models.cache import new_caches
from layerscope_jax.models.rotary import PAD_POSITION
from layerscope_jax.runtime.sampling import sample


class JittedLoop:
    """The same decoder without an engine: one jitted prefill, then all decode steps in one jitted scan."""

    def __init__(self, model: Model):
        self.model = model
        graphdef, variables = nnx.split(model.whole())
        self.params = nnx.to_pure_dict(variables)

        def advance(params, tokens, positions, caches):
            decoder: Decoder = nnx.merge(graphdef, params)
            hidden, _, caches = decoder.run(decoder.embed(tokens), positions, caches)
            return sample(decoder.logits(hidden[:, -1]), positions[:, -1], None), caches

        def decode(params, token, positions, caches, steps):
            def step(carry, number):
                token, caches = carry
                token, caches = advance(params, token[:, None], (positions + number)[:, None], caches)
                return (token, caches), token

            # The caches are given back so that they can be overwritten in place, as in the engine.
            (_, caches), tokens = jax.lax.scan(step, (token, caches), jnp.arange(steps, dtype=jnp.int32))
            return tokens, caches

        self._prefill = jax.jit(advance, donate_argnames="caches")
        self._decode = jax.jit(decode, donate_argnames="caches", static_argnames="steps")

    def run(self, prompts: np.ndarray, new_tokens: int, rows: int) -> tuple[dict[str, float], np.ndarray]:
        """Seconds of "prefill" and of a "decode" step, and tokens [B, N]; `rows` - B rows are padding."""
        batch, width = prompts.shape
        tokens = np.zeros((rows, width), np.int32)
        positions = np.full((rows, width), PAD_POSITION, np.int32)
        tokens[:batch], positions[:batch] = prompts, np.arange(width)
        length = bucket(width + new_tokens, 64)
        caches = new_caches(self.model.config, rows, length, self.model.bank.dtype, jax.devices()[0])
        jax.block_until_ready(caches)
        began = time.perf_counter()
        first, caches = self._prefill(self.params, tokens, positions, caches)
        first.block_until_ready()
        prefill = time.perf_counter() - began
        start = np.where(np.arange(rows) < batch, width, PAD_POSITION).astype(np.int32)
        began = time.perf_counter()
        found, _ = self._decode(self.params, first, start, caches, steps=new_tokens - 1)
        rest = np.asarray(found)
        decode = (time.perf_counter() - began) / (new_tokens - 1)
        return {"prefill": prefill, "decode": decode}, np.column_stack([first, *rest])[:batch]
