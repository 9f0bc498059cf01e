"""Packed weights on a CPU that has AVX2 and no more, which numba is told that this one is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from layerscope_jax.support import target

ROOT = Path(__file__).parents[2]
HOST = target.of_host()
NOT_THERE = "avx512", "amx", "avx10", "evex"

CODE = """
import numpy as np
import test_decoding as decoding
from layerscope_jax.kernels import decoding as ways, encodings, vectors

assert encodings.BYTES_APART and not vectors.WIDE and ways.decode is not ways.decode_anywhere
for name in decoding.FORMATS:
    for dtype in decoding.KINDS:
        part = np.ascontiguousarray(decoding.packed(name)[1][3:40, 64:352])
        found = decoding.decoded(ways.decode, name, dtype, 3, 37, 2, 9)
        part, found = decoding.as_written(part, found, dtype)
        assert np.array_equal(decoding.bits(found), decoding.bits(part)), (name, dtype)
for name in ("fp8-tensor", "mxfp4", "nvfp4", "int4"):
    for dtype in decoding.KINDS:
        decoding.check_every_code(ways.decode, name, dtype)
"""


@pytest.mark.skipif(
    "avx512bw" not in HOST, reason="this CPU has no more than AVX2: its loops are tested as they are"
)
def test_what_packed_weights_stand_for():
    has = (f"{'-' if name.startswith(NOT_THERE) else '+'}{name}" for name in sorted(HOST))
    places = [ROOT, ROOT / "tests", ROOT / "tests" / "kernels"]
    environment = os.environ | {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": ",".join(has),
        "PYTHONPATH": os.pathsep.join(map(str, places)),
    }
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
