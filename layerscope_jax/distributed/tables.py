"""Prompts from Parquet files and from datasets of Ray Data, and completions as Parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from layerscope_jax.generation.arguments import NO_SETTINGS
from layerscope_jax.generation.prompt_files import KEYS, NOTES, Row, read_prompts, rows_of
from layerscope_jax.support.exits import say
from layerscope_jax.support.files import write_file

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset

ENDING = ".parquet"

BATCH = 4096
"""Rows that are read or written at once."""

JOB = b"layerscope_job"
"""Key of a Parquet file's metadata: digest of the prompts and the model that it was made from."""


def parquet() -> ModuleType:
    """Returns `pyarrow.parquet`.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise ValueError(
            "Parquet files need pyarrow, which is not installed: pip install 'layerscope-jax[ray]'"
        ) from None
    return pyarrow.parquet


def is_table(path: Path) -> bool:
    """Whether a path is that of a Parquet file, or of a folder of them."""
    return path.suffix == ENDING or (path.is_dir() and any(path.glob(f"*{ENDING}")))


def read_rows(
    source: str | Path | Dataset,
    options: dict[str, Any],
    *,
    column: str = "prompt",
    chat: bool = False,
    defaults: Mapping[str, Any] = NO_SETTINGS,
) -> list[Row]:
    """Reads prompts from a file of lines, from a Parquet file or a folder of them, or from a dataset.

    Of a table, `column` is the prompt: text, a list of token ids, or messages. "id" and the settings of
    `Request` are read as of a line; other columns are not read, and are named once.

    Args:
        source: path or dataset.
        options, chat, defaults: as of `layerscope_jax.generation.prompt_files.read_prompts`.
        column: of the prompts, in a table.

    Raises:
        ValueError: as of `read_prompts`; and for a table without the column.
    """
    if not isinstance(source, str | Path):
        return _rows_of_tables(_of_dataset(source), "the dataset", options, column, chat, defaults)
    path = Path(source)
    if not is_table(path):
        if column != "prompt":
            raise ValueError(
                f"{path}: expected a Parquet file, whose column {column!r} is read, got another file"
            )
        return read_prompts(path, options, chat, defaults)
    files = sorted(path.glob(f"*{ENDING}")) if path.is_dir() else [path]
    return _rows_of_tables(_of_files(files), str(path), options, column, chat, defaults)


def _of_files(files: Sequence[Path]) -> Iterator[tuple[str, pyarrow.Table]]:
    reading = parquet()
    import pyarrow

    for file in files:
        try:
            with reading.ParquetFile(file) as opened:
                yield str(file), opened.schema_arrow.empty_table()
                for batch in opened.iter_batches(BATCH):
                    yield str(file), pyarrow.Table.from_batches([batch])
        except (OSError, pyarrow.ArrowException) as error:
            what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ValueError(f"{file}: expected a Parquet file, got {what[:200]}") from None


def _of_dataset(dataset: Dataset) -> Iterator[tuple[str, pyarrow.Table]]:
    # Rows are known by their numbers, so they must come in the same order each time.
    dataset.context.execution_options.preserve_order = True
    for table in dataset.iter_batches(batch_size=BATCH, batch_format="pyarrow"):
        yield "the dataset", table


def _rows_of_tables(
    tables: Iterable[tuple[str, pyarrow.Table]],
    name: str,
    options: dict[str, Any],
    column: str,
    chat: bool,
    defaults: Mapping[str, Any],
) -> list[Row]:
    passed_over: set[str] = set()

    def records() -> Iterator[tuple[str, Any]]:
        number, before = 0, ""
        for where, table in tables:
            if column not in table.column_names:
                columns = ", ".join(map(repr, table.column_names[:20])) or "none"
                raise ValueError(
                    f"{where}: expected a column {column!r} of prompts, got {columns}; name another"
                )
            number, before = (number, where) if where == before else (0, where)
            known = [
                key for key in table.column_names if key in KEYS and key not in ("prompt", "messages", NOTES)
            ]
            passed_over.update({*table.column_names} - {*known, column, NOTES})
            for record in table.select([column, *[key for key in known if key != column]]).to_pylist():
                yield f"{where}, row {number}", record_of(record, column)
                number += 1

    rows = rows_of(records(), options, chat, defaults)
    if not rows:
        raise ValueError(f"{name}: expected rows with prompts, got none; add a prompt")
    if passed_over:
        say(f"{name}: columns that are not read: {', '.join(sorted(passed_over))[:200]}")
    return rows


def record_of(record: dict[str, Any], column: str) -> dict[str, Any]:
    """Returns a row of a table as a line of a file of prompts has it: without what is null.

    >>> record_of({"question": "Who?", "seed": None, "id": 3}, "question")
    {'id': 3, 'prompt': 'Who?'}
    """
    prompt = record.pop(column)
    kept = {key: value for key, value in record.items() if value is not None}
    is_chat = isinstance(prompt, list) and any(isinstance(part, dict) for part in prompt)
    return {**kept, "messages" if is_chat else "prompt": prompt}


def check_rows(rows: Sequence[Row]) -> None:
    """Refuses rows whose completions have no place in a Parquet file.

    Raises:
        ValueError: if they are requests of OpenAI's batch API, or numbers and texts that look alike name
            them.
    """
    if any(row.call is not None for row in rows):
        raise ValueError("lines of OpenAI's batch API are answered by lines of JSON; let --out end in .jsonl")
    if len({str(row.id) for row in rows}) < len(rows):
        raise ValueError(
            "ids of one column must differ as texts, got 1 and '1', say; let --out end in .jsonl"
        )


def write_table(file: Path, rows: Sequence[Row], lines: Iterable[bytes], digest: str) -> None:
    """Writes completions as a Parquet file, completely or not at all; a sample is a row.

    The columns are `id`, `index` (of the sample), `text`, `token_ids`, `finish_reason`, `error` and `model`,
    and `line`: all that a line of JSON says.

    Args:
        file: where.
        rows: the rows of all completions; their ids are numbers if all of them are.
        lines: the lines of completions, in order.
        digest: of the job.

    Raises:
        ValueError: if it cannot be written.
    """
    writing = parquet()
    import pyarrow

    plain = all(isinstance(row.id, int) for row in rows)
    schema = pyarrow.schema(
        [
            ("id", pyarrow.int64() if plain else pyarrow.string()),
            ("index", pyarrow.int32()),
            ("text", pyarrow.string()),
            ("token_ids", pyarrow.list_(pyarrow.int32())),
            ("finish_reason", pyarrow.string()),
            ("error", pyarrow.string()),
            ("model", pyarrow.string()),
            ("line", pyarrow.string()),
        ],
        metadata={JOB: digest.encode()},
    )

    def write(path: Path) -> None:
        with writing.ParquetWriter(path, schema, compression="zstd") as opened:
            batch: list[dict[str, Any]] = []
            for line in lines:
                batch += samples_of(line, plain)
                if len(batch) >= BATCH:
                    opened.write_table(pyarrow.Table.from_pylist(batch, schema))
                    batch = []
            opened.write_table(pyarrow.Table.from_pylist(batch, schema))

    write_file(file, write)


def samples_of(line: bytes, plain: bool) -> list[dict[str, Any]]:
    """Returns the rows of a Parquet file that a line of completions makes."""
    content = json.loads(line)
    shared = {
        "id": content["id"] if plain else str(content["id"]),
        "model": content["model"],
        "line": line.decode().rstrip("\n"),
    }
    outputs = content.get("completions", [content])
    names = ("text", "token_ids", "finish_reason", "error")
    return [
        {**shared, "index": output.get("index", 0), **{name: output.get(name) for name in names}}
        for output in outputs
    ]


def job_of(file: Path) -> str | None:
    """Returns the digest of the job that a Parquet file was made by; None if it was made by none.

    Raises:
        ValueError: if it is no Parquet file.
    """
    import pyarrow

    try:
        metadata = parquet().read_schema(file).metadata or {}
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{file}: expected a Parquet file, got {str(error)[:200]}; choose another file"
        ) from None
    return metadata[JOB].decode() if JOB in metadata else None


def failed_in(file: Path) -> int:
    """Returns how many rows of a Parquet file of completions ended with an error."""
    table = parquet().read_table(file, columns=["id", "error"])
    return len({record["id"] for record in table.to_pylist() if record["error"] is not None})
