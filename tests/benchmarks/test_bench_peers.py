"""The benchmark of other runtimes: what it writes without any, and how it drives those it is given."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks import bench_peers
from benchmarks.llama_cpp import LlamaCpp, parse, placeholder_tokenizer
from benchmarks.peer_process import PeerProcess

# As llama-batched-bench of llama.cpp 0.5.0-dev printed them: --output-format jsonl -npp 128 -ntg 16 -npl 1,8
PRINTED = """\
{"n_kv_max": 16384, "n_batch": 2048, "n_ubatch": 2048, "flash_attn": -1, "is_pp_shared": 0, \
"n_gpu_layers": -1, "n_threads": 2, "n_threads_batch": 2, "pp": 128, "tg": 16, "pl": 1, "n_kv": 144, \
"t_pp": 0.165197, "speed_pp": 774.832458, "t_tg": 0.133367, "speed_tg": 119.969704, \
"t": 0.298564, "speed": 482.308624}
{"n_kv_max": 16384, "n_batch": 2048, "n_ubatch": 2048, "flash_attn": -1, "is_pp_shared": 0, \
"n_gpu_layers": -1, "n_threads": 2, "n_threads_batch": 2, "pp": 128, "tg": 16, "pl": 8, "n_kv": 1152, \
"t_pp": 1.388137, "speed_pp": 737.679382, "t_tg": 0.892410, "speed_tg": 143.431839, \
"t": 2.280547, "speed": 505.141998}
"""


def test_rates_and_ratios_are_those_of_the_seconds():
    seconds = {
        "engine": {"prefill": [2.0, 2.0], "decode": [0.5, 0.5]},
        "vllm": {"prefill": [1.0, 1.0], "decode": [1.0, 2.0]},
    }
    found = bench_peers.compare(seconds, batch=8, width=100)
    assert found["tokens_per_s"]["prefill"]["vllm"]["median"] == 800
    assert found["tokens_per_s"]["decode"]["engine"]["median"] == 16
    assert found["ms"]["decode"]["engine"]["median"] == 500
    assert found["to_engine"]["prefill"] == {"vllm": {"median": 0.5, "p90": 0.5}}
    assert found["to_engine"]["decode"]["vllm"]["median"] == 3.0


def test_everybody_computes_in_the_dtype_of_the_checkpoint():
    bench_peers.check_dtypes({"engine": "float32", "vllm": "float32"}, "float32")
    with pytest.raises(ValueError, match="vllm computes in bfloat16; expected float32"):
        bench_peers.check_dtypes({"engine": "float32", "vllm": "bfloat16"}, "float32")


def test_the_converter_of_llama_cpp_is_asked_for():
    with pytest.raises(SystemExit, match="--llama-bench and --llama-convert need each other"):
        bench_peers.main(bench_peers.Options(quick=True, llama_bench=Path("llama-batched-bench")))


def test_the_second_point_of_llama_cpp_is_the_measured_one():
    lines = [*PRINTED.splitlines(), "", '{"peak_bytes": 4096}']
    assert parse(lines) == {"prefill": 1.388137, "decode": 0.89241 / 16, "peak_bytes": 4096}
    assert parse(lines[:1] + lines[2:]) is None


def program(file: Path, source: str) -> Path:
    file.write_text(f"#!{sys.executable}\n{source}")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_llama_cpp_is_run_again_if_its_output_is_lost(tmp_path):
    checkpoint, into = tmp_path / "checkpoint", tmp_path / "gguf"
    checkpoint.mkdir()
    into.mkdir()
    (checkpoint / "config.json").write_text(json.dumps({"vocab_size": 300, "dtype": "bfloat16"}))
    converter = program(
        tmp_path / "convert",
        """
import json, sys
from pathlib import Path

folder, *options = sys.argv[1:]
vocabulary = json.loads((Path(folder) / "tokenizer.json").read_text())["model"]["vocab"]
assert len(vocabulary) == 300
assert options == ["--outfile", options[1], "--outtype", "bf16"]
Path(options[1]).touch()
""",
    )
    bench = program(
        tmp_path / "bench",
        f"""
