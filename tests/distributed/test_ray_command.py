"""`layerscope generate` with --ray: options, files of servers that differ, exit codes."""

import json

import pytest
from in_process import use
from recorded import small_profile

from layerscope_jax.cli import main as cli
from layerscope_jax.distributed import job

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": [5, number], "max_new_tokens": 2} for number in range(1, 5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_one_document_is_printed_and_progress_goes_to_stderr(tiny, prompts, tmp_path, monkeypatch, capsys):
    use(monkeypatch)
    out = tmp_path / "out.jsonl"
    command = ["generate", str(tiny), f"--prompts={prompts}", f"--out={out}", "--ray=local", "--json"]
    assert cli.main(command) == 0
    printed, said = capsys.readouterr()
    stats = json.loads(printed)["stats"]
    assert (stats["rows"], stats["new_tokens"], len(stats["workers"])) == (4, 8, 2)
    assert "8 tokens for 4 prompts in" in said
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [0, 1, 2, 3]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "failed": 0, "stats": None}
    assert cli.main([word for word in command if word != "--ray=local"]) == 0  # one engine knows the file
    assert "has 4 of 4 completions already" in capsys.readouterr().err


def test_servers_that_differ_have_their_own_budgets(tiny, prompts, tmp_path, monkeypatch, capsys):
    use(monkeypatch)
    jobs, complete = [], job.Crew
    monkeypatch.setattr(
        job, "Crew", lambda cluster, **options: (jobs.append(cluster.job), complete(cluster, **options))[1]
    )
    profile = tmp_path / "rack.json"
    machine = dict.fromkeys(("cpu", "cores", "device", "memory_bytes"))
    small_profile(machine=machine).save(profile)
    nodes = tmp_path / "nodes.json"
    nodes.write_text(json.dumps({"b": {"device_budget": "70KB"}, "z": {"profile": str(profile)}}))
    command = ["generate", str(tiny), f"--prompts={prompts}", f"--out={tmp_path / 'out.jsonl'}"]
    command += ["--ray=local", f"--nodes={nodes}", "--device-budget=90KB", "--policy=lru"]
    assert cli.main(command) == 0, capsys.readouterr().err
    assert "no node is called z; there are a, b" in capsys.readouterr().err
    budgets = [jobs[0].config_on([name]).device_budget for name in "abz"]
    assert budgets == ["90KB", "70KB", "90KB"]
    assert jobs[0].config_on(["z"]).profile.name == small_profile().name
    nodes.write_text('{"b": {"device_budget": "much"}, "c": {"policy": "lru"}, "d": 5}')
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --nodes: {nodes}: b: ")
    assert "c must be an object with some of device_budget, host_budget, profile" in said
    assert "d must be an object" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers=2"], "--workers is for many servers; give --ray ADDRESS too"),
        (["--ray=local"], "--ray needs --out FILE"),
        (["--ray=local", "--out=o.jsonl", "--bound"], "--bound is for one engine; leave it or --ray out"),
        (["--out=o.parquet"], "Parquet files are written with --ray"),
        (["--ray=local", "--out=o.jsonl", "--workers=0"], "workers must be 1 or more, got 0"),
        (["--prompt-column=text"], "expected a Parquet file, whose column 'text' is read"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message, tiny, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", str(tiny), f"--prompts={prompts}", *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_one_engine_reads_parquet_files_too(tiny, tmp_path, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "prompts.parquet"
    rows = [{"question": [{"role": "user", "content": "Who?"}], "n": None}, {"question": None, "n": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), file)
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    command = ["generate", str(tiny), f"--prompts={file}", "--prompt-column=question"]
    assert cli.main([*command, f"--chat-template={template}", "--max-new-tokens=2", "--json"]) == 0
    [line] = json.loads(capsys.readouterr().out)["completions"]
    assert line["messages"] == [{"role": "user", "content": "Who?"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert cli.main(command) == 2
    assert (
        "prompts.parquet, row 1: prompt must be text or a list of token ids, got None"
        in capsys.readouterr().err
    )
