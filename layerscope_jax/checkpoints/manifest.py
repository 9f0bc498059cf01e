"""What a folder that `layerscope convert` wrote says of itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from layerscope_jax.support.files import is_there, read_json
from layerscope_jax.support.json_fields import of_record, readable

MANIFEST = "layerscope.json"
VERSION = 2
REMEDY = "convert the checkpoint again"


@dataclass(frozen=True)
class Manifest:
    """What a converted checkpoint says of itself.

    Attributes:
        version: of the layout.
        source: fingerprint of the checkpoint that it was made from.
        dtype: of activations, and of the dense parameters that are not packed.
        format: name of the experts' format.
        dense: name of the format of the dense layers' matrices; `dtype` where they are not packed.
        head: "tied" if the embedding is the head, else "own".
    """

    version: int
    source: str
    dtype: str
    format: str
    dense: str
    head: str

    @property
    def dense_format(self) -> str | None:
        """Name of the format that dense matrices are packed in; None if they are not."""
        return None if self.dense == self.dtype else self.dense

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads the manifest of a converted checkpoint.

        Raises:
            ValueError: if it is damaged, or of another version.
        """
        file = folder / MANIFEST
        record = read_json(file, REMEDY)
        if record.get("version") != VERSION:
            raise ValueError(f"{file}: expected version {VERSION}, got {record.get('version')!r}; {REMEDY}")
        return of_record(cls, record, str(file))

    def write(self, folder: Path) -> None:
        """Writes the manifest into a folder."""
        (folder / MANIFEST).write_text(readable(asdict(self)) + "\n", encoding="utf-8")


def is_converted(folder: Path) -> bool:
    """Whether a folder holds a converted checkpoint."""
    return is_there(folder / MANIFEST)
