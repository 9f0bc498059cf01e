"""Header and index of a trace, read entry by entry; see `prediction.traces`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from layerscope_jax.checkpoints.identity import ModelIdentity
from layerscope_jax.support.files import read_json

FORMAT = 1

Split = Literal["train", "heldout"]


class Passage(NamedTuple):
    """Consecutive tokens of one document that were run as one request.

    Attributes:
        domain, document: source of the tokens.
        split: whether predictors may be trained on the document.
        start: index of the first token in the document.
        prompt: number of prompt tokens, read in prefill; each later token is a decode step.
        tokens: number of tokens.
    """

    domain: str
    document: str
    split: Split
    start: int
    prompt: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
    """Header of a trace.

    Attributes:
        model: the model whose routing was recorded.
        hidden: P, width of the recorded hidden states; 0 if there are none.
        settings: settings of the recording; a trace is continued only with equal settings.
    """

    model: ModelIdentity
    hidden: int
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT} | asdict(self)


def layout(header: TraceHeader, rows: int) -> dict[str, tuple[tuple[int, ...], type]]:
    """Returns shape and dtype of each array of a chunk of `rows` rows."""
    model = header.model
    places = (rows, model.num_layers, model.experts_per_token)
    small = np.uint8 if model.num_experts <= 256 else np.uint16
    arrays: dict[str, tuple[tuple[int, ...], type]] = {
        "tokens": ((rows,), np.int32),
        "experts": (places, small),
        "weights": (places, np.float16),
    }
    if header.hidden:
        arrays["hidden"] = ((rows, model.num_layers, header.hidden), np.float16)
    return arrays


def read_header(file: Path) -> TraceHeader:
    """Reads `trace.json`.

    Raises:
        ValueError: if it is missing, damaged or of another format.
    """
    record = read_json(file, "record it anew")
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{file.parent}: expected trace format {FORMAT}, got {str(record.get('format'))[:40]}; record it "
            "anew"
        )
    try:
        model, hidden, settings = (
            ModelIdentity.from_json(record["model"]),
            record["hidden"],
            record["settings"],
        )
        if type(hidden) is not int or not 0 <= hidden <= model.hidden_size:
            raise ValueError(
                f"hidden must be a whole number in 0..{model.hidden_size}, got {str(hidden)[:40]}"
            )
        if not isinstance(settings, dict):
            raise TypeError(f"settings must be an object, got {str(settings)[:40]!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: expected the header of a trace, got {error!r}; record it anew") from None
    return TraceHeader(model=model, hidden=hidden, settings=settings)


def read_passage(fields: Any) -> Passage:
    """Reads one passage of a line of the index.

    Raises:
        TypeError, ValueError: if it is not a passage.
    """
    passage = Passage(*fields)
    counts = (passage.start, passage.prompt, passage.tokens)
    if (
        not (isinstance(passage.domain, str) and isinstance(passage.document, str))
        or passage.split not in get_args(Split)
        or any(type(count) is not int or not 0 <= count < 2**40 for count in counts)
        or not passage.prompt <= passage.tokens >= 1
    ):
        raise ValueError(f"no passage: {str(fields)[:120]}")
    return passage


def read_files(files: Any, header: TraceHeader, rows: int) -> dict[str, tuple[int, int]]:
    """Reads sizes and checksums of a chunk's files from a line of the index.

    Raises:
        TypeError, ValueError, AttributeError: if they are not those of a chunk of `rows` rows.
    """
    expected = layout(header, rows)
    if files.keys() != expected.keys():
        raise ValueError(f"files {', '.join(map(str, files))[:80]} instead of {', '.join(expected)}")
    checked = {}
    for name, (shape, dtype) in expected.items():
        size, crc = files[name]
        least = math.prod(shape) * np.dtype(dtype).itemsize
        if type(size) is not int or type(crc) is not int or not 0 <= crc < 2**32 or size < least:
            raise ValueError(f"no size and CRC-32 of {name} with {rows} rows: {str(files[name])[:80]}")
        checked[name] = (size, crc)
    return checked
