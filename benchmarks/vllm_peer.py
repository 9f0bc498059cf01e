"""vLLM as a peer, in a process and an interpreter of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peer_process import PeerProcess, serve, take_stdout

BLOCK = 128
"""Positions of the smallest piece of a KV cache on a CPU."""


class VLLMPeer(PeerProcess):
    """A model folder, loaded by vLLM for the CPU in another process that waits for work.

    All of it, its engine and its worker, is in that one process, whose steps are timed there.

    Args:
        python: its interpreter.
        folder: the checkpoint.
        threads: for OpenMP.
        rows: of a batch, at most.
        prompt_tokens, new_tokens: of a row, at most. A whole batch of prompts is prefilled in one step.

    Attributes:
        versions: of vLLM and torch there.
        dtype: that it computes in.

    Raises:
        ValueError: if the process ends; what it said is on stderr.
    """

    def __init__(
        self, python: Path, folder: Path, threads: int, rows: int, prompt_tokens: int, new_tokens: int
    ):
        openmp = python.parents[1] / "lib/libiomp5.so"  # installed beside it, and faster than PyTorch's
        preload = {"LD_PRELOAD": str(openmp.absolute())} if openmp.exists() else {}
        super().__init__(
            "vLLM",
            python,
            "benchmarks.vllm_peer",
            [str(folder), str(rows), str(prompt_tokens), str(new_tokens)],
            {
                "OMP_NUM_THREADS": str(threads),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_NO_USAGE_STATS": "1",
            }
            | preload,
        )
        self.versions: dict[str, str] = self.first["versions"]
        self.dtype: str = self.first["dtype"]

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
        """Continues prompts greedily by `new_tokens` each.

        Returns:
            "prefill" seconds, until every prompt has its first token; "decode" seconds a step; and the
            picked "tokens" [B][N].

        Raises:
            ValueError: if vLLM can not.
        """
        found = self.ask(prompts=prompts, new_tokens=new_tokens)
        if "error" in found:
            raise ValueError(f"vLLM: {found['error']}")
        return found


def cache_bytes(config: dict[str, Any], rows: int, positions: int) -> int:
    """Of the keys and values of `rows` of `positions` tokens, in whole blocks, and of a row to spare.

    >>> sizes = {"num_hidden_layers": 8, "num_key_value_heads": 2, "head_dim": 64}
    >>> cache_bytes(sizes | {"dtype": "bfloat16"}, 1, 100) == 2 * 128 * 8 * 2 * 2 * 64 * 2
    True
    """
    of_position = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    itemsize = {"float32": 4, "bfloat16": 2}[config["dtype"]]
    return (rows + 1) * -(-positions // BLOCK) * BLOCK * of_position * itemsize


def start(folder: str, rows: int, prompt_tokens: int, new_tokens: int) -> None:
    """The other process."""
    answers = take_stdout()
    import torch  # type: ignore[import-not-found]
    import vllm  # type: ignore[import-not-found]

    positions = prompt_tokens + new_tokens
    config = json.loads((Path(folder) / "config.json").read_text())
    engine = vllm.LLM(
        folder,
        dtype=config["dtype"],  # left to itself, it computes a float32 checkpoint in 16 bits
        skip_tokenizer_init=True,
        max_model_len=positions,
        max_num_seqs=rows,
        max_num_batched_tokens=rows * positions,
        enable_prefix_caching=False,  # the same prompts come again and again
        kv_cache_memory_bytes=cache_bytes(config, rows, positions),
    ).llm_engine

    def run(prompts: list, new_tokens: int) -> dict[str, Any]:
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        tokens: list[list[int]] = [[] for _ in prompts]
        began = time.perf_counter()
        for row, prompt in enumerate(prompts):
            engine.add_request(str(row), {"prompt_token_ids": prompt}, sampling)
        prefill = 0.0
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
            if not prefill and all(tokens):
                prefill = time.perf_counter() - began
        decode = time.perf_counter() - began - prefill
        return {"prefill": prefill, "decode": decode / (new_tokens - 1), "tokens": tokens}

    versions = {"vllm": vllm.__version__, "torch (vllm)": torch.__version__}
    dtype = str(engine.model_config.dtype).removeprefix("torch.")
    serve(answers, {"versions": versions, "dtype": dtype}, run)


if __name__ == "__main__":
    start(sys.argv[1], *map(int, sys.argv[2:]))
