"""A jitted batch script: how likely a model finds each line of a text.

    python examples/batch_script.py [checkpoint] [file]

Every batch has one shape, so one program is compiled, once. All experts are on the device for that; where
they do not fit, `Engine.generate(prompts, logprobs=0)` works within a budget.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import layerscope_jax as ls
from layerscope_jax.models.rotary import PAD_POSITION

BATCH, LENGTH = 4, 32
"""Lines and tokens of a batch; longer lines are cut."""


@nnx.jit
def log_likelihood(decoder: ls.Decoder, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns the sum of the log-probabilities of each row's tokens but the first: [B, S] ids -> [B]."""
    logits, _ = decoder(tokens, positions)
    found = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=2)[..., 0]
    return jnp.where(positions[:, 1:] == PAD_POSITION, 0.0, found).sum(1)


def batches(rows: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields ids and positions, [BATCH, LENGTH] each; the last batch is filled up with padding."""
    for first in range(0, len(rows), BATCH):
        tokens = np.zeros((BATCH, LENGTH), np.int32)
        positions = np.full((BATCH, LENGTH), PAD_POSITION, np.int32)
        for row, ids in enumerate(rows[first : first + BATCH]):
            count = min(len(ids), LENGTH)
            tokens[row, :count], positions[row, :count] = ids[:count], np.arange(count)
        yield tokens, positions


def main(checkpoint: str = "shipped", file: str = __file__) -> None:
    """Prints a line of JSON for each line of the text."""
    model = ls.load(checkpoint)
    assert model.tokenizer is not None
    lines = [line for line in Path(file).read_text().splitlines() if len(line.split()) > 1][:12]
    rows = [model.tokenizer.encode(line).ids for line in lines]
    decoder = model.whole()
    sums = np.concatenate([log_likelihood(decoder, *map(jnp.asarray, pair)) for pair in batches(rows)])
    for line, ids, total in zip(lines, rows, sums, strict=False):
        per_token = float(total) / (min(len(ids), LENGTH) - 1)
        print(json.dumps({"line": line, "tokens": len(ids), "log_likelihood_per_token": round(per_token, 3)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
