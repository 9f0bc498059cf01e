"""Jobs of many engines, in this process: files, resuming, refusals; the same lines as of one engine."""

import errno
import json
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from in_process import use
from recorded import small_profile
from small_checkpoint import write_checkpoint

import layerscope_jax as ls
from layerscope_jax.cli import main as cli
from layerscope_jax.distributed import tables, worker
from layerscope_jax.distributed.job import ClusterUse, complete, generate
from layerscope_jax.generation.batch_files import CompletionFile
from layerscope_jax.support.errors import LostWorkers

pytestmark = pytest.mark.usefixtures("quick_compiles")

EXACT = ls.OffloadConfig(numerics="exact", max_num_seqs=2)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of sixteen prompts."""
    file, draws = tmp_path_factory.mktemp("prompts") / "prompts.jsonl", np.random.default_rng(0)
    with file.open("w") as lines:
        for number in range(16):
            row = {"id": f"r{number}", "max_new_tokens": int(draws.integers(1, 7)), "ignore_eos": True}
            row["prompt"] = draws.integers(1, 600, 1 + number % 5).tolist()
            lines.write(json.dumps(row) + "\n")
    return file


@pytest.fixture(scope="module")
def alone(tiny, prompts, tmp_path_factory):
    """The file of completions that one engine writes, in the order of the prompts."""
    out = tmp_path_factory.mktemp("alone") / "out.jsonl"
    args = ["generate", str(tiny), f"--prompts={prompts}", f"--out={out}", "--numerics=exact"]
    assert cli.main([*args, "--max-num-seqs=2"]) == 0
    order = [json.loads(line)["id"] for line in prompts.read_text().splitlines()]
    lines = {json.loads(line)["id"]: line for line in out.read_text().splitlines()}
    return [lines[name] for name in order]


def test_lines_are_those_of_one_engine_whatever_is_lost(tiny, prompts, alone, tmp_path, monkeypatch, capsys):
    use(monkeypatch, count=4, ends={"a": 2, "b": 3, "d": 1})
    out = tmp_path / "out.jsonl"
    report = generate(prompts, model=tiny, out=out, config=EXACT)
    assert out.read_text().splitlines() == alone
    assert (report.rows, report.done_before, report.failed) == (16, 0, 0)
    assert sum(worker.rows for worker in report.workers) == 16
    assert [worker.lost for worker in report.workers if worker.lost] == ["its process was killed"] * 3
    assert "3 of them lost" in report.summary()
    assert capsys.readouterr().err.count("was lost (its process was killed)") == 3
    again = generate(prompts, model=tiny, out=out, config=EXACT)
    assert (again.done_before, again.workers) == (16, ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl"]


def test_what_one_engine_began_many_continue(tiny, prompts, alone, tmp_path, monkeypatch):
    use(monkeypatch)
    out = tmp_path / "out.jsonl"
    out.write_text("\n".join(alone[3:9]) + "\n" + alone[1][:40])  # an unfinished last line
    report = generate(prompts, model=tiny, out=out, config=EXACT)
    assert (report.done_before, sum(worker.rows for worker in report.workers)) == (6, 10)
    assert out.read_text().splitlines() == alone


def test_a_full_disk_ends_a_job_that_is_continued_when_there_is_room(
    tiny, prompts, alone, tmp_path, monkeypatch
):
    use(monkeypatch)
    out, write, taken = tmp_path / "out.jsonl", CompletionFile.write, []

    def full(file, line):
        taken.append(line)
        if len(taken) > 5:
            file._file.write(line[:20])  # as much as there is room for
            file._file.truncate(file._file.seek(0, 2) - 20)
            raise OSError(errno.ENOSPC, "No space left on device", str(file.path))
        write(file, line)

    with monkeypatch.context() as patch:
        patch.setattr(CompletionFile, "write", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*out.jsonl'"):
            generate(prompts, model=tiny, out=out, config=EXACT)
    assert len(out.read_bytes().splitlines()) == 5
    assert set(out.read_text().splitlines()) <= set(alone)
    assert generate(prompts, model=tiny, out=out, config=EXACT).done_before == 5
    assert out.read_text().splitlines() == alone


@pytest.fixture
def page(tmp_path):
    """A folder whose file system has room for two pages: the lock has one, some of the lines the other."""
    folder = tmp_path / "page"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(tiny, prompts, alone, page, tmp_path, monkeypatch):
    use(monkeypatch)
    with pytest.raises(OSError, match=r"No space left on device: '.*out.jsonl'"):
        generate(prompts, model=tiny, out=page / "out.jsonl", config=EXACT)
    lines = (page / "out.jsonl").read_text().splitlines()
    assert 0 < len(lines) < 16
    assert set(lines) <= set(alone)
    out = tmp_path / "out.jsonl"
    shutil.copy(page / "out.jsonl", out)  # to where there is room
    assert generate(prompts, model=tiny, out=out, config=EXACT).done_before == len(lines)
    assert out.read_text().splitlines() == alone


def test_no_room_for_a_sorted_copy_leaves_the_lines(tiny, prompts, alone, tmp_path, monkeypatch, capsys):
    use(monkeypatch)

    def full(file, content):
        raise ValueError(f"cannot write to {file.parent}: No space left on device")

    monkeypatch.setattr("layerscope_jax.distributed.job.write_file", full)
    out = tmp_path / "out.jsonl"
    generate(prompts, model=tiny, out=out, config=EXACT)
    assert sorted(out.read_text().splitlines()) == sorted(alone)
    assert "stays in the order in which rows were completed: cannot write" in capsys.readouterr().err


def test_tables_in_and_out(tiny, prompts, alone, tmp_path, monkeypatch, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    use(monkeypatch)
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    for row in rows:
        row["words"] = row.pop("prompt")
        row["source"] = "drawn"
    folder = tmp_path / "prompts"
    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows[:7]), folder / "0.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows[7:]), folder / "1.parquet")
    out = tmp_path / "out.parquet"
    settings = {"column": "words", "config": EXACT}
    generate(folder, model=tiny, out=out, **settings)
    assert "columns that are not read: source" in capsys.readouterr().err
    table = parquet.read_table(out).to_pylist()
    assert [record["line"] for record in table] == alone
    for record, line in zip(table, map(json.loads, alone), strict=True):
        assert {name: record[name] for name in ("id", "text", "token_ids", "finish_reason", "model")} == {
            name: line[name] for name in ("id", "text", "token_ids", "finish_reason", "model")
        }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "prompts"]
    assert generate(folder, model=tiny, out=out, **settings).done_before == 16
    with pytest.raises(ValueError, match=r"out.parquet: expected a file that does not exist, or the compl"):
        generate(folder, model=tiny, out=out, **settings, temperature=0.5)
    with pytest.raises(ValueError, match=r"0.parquet: expected a column 'prompt' of prompts, got 'id', "):
        generate(folder, model=tiny, out=tmp_path / "other.jsonl", config=EXACT)
    (folder / "2.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(ValueError, match=r"2.parquet: expected a Parquet file, got"):
        generate(folder, model=tiny, out=tmp_path / "other.jsonl", **settings)
    parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), folder / "2.parquet")
    with pytest.raises(ValueError, match=r"2.parquet, row 0: id 'r0' is used by \S*0.parquet, row 0 already"):
        generate(folder, model=tiny, out=tmp_path / "other.jsonl", **settings)
    assert not (tmp_path / "other.jsonl").exists()


def test_samples_and_texts_of_tables(tmp_path):
    pytest.importorskip("pyarrow")
    line = {"id": 3, "prompt": "a", "model": "m", "settings": {}}
    line["completions"] = [{"index": 0, "text": "b"}, {"index": 1, "text": "c", "error": "not finite"}]
    rows = [tables.rows_of([("", {"id": 3, "prompt": "a"})], {})[0]]
    tables.write_table(tmp_path / "t.parquet", rows, [json.dumps(line).encode() + b"\n"], "d1")
    assert (tables.job_of(tmp_path / "t.parquet"), tables.failed_in(tmp_path / "t.parquet")) == ("d1", 1)
    mixed = tables.rows_of([("", {"id": 1, "prompt": "a"}), ("", {"id": "1", "prompt": "a"})], {})
    with pytest.raises(ValueError, match="ids of one column must differ as texts"):
        tables.check_rows(mixed)


def test_a_prompt_that_no_engine_takes_is_refused_before_any_is_completed(tiny, tmp_path, monkeypatch):
    use(monkeypatch)
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": [5]}\n{"prompt": [5, 600]}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: the prompt has ids outside 0..599: \[600\]"):
        generate(file, model=tiny, out=tmp_path / "out.jsonl", config=EXACT)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_requests_of_openais_api_are_refused_or_answered(tiny, tmp_path, monkeypatch, capsys):
    use(monkeypatch)
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    call = {"method": "POST", "url": "/v1/completions"}
    bodies = [{"prompt": "Call me", "max_tokens": 2, "temperature": 0}, {"prompt": "", "max_tokens": 2}]
    lines = [{"custom_id": str(number), **call, "body": body} for number, body in enumerate(bodies)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = generate(file, model=tiny, out=out, config=EXACT)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["response"]["status_code"] for answer in answers] == [200, 400]
    assert report.failed == 1
    assert ":2: refused: the prompt is empty" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"let --out end in .jsonl"):
        generate(file, model=tiny, out=tmp_path / "out.parquet", config=EXACT)


def test_a_node_with_less_memory_than_its_profile_says_is_named(tiny, prompts, alone, tmp_path, monkeypatch):
    use(monkeypatch)
    profile = small_profile(machine={"cpu": None, "cores": None, "device": None, "memory_bytes": 2**50})
    profile.save(tmp_path / "large.json")
    out = tmp_path / "out.jsonl"
    out.write_text(alone[4] + "\n")
    nodes = {"b": replace(EXACT, profile=tmp_path / "large.json")}
    with pytest.raises(ValueError, match=r"node b: expected as much memory as the profile .* says, 1048576"):
        generate(prompts, model=tiny, out=out, config=EXACT, nodes=nodes)
    assert out.read_text().splitlines()[0] == alone[4]


def test_a_checkpoint_that_differs_on_a_node_is_named(tiny, prompts, tmp_path, monkeypatch):
    class OnItsOwnDisk(worker.Worker):
        """Finds another checkpoint at the same path, if it is on node b."""

        def __init__(self, job, place):
            super().__init__(replace(job, checkpoint=str(other)) if place.node.name == "b" else job, place)

    other = write_checkpoint(tmp_path / "other", num_experts=6)
    use(monkeypatch)
    job, rows = worker.Job(checkpoint=str(tiny), config=EXACT), tables.read_rows(prompts, {})
    with pytest.raises(ValueError, match=r"node b runs another model than node a: checkpoint \w+, not \w+"):
        complete(rows, tmp_path / "out.jsonl", job, ClusterUse(), OnItsOwnDisk)


def test_settings_out_of_range_are_named_together(tiny, prompts, tmp_path):
    nodes = {"a": replace(EXACT, numerics="auto")}
    with pytest.raises(ValueError, match=r"workers must be 1 or more, got 0; retries must be 0 .*numerics"):
        generate(
            prompts,
            model=tiny,
            out=tmp_path / "out.jsonl",
            config=EXACT,
            workers=0,
            retries=-1,
            timeout_s=0,
            nodes=nodes,
        )


def test_an_engine_that_cannot_be_made_is_tried_on_other_nodes(tiny, prompts, tmp_path, monkeypatch):
    use(monkeypatch, count=3)

    def failing(config):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(worker, "check_memory", failing)
    with pytest.raises(LostWorkers, match=r"were lost: node \w: Input/output error; .*"):
        generate(prompts, model=tiny, out=tmp_path / "out.jsonl", config=EXACT, retries=1)
    assert list(tmp_path.iterdir()) == []
