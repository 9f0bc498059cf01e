"""The command `layerscope convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from layerscope_jax.checkpoints.convert import convert
from layerscope_jax.cli.options import Checkpoint, Dtype, Revision, folder_of
from layerscope_jax.support import exits
from layerscope_jax.support.locks import made


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint laid out for this engine, with its weights packed if you like; or back.

    What is written loads as any checkpoint does. An interrupted run leaves nothing.
    """

    checkpoint: Checkpoint
    out: Annotated[Positional[Path], arg(metavar="OUT", help="Folder to write; must not exist.")]
    experts: Annotated[
        str | None,
        arg(
            metavar="FORMAT",
            help="Format to pack experts into, such as float16; by default they keep the dtype of the other "
            "weights.",
        ),
    ] = None
    dense: Annotated[
        Literal["int8"] | None,
        arg(help="Format to pack the matrices of dense layers into; by default they are not packed."),
    ] = None
    dtype: Dtype = None
    to: Annotated[
        Literal["engine", "hf"],
        arg(help="Layout: for this engine, or a Hugging Face folder, with everything unpacked."),
    ] = "engine"
    revision: Revision = None

    def run(self) -> int:
        """Returns the exit code."""
        exits.need_output()
        folder = folder_of(self.checkpoint, self.revision)
        with made(self.out.absolute().parent):
            convert(folder, self.out, experts=self.experts, dense=self.dense, dtype=self.dtype, to=self.to)
        written = sum(file.stat().st_size for file in self.out.rglob("*") if file.is_file())
        print(f"The checkpoint is in {self.out}: {written / 1e9:.2f} GB")
        return exits.DONE
