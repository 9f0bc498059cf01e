"""Models whose experts lie in files, as those of a checkpoint do: anywhere in them, in several shards."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from layerscope_jax import Model
from layerscope_jax.offload.disk import DiskBank, Piece
from layerscope_jax.support.files import state_of


def on_disk(model: Model, folder: Path, shards: int = 3) -> Model:
    """The same model with its experts written to files; the arrays of an expert lie in different ones."""
    bank, places, count = model.bank, {}, 0
    files = [folder / f"experts_{shard}.bin" for shard in range(shards)]
    opened = [file.open("wb") for file in files]
    for expert in bank:
        for array, view in enumerate(bank.views(expert)):
            shard = count % shards
            opened[shard].write(bytes(2 * (count % 9)))  # so that arrays begin anywhere
            places[expert, array] = shard, opened[shard].tell()
            opened[shard].write(np.ascontiguousarray(view).view(np.uint8).tobytes())
            count += 1
    for file in opened:
        file.close()
    states = []
    for file in files:
        with file.open("rb") as again:
            states.append(state_of(again.fileno()))

    def piece(expert, array, view):
        shard, start = places[expert, array]
        return Piece(files[shard], start, view.nbytes, view.shape, view.dtype, states[shard])

    pieces: dict[int, list] = {}
    for expert in bank:
        own = tuple(piece(expert, array, view) for array, view in enumerate(bank.views(expert)))
        pieces.setdefault(expert.layer, []).append(own)
    layers = tuple(tuple(pieces[layer]) for layer in sorted(pieces))
    return dataclasses.replace(model, bank=DiskBank(layers, bank.format, bank.dtype, model.device))
