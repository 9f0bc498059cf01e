"""However a process ends while engines are open, it ends: by its own exit code, and with nothing to say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import quick_compiling

TESTS = Path(__file__).parents[1]

BEGIN = """
import tempfile
kept = tempfile.TemporaryDirectory()  # has its turn at exit by `weakref`, before JAX is imported
import atexit, os, sys, threading
sys.path[:0] = [{tests!r}, {root!r}]
from helpers import random_model
import layerscope_jax as ls
from layerscope_jax.profiling import disk_costs, measure

measure.ROUNDS = measure.MOST_ROUNDS = 3
measure.ROUNDS_S = disk_costs.READS_S = 0.01
model = random_model(num_layers=2)
resident = ls.OffloadConfig()
within = ls.OffloadConfig(device_budget=8 * model.bank.expert_bytes, policy="lru", host_threads=2)
begun, ending, done = threading.Event(), threading.Event(), []

def generate(engine):
    return engine.generate([[5, 6, 7]], max_new_tokens=4).token_ids

def slowly(engine):
    # The second step begins before the interpreter ends, and goes on when it does.
    atexit.register(ending.set)
    step, steps = engine.runner.step, []
    def slow(*inputs):
        steps.append(None)
        if len(steps) == 2:
            begun.set()
            waited_for(engine)
        return step(*inputs)
    engine.runner.step = slow
    done.append(generate(engine))
    generate(engine)
"""

CASES = {
    "engines left open, also by a thread, and a stream in the middle": """
def work():
    global engine
    engine = ls.Engine(model, within)
    generate(engine)
thread = threading.Thread(target=work)
thread.start()
thread.join()
other = ls.Engine(model, resident)
generate(other)
stream = ls.Engine(model, within).stream([[5, 6, 7]], max_new_tokens=4)
next(stream)
sys.exit(3)
""",
    "threads that generate, and make an engine, when the main one ends": """
waited_for = lambda engine: threading.main_thread().join()
def work():
    slowly(ls.Engine(model, within))
    costly = ls.OffloadConfig(device_budget=within.device_budget, policy="fiddler")
    generate(ls.Engine(model, costly))
    print("done")
threading.Thread(target=work).start()
begun.wait()
""",
    "daemon threads that generate": """
from layerscope_jax.runtime import resources
resources.PATIENCE_S = 600.0  # more than the test waits for this process
atexit.register(lambda: os._exit(9) if done else None)  # called after the engines have ended
def waited_for(engine):
    ending.wait()
    while not engine._turns.is_contended:  # until this engine ends
        pass
for config in (within, resident):
    begun.clear()
    threading.Thread(target=lambda: slowly(ls.Engine(model, config)), daemon=True).start()
    begun.wait()
sys.exit(3)
""",
}


@pytest.mark.parametrize("name", CASES)
def test_a_process_ends_by_its_own_code_and_says_nothing(name):
    program = BEGIN.format(tests=str(TESTS), root=str(TESTS.parent)) + CASES[name]
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | quick_compiling.ENVIRONMENT,
    )
    expected = (0, "done\n", "") if "main one" in name else (3, "", "")
    assert (done.returncode, done.stdout, done.stderr) == expected
