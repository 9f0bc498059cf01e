"""The command `layerscope perplexity`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import UseAppendAction

from layerscope_jax.cli.args import arg
from layerscope_jax.cli.engine_options import EngineOptions
from layerscope_jax.cli.options import Json, files
from layerscope_jax.engine import Engine
from layerscope_jax.evaluation.perplexity import (
    Perplexity,
    default_context,
    prefix_token,
    token_logprobs,
    tokens_read,
)
from layerscope_jax.generation.progress import SoFar, bar, counted_by
from layerscope_jax.runtime.accounts import Account
from layerscope_jax.support import exits, interrupts
from layerscope_jax.support.checks import Problems
from layerscope_jax.support.option_errors import option


@dataclass(frozen=True, kw_only=True)
class PerplexityOf(EngineOptions):
    """Say how well a model predicts texts: nats a token, bits a byte and perplexity, with standard errors.

    A window slides over each text, and every token is scored once. Texts are tokenised as they are, behind
    the token that begins texts, or else the one that ends them.

    Examples:
        layerscope perplexity shipped --text LICENSE
        layerscope perplexity path/to/checkpoint --text one.txt two.txt --context 1024 --json
    """

    text: Annotated[
        UseAppendAction[tuple[tuple[Path, ...], ...]],
        arg(metavar="FILE ...", help="Texts in UTF-8."),
    ]
    context: Annotated[
        int | None,
        arg(metavar="INT", help="Most tokens that a window reads; by default 2048, or the model's context."),
    ] = None
    stride: Annotated[
        int | None,
        arg(
            metavar="INT",
            help="Tokens that a window scores; the others are its context. By default half of --context.",
        ),
    ] = None
    json: Json = False

    def run(self) -> int:
        """Returns the exit code."""
        exits.need_output()
        config = self.engine_config()
        named = files(self.text)
        if not named:
            raise ValueError("--text must name one text or more, got none")
        texts = {str(file): read_text(file) for file in named}
        model = self.open_model()
        if model.tokenizer is None:
            raise ValueError(f"{self.checkpoint} has no tokenizer, which a text needs; add its files")
        context = default_context(model) if self.context is None else self.context
        stride = max(1, context // 2) if self.stride is None else self.stride
        check_sizes(context, stride, model.config.max_position_embeddings - 2)
        prefix = prefix_token(model)
        rows = max(1, config.prefill_chunk_size // (context + 1))
        config = replace(config, context=context + 2, max_num_seqs=min(config.max_num_seqs, rows))
        tokens = {
            name: model.tokenizer.encode(text, add_special_tokens=False).ids for name, text in texts.items()
        }
        found: dict[str, tuple[np.ndarray, int]] = {}
        sizes = {"prefix": prefix, "context": context, "stride": stride}
        with (
            Engine(model, config, generation_config=self.generation_config) as engine,
            reading(engine, [len(ids) for ids in tokens.values()], context, stride) as advance,
        ):
            for name, text in texts.items():
                logprobs = token_logprobs(engine, tokens[name], **sizes, advance=advance)
                found[name] = logprobs, len(text.encode())
                interrupts.check()
        results = {name: Perplexity.of([logprobs], size) for name, (logprobs, size) in found.items()}
        if len(found) > 1:
            every = [logprobs for logprobs, _ in found.values()]
            results["all"] = Perplexity.of(every, sum(size for _, size in found.values()))
        if self.json:
            records = [{"file": name, **record(result)} for name, result in results.items()]
            print(json.dumps({"context": context, "stride": stride, "prefix": prefix, "texts": records}))
        else:
            show(results)
        return exits.DONE


@contextmanager
def reading(
    engine: Engine, lengths: Sequence[int], context: int, stride: int
) -> Iterator[Callable[[int], None]]:
    """Shows a bar over the tokens that are read, if stderr is a terminal; yields its `advance`.

    Args:
        engine: reads them, a batch a call.
        lengths: number of tokens of each text.
        context, stride: as of `windows`.
    """
    done: tuple[SoFar, Account | None] = (
        SoFar(),
        None,
    )  # counts of all batches so far, account of the last one

    def so_far() -> SoFar:
        (before, last), now = done, engine.account
        return before if now is last else before.plus(counted_by(now))

    total = sum(tokens_read(length, context, stride) for length in lengths)
    with bar(f"{total:,} tokens", total, so_far) as move:

        def advance(tokens: int) -> None:
            nonlocal done
            done = so_far(), engine.account
            move(tokens, tokens)

        yield advance


def read_text(file: Path) -> str:
    """Returns a text.

    Raises:
        ValueError: if the file cannot be read, is empty or is no UTF-8.
    """
    with option("--text"):
        content = file.read_bytes()
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} must be UTF-8, got other bytes at {error.start}; convert it") from None
        if not text:
            raise ValueError(f"{file} must hold a text, got an empty file")
        return text


def check_sizes(context: int, stride: int, most: int) -> None:
    """Refuses windows that do not fit into the model's context."""
    problems = Problems()
    problems.expect(1 <= context <= most, "--context", f"1 to {most} tokens", context)
    problems.expect(1 <= stride <= max(1, context), "--stride", "1 token to --context", stride)
    problems.raise_any()


def record(result: Perplexity) -> dict[str, Any]:
    """Returns all numbers of a result as JSON has them."""
    return asdict(result) | {
        "perplexity": result.perplexity,
        "perplexity_error": result.perplexity_error,
        "bits_per_byte": result.bits_per_byte,
        "bits_per_byte_error": result.bits_per_byte_error,
    }


def show(results: dict[str, Perplexity]) -> None:
    """Prints results, two lines each."""

    def number(value: float, error: float | None) -> str:
        return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")

    for name, result in results.items():
        print(f"{name}: {result.tokens:,} tokens, {result.bytes:,} bytes")
        print(
            f"  {number(result.nats, result.nats_error)} nats a token, "
            f"{number(result.bits_per_byte, result.bits_per_byte_error)} bits a byte, "
            f"perplexity {number(result.perplexity, result.perplexity_error)}"
        )
