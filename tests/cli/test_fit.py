"""`layerscope fit`: what fits where, without reading a weight."""

import json
import re

import pytest
from command_lines import refusal
from fitting import GIB, TESTS, fitted, printed
from helpers import in_time

from layerscope_jax import Engine, OffloadConfig, load
from layerscope_jax.cli import fit, fit_sizes
from layerscope_jax.cli import main as cli
from layerscope_jax.support import machine

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in fit.FRACTIONS:
        monkeypatch.delenv(name, raising=False)


def test_an_accelerator_has_room_for_what_weights_caches_and_steps_leave(qwen, capsys):
    found = fitted(capsys, qwen, "--device-memory=24GiB", "--host-memory=64GiB", "--context=1024")
    assert found["memory"]["device_bytes"] == 18 * GIB
    needs, chosen = found["needs"], found["chosen"]
    assert needs["dense"] == 2 * (30_532_122_624 - 48 * 128 * 3 * 2048 * 768)
    assert needs["caches"] == 32 * 1024 * 48 * 2 * 4 * 128 * 2
    assert chosen["total_bytes"] == 48 * 128 * 3 * 2048 * 768 * 2
    assert chosen["left_bytes"] == 18 * GIB - needs["total"]
    assert chosen["share"] == chosen["left_bytes"] // chosen["expert_bytes"] / (48 * 128)
    assert (chosen["experts_lie"], found["runs"]) == ("host", True)
    assert [each["format"] for each in found["formats"]][:3] == ["bfloat16", "int8", "int4"]
    assert all(each["share"] > chosen["share"] for each in found["formats"][1:])
    assert "--profile" in found["no_times"]


def test_it_has_the_room_that_an_engine_takes(tiny, capsys, monkeypatch):
    """Of the same free memory, once the dense weights are there."""
    options = ["--device-memory=1GiB", "--host-memory=64GiB", "--context=64", "--max-num-seqs=3"]
    found = fitted(capsys, tiny, *options)
    size, needs = found["chosen"]["expert_bytes"], found["needs"]
    total = needs["total"] + 9 * size
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "1")
    found = fitted(capsys, tiny, f"--device-memory={total}", *options[1:])
    slots = found["chosen"]["left_bytes"] // size
    monkeypatch.setattr(machine, "device_free_bytes", lambda device: total - needs["dense"])
    with Engine(load(tiny), OffloadConfig(policy="lru", context=64, max_num_seqs=3)) as engine:
        assert slots <= engine.budget_bytes // size <= slots + 1
        assert slots in (8, 9)


@pytest.mark.parametrize(
    ("device", "host", "where", "code"),
    [
        ("200GiB", "200GiB", "device", 0),
        ("24GiB", "200GiB", "host", 0),
        ("24GiB", "20GiB", "disk", 0),
        ("8GiB", "200GiB", "nowhere", 1),
    ],
)
def test_where_experts_lie(device, host, where, code, qwen, capsys):
    options = [f"--device-memory={device}", f"--host-memory={host}"]
    found = fitted(capsys, qwen, *options, code=code)
    assert found["chosen"]["experts_lie"] == where
    assert found["runs"] == (where != "nowhere")
    advice = [each["change"] for each in found["advice"]]
    assert (advice == []) == (where == "device")
    assert where != "disk" or any("host memory for all experts" in change for change in advice)
    assert where != "host" or "--dense-format int8" in advice
    assert where != "nowhere" or any(
        change.startswith(
            "--max-num-seqs 16 --context 1024 --prefill-chunk-size 2048 (serve: --max-model-len "
        )
        for change in advice
    )
    said = printed(capsys, qwen, *options, code=code)
    expected = {
        "device": "It fits on the device: there is",
        "host": "It runs with experts in host memory: there is",
        "disk": "of them. Give --host-budget 19GiB.",  # of 20, one of which is left free
        "nowhere": "It does not fit: weights, caches and steps take",
    }
    assert expected[where] in said
    now = f"share the others change {found['chosen']['share']:.0%} {where} as it is"
    assert (now in said) == (where != "device")


def test_packed_experts_may_stay_on_the_disk_once_they_are_converted(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fit_sizes, "HOST_MARGIN", 0)
    assert cli.main(["convert", str(tiny), f"--out={tmp_path / 'int8'}", "--expert-format=int8"]) == 0
    capsys.readouterr()
    memory = ["--device-memory=4GiB", "--context=64", "--max-num-seqs=3"]
    size = fitted(capsys, tmp_path / "int8", *memory, "--host-memory=1GiB")["chosen"]["expert_bytes"]
    few = [*memory, f"--host-memory={3 * size}"]
    assert fitted(capsys, tmp_path / "int8", *few)["chosen"]["experts_lie"] == "disk"
    packing = fitted(capsys, tiny, *few, "--expert-format=int8", code=1)  # which it would have to be first
    assert packing["chosen"]["experts_lie"] == "nowhere"


def test_advice_can_be_followed(qwen, capsys):
    """Every change that is spelled as options gives the share that was promised, by these options."""
    machine = ["--device-memory=24GiB", "--host-memory=64GiB"]
    tried = []
    for each in fitted(capsys, qwen, *machine)["advice"]:
        options = re.match(r"((?: ?--[a-z-]+ \w+)*)", each["change"])[1].split()
        if options:
            tried.append(options[0])
            chosen = fitted(capsys, qwen, *machine, *options)["chosen"]
            assert (chosen["share"], chosen["experts_lie"]) == (each["share"], each["experts_lie"]), options
    assert set(tried) > {"--expert-format", "--dense-format", "--context", "--prefill-chunk-size"}


