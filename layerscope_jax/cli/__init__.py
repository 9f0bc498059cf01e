"""The command `layerscope`."""

from layerscope_jax.support.entry import run


def layerscope() -> None:
    """Runs the command that the arguments name; nothing heavy is imported before Ctrl-C is seen to."""
    run("layerscope_jax.cli.main")
