"""The names of the programs that XLA has compiled in this process, as they are compiled."""

import jax

compiled: list[str] = []


def _note(event: str, duration_secs: float, fun_name: str = "", **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(fun_name.removeprefix("jit(").removesuffix(")"))  # an older JAX does not tell names


jax.monitoring.register_event_duration_secs_listener(_note)
