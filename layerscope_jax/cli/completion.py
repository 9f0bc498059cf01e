"""The command `layerscope completion`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional

from layerscope_jax.cli.args import arg
from layerscope_jax.cli.commands import union
from layerscope_jax.cli.options import Json
from layerscope_jax.support import exits


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Print a script with which a shell completes commands, options and their choices.

    Examples:
        layerscope completion bash > ~/.local/share/bash-completion/completions/layerscope
        layerscope completion zsh > ~/.zfunc/_layerscope
        layerscope completion fish > ~/.config/fish/completions/layerscope.fish
    """

    shell: Annotated[Positional[Literal["bash", "zsh", "fish"]], arg(help="The shell that reads the script.")]
    json: Json = False

    def run(self) -> int:
        """Returns the exit code."""
        from layerscope_jax.cli.main import COMMANDS  # which lists this command too

        exits.need_output()
        script = script_of(COMMANDS, self.shell)
        print(json.dumps({"shell": self.shell, "script": script}) if self.json else script)
        return exits.DONE


def script_of(commands: Mapping[str, type], shell: str) -> str:
    """Returns the completion script of some commands, by name."""
    script = io.StringIO()
    with redirect_stdout(script), suppress(SystemExit):  # tyro ends the process behind it
        tyro.cli(
            union(commands),
            prog="layerscope",
            args=["--tyro-print-completion", shell],
            config=(FlagCreatePairsOff,),
        )
    return script.getvalue().rstrip("\n")
