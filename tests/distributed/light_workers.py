"""Workers without a model, which a process that Ray starts imports quickly."""

import os
import signal
import time

from layerscope_jax.distributed.worker import Beat, Identity


class Light:
    """Says that rows are complete, and fails at those whose text says how.

    A row "end once FILE" ends the process, and "hang once FILE" stops it, unless FILE exists; a "slow row"
    takes a while.
    """

    def __init__(self, job, place):
        pass

    def start(self):
        yield Identity({"checkpoint": "none"}, "no device", os.getpid())

    def run(self, rows, limits):
        for number, row in rows:
            deed, _, file = row.partition(" once ")
            if file and not os.path.exists(file):
                with open(file, "w") as opened:
                    opened.write(str(os.getpid()))
                if deed == "end":
                    os._exit(9)
                os.kill(os.getpid(), signal.SIGSTOP)
            if deed.startswith("slow"):
                time.sleep(0.2)
            yield Beat(((number, f"{row} complete\n".encode(), False),), 1)
