"""What the tasks beside this file are made of: the prompts that ship with the package, cut in two."""

import json
from importlib.resources import files
from typing import Any

ENDINGS = 4
"""Endings to choose from."""


def passages() -> list[dict[str, Any]]:
    """Returns the passages: each as a whole, its beginning, some endings, and which of them is its own."""
    lines = (files("layerscope_jax") / "shipped" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    middles = [text.rfind(" ", 0, len(text) // 2) for text in texts]
    halves = [(text[:middle], text[middle:]) for text, middle in zip(texts, middles, strict=True)]
    found = []
    for index, (begin, _) in enumerate(halves):
        others = [halves[(index + shift) % len(halves)][1] for shift in range(ENDINGS)]
        own = index % ENDINGS  # the right one is not always the first
        endings = [others[(place - own) % ENDINGS] for place in range(ENDINGS)]
        found.append({"text": texts[index], "begin": begin, "endings": endings, "own": own})
    return found


def dataset(**_: Any) -> dict[str, Any]:
    """Returns the passages as lm-eval takes them."""
    from datasets import Dataset

    return {"test": Dataset.from_list(passages())}
