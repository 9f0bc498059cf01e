"""Configs as they are published are read, and give models of as many parameters as are published."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest

from layerscope_jax.checkpoints.parameters import active_parameters, parameters_by_part
from layerscope_jax.checkpoints.weight_names import family_of, shapes_of_layer
from layerscope_jax.models import FAMILIES, config_from_hf

TESTS = Path(__file__).parents[1]


class Published(NamedTuple):
    """What is published of a model.

    Attributes:
        family: ours.
        total: parameters, to as many digits as are published: the number that the Hub counts in the
            safetensors files, where all of its digits are here; else that of the model's card or paper.
        active: parameters that a token needs, in billions, of the card, the paper or the model's name.
        context: the longest sequence.
        predicting: whether `total` includes a layer that predicts further tokens, with copies of embedding
            and head.
        scales: of 8-bit floating point, which the Hub counts too: one for 128 x 128 numbers.
    """

    family: str
    total: str
    active: str
    context: int
    predicting: bool = False
    scales: int = 0


MODELS = {
    "OLMoE-1B-7B-0924": Published("olmoe", "6919161856", "1.3", 4096),
    "Mixtral-8x7B-v0.1": Published("mixtral", "46702792704", "12.9", 32768),
    "Qwen3-30B-A3B": Published("qwen3_moe", "30532122624", "3.3", 40960),
    "Qwen1.5-MoE-A2.7B": Published("qwen2_moe", "14315784192", "2.7", 8192),
    "Qwen2-57B-A14B": Published("qwen2_moe", "57.4e9", "14", 131072),
    "Qwen3-Next-80B-A3B-Instruct": Published("qwen3_next", "79674391296", "3", 262144),
    "Qwen3.6-35B-A3B": Published("qwen3_5_moe", "35e9", "3", 262144),
    "DeepSeek-V2-Lite": Published("deepseek_v2", "15706484224", "2.4", 163840),
    "DeepSeek-V2": Published("deepseek_v2", "235741434880", "21", 163840),
    "DeepSeek-V3": Published("deepseek_v3", "671e9", "37", 163840),
    "Moonlight-16B-A3B": Published("deepseek_v3", "16e9", "2.24", 8192),
    "Kimi-K2-Instruct": Published("deepseek_v3", "1.0e12", "32", 131072),
    "gpt-oss-20b": Published("gpt_oss", "20.91e9", "3.61", 131072),
    "gpt-oss-120b": Published("gpt_oss", "116.83e9", "5.13", 131072),
    "GLM-4.5": Published("glm4_moe", "358337791296", "32", 131072, predicting=True),
    "GLM-4.5-Air": Published("glm4_moe", "110468824832", "12", 131072, predicting=True),
    "GLM-4.7-Flash": Published("glm4_moe_lite", "31221488576", "3", 202752, predicting=True),
    "MiniMax-M2": Published("minimax_m2", "228703644928", "10", 196608, scales=13_880_064),
    "dots.llm1.inst": Published("dots1", "143e9", "14", 32768),
    "ERNIE-4.5-21B-A3B-PT": Published("ernie4_5_moe", "21.8e9", "3", 131072),
    "ERNIE-4.5-300B-A47B-PT": Published("ernie4_5_moe", "30e10", "47", 131072),
    "gemma-4-26B-A4B-it": Published("gemma4", "25.2e9", "3.8", 262144),
    "granite-3.1-3b-a800m-base": Published("granitemoe", "3.3e9", "0.8", 131072),
    "Phi-3.5-MoE-instruct": Published("phimoe", "41.9e9", "6.6", 131072),
}

ELSEWHERE = {
    "OLMoE-1B-7B-0924": "olmoe",
    "Mixtral-8x7B-v0.1": "mixtral",
    "Qwen3-30B-A3B": "qwen3_moe",
}


def file_of(name):
    if name in ELSEWHERE:
        return TESTS / "golden" / "old_style_configs" / ELSEWHERE[name] / "config.json"
    return TESTS / "models" / "published" / f"{name}.json"


def predicting_layer(config):
    """Parameters of the layer that predicts a token further ahead (arXiv 2412.19437, section 2.2)."""
    shapes = shapes_of_layer(config, config.moe_layers[-1]).values()
    layer = sum(map(math.prod, shapes)) + config.num_experts * config.expert_bytes(1)
    joining = 2 * config.hidden_size**2 + 3 * config.hidden_size
    return layer + joining + 2 * config.vocab_size * config.hidden_size


def unit(number):
    """What the last digit of a number counts."""
    digits, _, power = number.partition("e")
    return 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))


@pytest.mark.parametrize("name", MODELS)
def test_a_published_config_gives_as_many_parameters_as_are_published(name):
    published = MODELS[name]
    config = config_from_hf(json.loads(file_of(name).read_text()))
    parts = parameters_by_part(config)
    total = sum(parts.values()) + (predicting_layer(config) if published.predicting else 0)
    assert abs(total + published.scales - float(published.total)) <= unit(published.total) / 2, f"{total:,}"
    assert config.family == published.family
    assert config.max_position_embeddings == published.context
    # Some count embedding and head among the active ones, some one of the two, some none.
    active, ends = active_parameters(config, parts) / 1e9, parts["embedding and head"] / 1e9
    assert active - ends < float(published.active) + unit(published.active)
    assert active > float(published.active) - unit(published.active)


def test_every_config_is_read_and_every_family_has_one():
    files = {file.stem for file in (TESTS / "models" / "published").glob("*.json")}
    assert files == MODELS.keys() - ELSEWHERE.keys()
    assert {published.family for published in MODELS.values()} == FAMILIES.keys()


def test_the_authors_name_of_an_architecture_is_known_too():
    config = config_from_hf(json.loads(file_of("Phi-3.5-MoE-instruct").read_text()))
    assert family_of(config).architecture == "PhimoeForCausalLM"