import sys
from pathlib import Path

if sys.argv[1:] == ["--version"]:
    print("version: 1 (commit abc)\\nbuilt with nothing", file=sys.stderr)
else:
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    assert Path(options["-m"]).exists() and options["-npl"] == "1,8,1" and options["-ntg"] == "16"
    assert int(options["-c"]) == 8 * 256
    calls = Path({str(tmp_path / "calls")!r})
    again = calls.exists()
    calls.touch()
    print({PRINTED!r} if again else {PRINTED.splitlines()[0]!r})
""",
    )
    llama = LlamaCpp(bench, converter, checkpoint, into, threads=2)
    assert llama.versions == {"llama.cpp": "1 (commit abc)"}
    found = llama.run(8, 128, 16)
    assert (found["prefill"], found["decode"]) == (1.388137, 0.89241 / 16)
    assert 2**20 < found["peak_bytes"] < 2**30  # of a small program, not of this process


def test_fewer_bits_are_asked_of_llama_cpp_by_its_own_names(tmp_path):
    checkpoint, into = tmp_path / "checkpoint", tmp_path / "gguf"
    checkpoint.mkdir()
    into.mkdir()
    (checkpoint / "config.json").write_text(json.dumps({"vocab_size": 300, "dtype": "bfloat16"}))
    writes = "import sys; open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write(sys.argv[-1])\n"
    quantises = "import sys; open(sys.argv[2], 'w').write(open(sys.argv[1]).read() + ' as ' + sys.argv[3])\n"
    converter, quantize = program(tmp_path / "convert", writes), program(tmp_path / "quantize", quantises)
    bench = program(tmp_path / "bench", "import sys; print('version: 1', file=sys.stderr)\n")
    llama = LlamaCpp(bench, converter, checkpoint, into, 2, (quantize, "int4"))
    assert llama._model.read_text() == "bf16 as q4_K_S"
    with pytest.raises(SystemExit, match="--packed takes int8, int4; got fp8"):
        bench_peers.main(bench_peers.Options(packed=("fp8",)))


def test_a_program_that_fails_is_quoted(tmp_path):
    checkpoint, into = tmp_path / "checkpoint", tmp_path / "gguf"
    checkpoint.mkdir()
    into.mkdir()
    (checkpoint / "config.json").write_text(json.dumps({"vocab_size": 300, "dtype": "float32"}))
    converter = program(tmp_path / "convert", "raise SystemExit('no such architecture')\n")
    with pytest.raises(ValueError, match=r"convert ended with code 1: no such architecture"):
        LlamaCpp(tmp_path / "bench", converter, checkpoint, into, threads=2)


@pytest.mark.parametrize("size", [256, 300])
def test_the_placeholder_tokenizer_has_every_id(tmp_path, size):
    placeholder_tokenizer(tmp_path / "tokenizer.json", size)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == size
    assert tokenizer.token_to_id("<0x0A>") is not None  # llama.cpp asks for the end of a line


PEER = """
import os
from benchmarks.peer_process import serve, take_stdout

answers = take_stdout()
print("a library's greeting")
os.system("echo and its compiler\'s")
serve(answers, {"threads": os.environ["THREADS"]}, lambda number: {"half": 10 / number})
"""


def test_a_peer_answers_until_it_is_closed(tmp_path, monkeypatch):
    (tmp_path / "halves.py").write_text(PEER)
    monkeypatch.chdir(tmp_path)  # where a module is looked for
    with PeerProcess("halves", Path(sys.executable), "halves", [], {"THREADS": "3"}) as peer:
        assert peer.first == {"threads": "3"}
        assert peer.ask(number=4) == {"half": 2.5}
        assert peer.ask(number=0) == {"error": "ZeroDivisionError: division by zero"}
        assert peer.ask(number=5) == {"half": 2.0}
        os.kill(peer.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(peer.pid, 0)


def test_a_peer_that_does_not_start_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the process that runs nothing ended with code 3"):
        PeerProcess("nothing", Path(sys.executable), "broken", [], {})
