"""The openai client: starts `layerscope serve`, and talks with it as with OpenAI's API.

pip install '.[serve]' openai
python examples/openai_client.py [checkpoint]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from openai import OpenAI

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
"""The shipped model is no chat model and has no template; a checkpoint that is one needs none of ours."""


def main(checkpoint: str = "shipped") -> None:
    """Serves a model on any free port, asks for a completion, streams a chat, and ends the server."""
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template.jinja"
        template.write_text(TEMPLATE)
        options = ["--port=0", "--served-model-name=small", f"--chat-template={template}", "--json"]
        command = [sys.executable, "-m", "layerscope_jax.cli", "serve", checkpoint, *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                talk(json.loads(server.stdout.readline()))  # printed as soon as it answers
            finally:
                server.terminate()  # running requests may end first


def talk(address: dict[str, str]) -> None:
    """Prints a completion and a streamed chat."""
    with OpenAI(base_url=address["url"], api_key="none") as client:
        print([model.id for model in client.models.list()])
        name, settings = address["model"], {"max_tokens": 4, "temperature": 0}
        found = client.completions.create(model=name, prompt="Call me", **settings)
        print(found.choices[0].text, found.usage)
        messages = [{"role": "user", "content": "Who are you?"}]
        for part in client.chat.completions.create(model=name, messages=messages, stream=True, **settings):
            print(part.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
