"""Write `tests/golden/chat_templates/expected.json`: the prompts that transformers makes of conversations.

    python tools/make_chat_goldens.py

Needs transformers; the tests only read what it wrote, so they do not.
"""

import datetime
import json
import sys
from pathlib import Path

try:
    import jinja2
    import transformers
    from tokenizers import Tokenizer, models
    from transformers.utils import chat_template_utils
except ImportError as error:
    sys.exit(f"make_chat_goldens.py needs transformers, tokenizers and jinja2 ({error})")

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden" / "chat_templates"
TODAY = datetime.datetime(2026, 2, 3, 4, 5, 6)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town <now>",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "description": "Its name"}},
            "required": ["town"],
        },
    },
}
CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "weather", "arguments": {"town": "Köln"}},
}
CONVERSATIONS = {
    "plain": {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi ☃ <b>&\n"}]
    },
    "turns": {
        "messages": [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Two.", "reasoning": "It is next.", "tool_calls": None},
            {"role": "user", "content": "Three?"},
        ],
        "chat_template_kwargs": {"enable_thinking": False, "thinking": True},
    },
    "finished": {
        "messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}],
        "add_generation_prompt": False,
    },
    "tools": {"messages": [{"role": "user", "content": "Rain in Köln?"}], "tools": [WEATHER]},
    "answered": {
        "messages": [
            {"role": "user", "content": "Rain in Köln?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": '{"rain": 3}'},
        ],
        "tools": [WEATHER],
    },
    "wrong": {"messages": [{"role": "nobody", "content": "One?"}, {"role": "user", "content": "Two?"}]},
}
"""Fields of `Request`."""


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return TODAY


def prompt_of(template, request):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), chat_template=template, **TOKENS
    )
    request = dict(request)
    extra = request.pop("chat_template_kwargs", {})
    request.setdefault("add_generation_prompt", True)
    try:
        return tokenizer.apply_chat_template(request.pop("messages"), tokenize=False, **request, **extra)
    except (jinja2.TemplateError, TypeError) as error:
        return {"error": str(error)}


def main():
    chat_template_utils.datetime = Clock
    templates = {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.jinja"))}
    expected = {
        "transformers": transformers.__version__,
        "today": TODAY.isoformat(),
        "tokens": TOKENS,
        "conversations": CONVERSATIONS,
        "prompts": {
            name: {about: prompt_of(template, request) for about, request in CONVERSATIONS.items()}
            for name, template in templates.items()
        },
    }
    text = json.dumps(expected, indent=1, ensure_ascii=False)
    (FOLDER / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
