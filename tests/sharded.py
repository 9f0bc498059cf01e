"""Checkpoints whose tensors lie in several files, for tests."""

import json

import numpy as np
import safetensors.numpy

INDEX = "model.safetensors.index.json"


def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def write(folder, name, held):
    safetensors.numpy.save_file(
        {key: np.ascontiguousarray(value) for key, value in held.items()}, folder / name
    )


def sharded(folder, overlay=None, **extra):
    """Two shards and an index; tensors of `overlay` lie in a third one too, which the index means."""
    held = tensors(folder)
    names = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(held))}
    for part in set(names.values()):
        write(folder, part, {name: held[name] for name in held if names[name] == part})
    if overlay:
        write(folder, "an-overlay.safetensors", overlay | extra)
        names |= dict.fromkeys(overlay, "an-overlay.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    return names


def moved(folder, place):
    """Pads a file's header, so that the tensors begin at a multiple of 64 and `place`."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    header += b" " * ((place - 8 - len(header)) % 64)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    return folder
