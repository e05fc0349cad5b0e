import gzip
import json
import re

import pytest

from emp_callbacks.folders import text_file
from emp_callbacks.folders.text_file import text_pieces


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(text_file, "PIECE", 8)


def read(*files, most=1 << 20):
    return list(text_pieces(files, most, []))


def written(path, data):
    path.write_bytes(data)
    return path


def test_a_text_is_read_as_it_is_but_for_line_ends_and_the_mark_at_its_beginning(tmp_path):
    file = written(tmp_path / "a.txt", "\ufeffone  two\r\n\n drei-vier ü".encode())
    assert read(file) == ["one  two\n\n drei-vier ü"]


def test_a_long_text_comes_in_pieces_that_end_with_a_line(tmp_path, small_pieces):
    file = written(tmp_path / "a.txt", "eins\nzwei\nüüü\nvier, fünf, sechs\nsieben".encode())
    assert read(file) == ["eins\nzwei\n", "üüü\nvier, fünf, sechs\n", "sieben"]


def test_files_are_joined_by_an_empty_line(tmp_path, small_pieces):
    first, second = written(tmp_path / "a.txt", b"one\ntwo\nthree\n"), written(tmp_path / "b.txt", b"four\nfive\nsix\n")
    assert "".join(read(first, second)) == "one\ntwo\nthree\n\n\nfour\nfive\nsix\n"


@pytest.mark.parametrize("name", ["c4.jsonl", "c4.json", "c4.json.gz", "c4.jsonl.gz"])
@pytest.mark.parametrize("piece", [8, 1 << 20])
def test_the_texts_of_json_lines_are_joined_by_an_empty_line(name, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "PIECE", piece)
    texts = ["one\ntwo", "drei\u2028vier", "fünf"]
    data = "\n".join(json.dumps({"text": text, "url": "x"}, ensure_ascii=False) for text in texts).encode() + b"\n\n"
    file = written(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert "".join(read(file)).rstrip("\n") == "one\ntwo\n\ndrei\u2028vier\n\nfünf"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"12345678\n12\xff", "a.txt is no UTF-8 text: byte 0xff at 11; give a text file"),
        ("a.parquet", b"PAR1\x15\x04\x80", "a.parquet is no UTF-8 text: byte 0x80 at 6"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"content": "b"}',
            """must hold an object with a "text" in each line, got '{"con""",
        ),
        ("a.json", b'[{"text": "a"}]', """must hold an object with a "text" in each line, got"""),
        ("a.json", b"{\n", """must hold an object with a "text" in each line, got '{'"""),
        ("a.txt.gz", b"plain", "a.txt.gz is no whole gzip file"),
        ("a.txt.gz", gzip.compress(b"one two three", mtime=0)[:-9], "a.txt.gz is no whole gzip file"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(name, data, message, tmp_path, small_pieces):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(written(tmp_path / name, data))


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.txt"):
        read(tmp_path / "none.txt")
    with pytest.raises(IsADirectoryError) as refused:
        read(tmp_path)
    assert refused.value.filename == str(tmp_path)


def test_what_is_more_than_can_be_read_is_left_with_a_note(tmp_path, small_pieces):
    file, notes = written(tmp_path / "a.txt", b"0123456789\n" * 5), []
    assert "".join(text_pieces([file], 22, notes)) == "0123456789\n" * 2
    assert notes == [f"of the text, the first 0 MiB are read: {file} goes on"]
    assert "".join(text_pieces([file], 55, notes)) == "0123456789\n" * 5
    assert len(notes) == 1


def test_progress_is_the_share_of_all_files_that_is_read(tmp_path, small_pieces):
    files = [written(tmp_path / name, b"0123456789\n" * 2) for name in ("a.txt", "b.txt")]
    shares = []
    list(text_pieces(files, 1 << 20, [], shares.append))
    assert shares == sorted(shares)
    assert len(shares) == 4
    assert shares[-1] == 1.0
