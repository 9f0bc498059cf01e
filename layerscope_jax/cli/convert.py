"""The command `layerscope convert`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from layerscope_jax.checkpoints.convert import convert
from layerscope_jax.cli.args import arg
from layerscope_jax.cli.options import Checkpoint, Dtype, Json, Revision, folder_of
from layerscope_jax.support import exits
from layerscope_jax.support.locks import made


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint laid out for this engine, with its weights packed if you like; or back.

    What is written loads as any checkpoint does. An interrupted run leaves nothing.

    Examples:
        layerscope convert path/to/checkpoint --out path/to/converted --expert-format int4
        layerscope convert path/to/converted --out path/to/folder --to hf
    """

    checkpoint: Checkpoint
    out: Annotated[Path, arg(metavar="FOLDER", help="Folder to write; must not exist.")]
    expert_format: Annotated[
        str | None,
        arg(
            metavar="FORMAT",
            aliases=("--experts",),
            help="Format to pack experts into, such as float16; by default they keep the dtype of the other "
            "weights.",
        ),
    ] = None
    dense_format: Annotated[
        Literal["int8"] | None,
        arg(
            aliases=("--dense",),
            help="Format to pack the matrices of dense layers into; by default they are not packed.",
        ),
    ] = None
    dtype: Dtype = None
    to: Annotated[
        Literal["engine", "hf"],
        arg(help="Layout: for this engine, or a Hugging Face folder, with everything unpacked."),
    ] = "engine"
    revision: Revision = None
    json: Json = False

    def run(self) -> int:
        """Returns the exit code."""
        exits.need_output()
        folder = folder_of(self.checkpoint, self.revision)
        with made(self.out.absolute().parent):
            convert(
                folder,
                self.out,
                experts=self.expert_format,
                dense=self.dense_format,
                dtype=self.dtype,
                to=self.to,
            )
        written = sum(file.stat().st_size for file in self.out.rglob("*") if file.is_file())
        if self.json:
            print(json.dumps({"checkpoint": str(self.out), "bytes": written}))
        else:
            print(f"The checkpoint is in {self.out}: {written / 1e9:.2f} GB")
        return exits.DONE
