"""Hugging Face transformers as a peer, in a process of its own: it may have an interpreter of its own."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peer_process import PeerProcess, serve, take_stdout

EXPERTS = ("eager", "grouped_mm", "batched_mm")
"""transformers' ways of computing experts. `batched_mm` copies the weights of every (token, choice) pair:
hopeless but in decoding a single prompt, and raced only there."""


def find_python(given: Path | None, *others: str) -> Path | None:
    """The interpreter to run transformers in; None if there is none with torch, transformers and `others`."""
    if given is not None:
        return given
    here = all(importlib.util.find_spec(name) for name in ("torch", "transformers", *others))
    return Path(sys.executable) if here else None


class HFPeer(PeerProcess):
    """A model folder, loaded by transformers in another process that waits for work.

    Args:
        python: its interpreter.
        folder: the checkpoint.
        threads: for torch.
        device_bytes: of weights that stay on the device; accelerate brings the others when they are needed,
            from main memory. Without a GPU they stay in main memory, and the others on disk. None for all.

    Attributes:
        versions: of torch and transformers there, and of accelerate if it is needed.
        places: where accelerate put the model's parts -> how many; empty without it.
        dtype: of its weights.

    Raises:
        ValueError: if the process ends; what it said is on stderr.
    """

    def __init__(self, python: Path, folder: Path, threads: int, device_bytes: int | None = None):
        device = [str(device_bytes)] if device_bytes else []
        super().__init__(
            "transformers",
            python,
            "benchmarks.hf_peer",
            [str(folder), str(threads), *device],
            {"OMP_NUM_THREADS": str(threads)},
        )
        self.versions: dict[str, str] = self.first["versions"]
        self.places: dict[str, int] = self.first["places"]
        self.dtype: str = self.first["dtype"]

    def run(
        self, prompts: Sequence[Sequence[int]], forced: Sequence[Sequence[int]], experts: str
    ) -> dict[str, Any]:
        """Reads the prompts, then `forced` token by token, and picks the likeliest token each time.

        Returns:
            "prefill" seconds, "decode" seconds a step, and the picked "tokens" [B][N].

        Raises:
            ValueError: if transformers can not; it may be asked again, for other `experts` say.
        """
        found = self.ask(prompts=prompts, forced=forced, experts=experts)
        if "error" in found:
            raise ValueError(f"transformers with {experts} experts: {found['error']}")
        return found

    def usable(self, ways: Sequence[str]) -> list[str]:
        """Those ways of computing experts that torch knows here; says why others are left out."""
        found = []
        for experts in ways:
            try:
                self.run([[1, 2]], [[3, 4]], experts)
            except ValueError as error:
                print(f"left out: {error}", file=sys.stderr)
            else:
                found.append(experts)
        return found


def start(folder: str, threads: int, device_bytes: int | None = None) -> None:
    """The other process."""
    answers = take_stdout()
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    torch.set_num_threads(threads)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    placed: dict[str, Any] = {}
    if device_bytes is not None:
        import accelerate  # type: ignore[import-not-found]

        versions["accelerate"] = accelerate.__version__
        most = {"cpu": device_bytes} if device == "cpu" else {0: device_bytes, "cpu": 2**50}
        placed = {"device_map": "auto", "max_memory": most, "offload_folder": folder + "/offloaded"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **placed).eval()
    if not placed:
        model.to(device)

    def run(prompts: list, forced: list, experts: str) -> dict[str, Any]:
        # The prefill before a race of decoding is not timed: any implementation will do.
        model.set_experts_implementation("grouped_mm" if experts == "batched_mm" else experts)
        inputs, given = torch.tensor(prompts, device=device), torch.tensor(forced, device=device)
        picked = []
        with torch.inference_mode():
            began = time.perf_counter()
            out = model(inputs, use_cache=True, logits_to_keep=1)
            picked.append(out.logits[:, -1].argmax(-1).tolist())
            prefill = time.perf_counter() - began
            model.set_experts_implementation(experts)
            began = time.perf_counter()
            for step in range(given.shape[1] - 1):
                out = model(given[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
                picked.append(out.logits[:, -1].argmax(-1).tolist())
            decode = time.perf_counter() - began
        tokens = [list(row) for row in zip(*picked, strict=True)]
        return {"prefill": prefill, "decode": decode / (given.shape[1] - 1), "tokens": tokens}

    places = Counter(map(str, getattr(model, "hf_device_map", {}).values()))
    dtype = str(model.dtype).removeprefix("torch.")
    serve(answers, {"versions": versions, "places": places, "dtype": dtype}, run)


if __name__ == "__main__":
    start(sys.argv[1], *map(int, sys.argv[2:]))
