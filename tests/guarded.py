"""Arrays with bytes around them that nobody may write to, and jobs of loops that go by addresses."""

import numpy as np

from layerscope_jax.kernels import crew, prefill_attention

AROUND = 4096
"""Bytes before and behind what may be written."""

CANARY = np.uint8(0xFF)


class Guarded:
    """Arrays with bytes around them that nobody may write to."""

    def __init__(self):
        self._memories = []

    def array(self, shape, dtype):
        """Not a number to begin with, so that it is seen what was not written."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = np.full(size + 2 * AROUND + 64, CANARY, np.uint8)
        begin = AROUND + -(memory.ctypes.data + AROUND) % 64
        self._memories.append((memory, begin, size))
        found = memory[begin : begin + size].view(dtype).reshape(shape)
        found[...] = np.nan
        return found

    def check(self):
        for memory, begin, size in self._memories:
            assert (memory[:begin] == CANARY).all()
            assert (memory[begin + size :] == CANARY).all()


def numbers(rng, shape, dtype):
    return (rng.standard_normal(shape) / 4).astype(dtype)


def job(of=crew, **fields):
    """Of `crew`: its numbers, and addresses of arrays, which must live on; `of` names those of one kind."""
    made = np.zeros(crew.SIZE, np.int64)
    for name, value in fields.items():
        of_all = getattr(crew, name, crew.SIZE) <= crew.WIDTH
        room = crew if of_all else next(one for one in (of, crew, prefill_attention) if hasattr(one, name))
        place = getattr(room, name)
        made[place] = value.ctypes.data if isinstance(value, np.ndarray) else value
    return made


WORDS = {"float32": np.float32, "uint16": np.uint16, "int16": np.int16}
