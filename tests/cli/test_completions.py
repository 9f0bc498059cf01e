"""Files of completions: gone on with where they stop, left alone where they are others'."""

import pytest
from command_lines import write
from hypothesis import given
from hypothesis import strategies as st

from layerscope_jax.generation.batch_files import CompletionFile, completion
from layerscope_jax.generation.completions import Output
from layerscope_jax.generation.prompt_files import Row, read_prompts
from layerscope_jax.generation.requests import Request

MODEL = "1b06093c6a5c"


def output(text, tokens, reason):
    return Output(text=text, token_ids=tokens, finish_reason=reason)


@pytest.fixture
def rows(prompts):
    return read_prompts(prompts, {})


def test_ids_default_to_the_number(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "id": "x"}, {"prompt": "c"}])
    assert [row.id for row in read_prompts(file, {})] == [0, "x", 2]


def test_notes_and_a_byte_order_mark_are_passed_over(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "metadata": {"n": [1]}}\n{"prompt": "b", "metadata": 2}')
    assert [row.request for row in read_prompts(file, {})] == [Request(prompt="a"), Request(prompt="b")]


def test_cut_at_every_byte_of_the_last_line(rows, tmp_path):
    file, rows = tmp_path / "out.jsonl", rows[:3]
    lines = [completion(row, [output("Löffel 匙", [1, 2], "stop")], MODEL) for row in rows]
    whole = b"".join(lines)
    for length in range(len(whole) - len(lines[-1]), len(whole)):
        file.write_bytes(whole[:length])
        with CompletionFile(file, rows, MODEL) as found:
            assert found.done == {"sea", 7}
            assert file.read_bytes() == b"".join(lines[:-1])
            found.write(lines[-1])
        assert file.read_bytes() == whole


@given(st.binary(min_size=1, max_size=80))
def test_other_files_are_left_alone(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("other") / "out"
    file.write_bytes(content)
    row = Row("a", Request(prompt="b"), "")
    if not completion(row, [output("", [], "")], MODEL).startswith(content):
        with pytest.raises(ValueError, match="the file belongs to other prompts"):
            CompletionFile(file, [row], MODEL)
        assert file.read_bytes() == content


def test_other_prompts_are_refused(rows, tmp_path):
    file = tmp_path / "out.jsonl"
    for line in (
        completion(Row("sea", Request(prompt="Call me Ahab."), ""), [output("", [], "stop")], MODEL),
        completion(Row("ocean", rows[0].request, ""), [output("", [], "stop")], MODEL),
        b'{"id": "sea", "prompt": "Call me Ishmael."}\n',
        b"\n",
    ):
        file.write_bytes(line)
        with pytest.raises(ValueError, match="jsonl:1: expected a completion of one of these prompts"):
            CompletionFile(file, rows, MODEL)
        assert file.read_bytes() == line


def test_a_full_disk_leaves_whole_lines(rows, tmp_path):
    class Full:
        """Takes half of what it is given, then nothing."""

        def __init__(self, file):
            self.file = file
            self.full = False

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if self.full:
                raise OSError(28, "No space left on device")
            self.full = True
            return self.file.write(data[: len(data) // 2])

    file = tmp_path / "out.jsonl"
    line = completion(rows[0], [output("text", [1], "stop")], MODEL)
    with CompletionFile(file, rows, MODEL) as found:
        found.write(line)
        found._file = Full(found._file)
        with pytest.raises(OSError, match=r"No space left on device: '.*out.jsonl'"):
            found.write(completion(rows[1], [output("text", [1], "stop")], MODEL))
    assert file.read_bytes() == line
