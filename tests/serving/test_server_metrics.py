"""The metrics that docs/serving.md names are there, mean what it says, and change with requests."""

import re
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
from docs_pages import ROOT
from serving_calls import MODEL, get, metric, post, until

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPT = "Call me"
LONG = "Someone must have slandered Josef K., "  # at least 16 tokens have to be shared
SAMPLED = {"model": MODEL, "prompt": PROMPT, "temperature": 0.9, "max_tokens": 6, "n": 2, "seed": 5}


def documented(kind):
    page = (ROOT / "docs" / "serving.md").read_text()
    section = page.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    return set(re.findall(rf"`({kind}:\w+)`", section))


def values(server):
    """What every metric is, summed over its labels; of histograms the count and the sum."""
    found = defaultdict(float)
    for name, value in re.findall(r"^(\w+:\w+){.*} (\S+)$", get(server, "/metrics")[2], re.MULTILINE):
        if not name.endswith(("_bucket", "_created")):
            found[name] += float(value)
    return found


def sample(name, found):
    return name if name in found else f"{name}_count"


def test_every_documented_name_is_there_and_changes(engine, server, monkeypatch):
    step, steps, gate = engine.runner.step, [], threading.Event()

    def gated(*arguments):
        steps.append(arguments)
        assert len(steps) == 1 or gate.wait(30)  # the second step waits, and so requests go on running
        return step(*arguments)

    before = values(server)
    monkeypatch.setattr(engine.runner, "step", gated)
    with ThreadPoolExecutor(1) as threads:
        with engine._turns.turn():
            answer = threads.submit(post, server, SAMPLED)
            until(lambda: metric(server, "vllm:num_requests_waiting") == 2)
            seen = [values(server)]
        until(lambda: metric(server, "vllm:num_requests_running") == 2)
        seen.append(values(server))
        gate.set()
        assert answer.result()[0] == 200
    for end in ("for", "one"):
        post(server, {"model": MODEL, "prompt": LONG + end, "temperature": 0, "max_tokens": 2})
    seen.append(values(server))
    kinds = re.findall(r"^# TYPE (vllm:\S+) ", get(server, "/metrics")[2], re.MULTILINE)
    assert {kind for kind in kinds if not kind.endswith("_created")} == documented("vllm")
    for name in documented("vllm"):
        key = sample(name, before)
        assert any(each[key] > before[key] for each in seen), name
    assert (
        documented("layerscope") - {"layerscope:forecast_recall"} <= seen[-1].keys()
    )  # nothing forecasts here
    assert seen[1]["vllm:kv_cache_usage_perc"] == 1  # both slots


def test_what_they_mean(server):
    """Times add up; a sample counts as a request, and a prompt's tokens and longest sample once."""
    before = values(server)
    post(server, SAMPLED)
    after = values(server)
    grown = {name.removeprefix("vllm:"): after[name] - before[name] for name in after}
    parts = [grown[f"request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(grown["e2e_request_latency_seconds_sum"])
    assert sum(parts[:2]) == pytest.approx(grown["time_to_first_token_seconds_sum"])
    assert parts[2] == pytest.approx(grown["inter_token_latency_seconds_sum"])
    for name, value in {
        "prompt_tokens_total": len(PROMPT),
        "generation_tokens_total": 12,
        "time_to_first_token_seconds_count": 2,
        "inter_token_latency_seconds_count": 10,
        "request_prompt_tokens_sum": 2 * len(PROMPT),
        "request_generation_tokens_sum": 12,
        "request_generation_tokens_count": 2,
        "request_max_num_generation_tokens_sum": 6,
        "request_max_num_generation_tokens_count": 1,
        "request_success_total": 2,
    }.items():
        assert grown[name] == value, name


def test_experts(server):
    post(server, SAMPLED)
    needed, hits = (metric(server, f"layerscope:{name}_total") for name in ("experts_needed", "expert_hits"))
    assert 0 < hits < needed
    assert metric(server, "layerscope:hit_rate") == pytest.approx(hits / needed)
    assert metric(server, "layerscope:bytes_moved_total", cause="demand") > 0
    assert 0 < metric(server, "layerscope:link_share") < 1
