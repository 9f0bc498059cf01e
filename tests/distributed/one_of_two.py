"""One of two processes that share a model's experts; started by `test_processes.py`.

`python one_of_two.py ADDRESS NUMBER PROMPT POLICY`: prints its tokens, and what it holds and sent.
"""

import json
import sys

import jax


def main(address, number, prompt, policy):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(number))
    import layerscope_jax as ls  # the devices are there from now on

    model = ls.load("shipped", devices=jax.devices())
    config = ls.OffloadConfig(policy=policy, device_budget=3_000_000, numerics="exact")
    with ls.Engine(model, config) as engine:
        refused = []
        for call in (engine.submit, engine.stream, lambda text: engine.generate([text])):
            try:
                call(f"{prompt} {number}")
            except ValueError as error:
                refused.append(str(error))
        result = engine.generate([prompt, "def main():"], max_new_tokens=6)
        found = {
            "tokens": result.token_ids,
            "held": len(model.bank.layers[0]),
            "own": [[side.own.start, side.own.stop] for side in engine.runner.sides],
            "refused": refused,
            "exchanged": result.stats.bytes_exchanged,
            "hits": result.stats.hit_rate,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
