"""One server of a tiny random model for all tests of the folder."""

import openai
import pytest
from helpers import spelling_model
from quick_compiling import compile_quickly

from layerscope_jax import Engine, OffloadConfig
from layerscope_jax.serving.server import Server
from layerscope_jax.serving.settings import ServerConfig

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="session")
def engine():
    """Within a budget, so that experts are copied; two requests at once."""
    compile_quickly(True)
    model = spelling_model()
    config = OffloadConfig(
        device_budget=model.bank.total_bytes // 2, policy="lru", max_num_seqs=2, prefix_cache=True
    )
    with Engine(model, config) as engine:
        yield engine


@pytest.fixture(scope="session")
def server(engine):
    """With a key; clients have half a second to send and to take."""
    config = ServerConfig(
        port=0,
        api_key="secret",
        served_model_name="org/tiny",
        max_waiting=6,
        timeout_s=0.5,
        drain_s=60,
    )
    with Server(engine, config, TEMPLATE) as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    """OpenAI's own."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client
