"""One of two processes that share a model's experts; started by `test_processes.py`.

`python one_of_two.py ADDRESS NUMBER POLICY CHECKPOINT OTHER`: prints its tokens, what it holds and sent, and
how it was refused. OTHER is a checkpoint with the same config that process 1 tries to share with process 0.
"""

import json
import sys
from dataclasses import replace

import jax

PROMPTS = ["Call me Ishmael.", "def main():"]


def main(address, number, policy, checkpoint, other):
    number = int(number)
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=number)
    import layerscope_jax as ls  # the devices are there from now on
    from layerscope_jax.profiling import measure

    measure.ROUNDS = measure.MOST_ROUNDS = 3  # nobody asks how long something takes
    measure.ROUNDS_S = 0.01
    refused = {}

    def refusal(name, make):
        try:
            make()
        except (ValueError, RuntimeError) as error:
            refused[name] = str(error)

    model = ls.load(checkpoint, devices=jax.devices())
    budget = 3 * model.bank.expert_bytes
    config = ls.OffloadConfig(policy=policy, device_budget=budget, numerics="exact")
    refusal("weights", lambda: ls.Engine(ls.load(other, devices=jax.devices()) if number else model, config))
    refusal("budget", lambda: ls.Engine(model, replace(config, host_budget=None if number else "1GiB")))
    with ls.Engine(model, config) as engine:
        refusal("submit", lambda: engine.submit(PROMPTS[0]))
        refusal("stream", lambda: engine.stream(PROMPTS))
        refusal("on_token", lambda: engine.generate(PROMPTS, on_token=print))
        refusal("other prompt", lambda: engine.generate([f"{PROMPTS[0]} {number}"]))
        refusal("other size", lambda: engine.warmup(prompt_tokens=4 + number))
        # Both have the same text; one of them cannot make tokens of it.
        engine._chat._override = None if number else "{{ messages[0].content }}"
        refusal("call", lambda: engine.generate([ls.Request(messages=[{"role": "user", "content": "Hi"}])]))
        result = engine.generate(PROMPTS, max_new_tokens=6)
        drawn = engine.generate(PROMPTS, max_new_tokens=6, temperature=1.0, seed=None)
        found = {
            "tokens": result.token_ids,
            "drawn": [drawn.token_ids, [each.seed for each in drawn]],
            "held": len(model.bank.layers[0]),
            "own": [[side.own.start, side.own.stop] for side in engine.runner.sides],
            "refused": refused,
            "exchanged": result.stats.bytes_exchanged,
            "hits": result.stats.hit_rate,
        }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