@pytest.mark.parametrize(
    "command",
    [["generate", "x", "--prompt=y"], ["chat", "x"], ["serve", "x"], ["perplexity", "x", "--text=y"]],
)
def test_commands_that_run_a_model_take_the_same_options(command):
    words = [*command, "--expert-format=int4", "--dense-format=int8", "--prefill-chunk-size=512"]
    parsed = cli.parsed(words)
    assert parsed.engine_config().prefill_chunk_size == 512
    assert (parsed.expert_format, parsed.dense_format) == ("int4", "int8")


def test_advice_is_ordered_by_where_experts_would_lie(qwen, capsys):
    advice = fitted(capsys, qwen, "--device-memory=24GiB", "--host-memory=20GiB")["advice"]
    places = [each["experts_lie"] for each in advice]
    assert (places[0], places[-1]) == ("host", "disk")
    assert places == sorted(places, reverse=True)  # as it happens, by the letter too
    for place in ("host", "disk"):
        shares = [each["share"] for each in advice if each["experts_lie"] == place]
        assert shares == sorted(shares, reverse=True)


def test_formats_and_chunks_are_those_that_are_asked_for(qwen, capsys):
    machine = ["--device-memory=24GiB", "--host-memory=64GiB"]
    plain = fitted(capsys, qwen, *machine)
    chosen = fitted(capsys, qwen, *machine, "--expert-format=int4")["chosen"]
    assert chosen == next(each for each in plain["formats"] if each["format"] == "int4")
    packed = fitted(capsys, qwen, *machine, "--dense-format=int8")
    assert (plain["dense_format"], packed["dense_format"]) == (None, "int8")
    assert packed["needs"]["dense"] < 0.7 * plain["needs"]["dense"]
    short = fitted(capsys, qwen, *machine, "--prefill-chunk-size=256")
    assert short["needs"]["workspace"] < plain["needs"]["workspace"]
    assert "matrices in int8" in printed(capsys, qwen, *machine, "--dense-format=int8")


@pytest.mark.parametrize("device", ["4GiB", "5"])
def test_where_device_and_host_are_both_too_small_it_says_what_would_do(qwen, capsys, device):
    found = in_time(lambda: fitted(capsys, qwen, f"--device-memory={device}", "--host-memory=1GiB", code=1))
    [change] = [each["change"] for each in found["advice"]]
    sizes = re.fullmatch(r"a device with (\S+) GiB, and (\S+) GiB of free host memory", change)
    enough = [f"--device-memory={sizes[1]}GiB", f"--host-memory={sizes[2]}GiB"]
    assert fitted(capsys, qwen, *enough)["runs"]


def test_host_memory_that_is_left_free_is_told(tiny, capsys):
    assert cli.main(["fit", str(tiny), "--device-memory=8GiB", "--host-memory=1GiB"]) == 1
    assert "because 1.00 GiB of it is left free" in " ".join(capsys.readouterr().out.split())


def test_a_cpu_alone_has_all_experts_in_its_memory(tiny, capsys):
    found = fitted(capsys, tiny)
    assert found["memory"]["device"] is None
    assert found["chosen"]["share"] == 1
    assert found["advice"] == []
    small = fitted(capsys, tiny, "--host-memory=1GiB", code=1)
    assert small["chosen"]["experts_lie"] == "nowhere"


def test_a_format_that_the_experts_cannot_have_is_told(tmp_path, capsys):
    """Blocks of 32 numbers do not part 24."""
    config = json.loads((TESTS / "golden" / "qwen3_moe" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 24}))
    found = fitted(capsys, tmp_path)
    assert "32" in found["refused"]["mxfp4"]
    assert "32" in refusal(capsys, "fit", tmp_path, "--expert-format=mxfp4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device-memory=much"], "--device-memory must be a size such as"),
        (["--host-memory=0"], "--host-memory must be more than 0 bytes, got '0'"),
        (["--link=fast"], "--link must be a size such as '8GiB'"),
        (["--link=2GB/s"], "--link is of copies to an accelerator, and there is none; add --device-memory"),
        (
            ["--host-bandwidth=2GB/s", "--profile=qwen3-30b-a3b"],
            "--host-bandwidth is for times without --profile",
        ),
        (["--expert-format=int5"], "--expert-format: "),
        (["--prefill-chunk-size=1"], "prefill_chunk_size must be 16 tokens or more, got 1"),
        (["--context=0"], "context must be 1 or more positions, or None, got 0"),
        (["--context=9999999"], "--context must be at most 40,960 positions"),
        (["--max-num-seqs=0"], "max_num_seqs must be 1 or more, got 0"),
        (["--profile=nothing"], "--profile: profile must be a file"),
        (["--trace=nothing"], "--trace: "),
        (
            ["--profile=mixtral-8x7b", "--device-memory=24GiB", "--host-memory=64GiB"],
            "the profile 'mixtral-8x7b' is of another model: 32 layers of 8 experts",
        ),
    ],
)
def test_refusals(options, message, qwen, capsys):
    assert message in refusal(capsys, "fit", qwen, *options)


def test_the_share_that_jax_takes(qwen, capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    options = ["--device-memory=80GiB", "--host-memory=64GiB"]
    assert fitted(capsys, qwen, *options)["memory"]["device_bytes"] == 40 * GIB
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "most")
    assert "XLA_CLIENT_MEM_FRACTION must be a share" in refusal(capsys, "fit", qwen, *options)
