"""`emp tokenize`, as it is typed."""

import json

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from emp_callbacks.cli.main import main
from emp_callbacks.study.token_output import TokenOutput

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 40


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ByT5Tokenizer().save_pretrained("tokenizer")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": f"row {i}"}) + "\n" for i in range(100)))
    return tmp_path


def emp(*words):
    return main(["tokenize", *words, "--tokenizer", "tokenizer", "--workers", "1"])


def test_one_file(home, capsys):
    assert emp("text.txt", "--out", "new/data.bin", "--no-eot") == 0
    assert bytes((np.fromfile("new/data.bin", np.uint16) - 3).astype(np.uint8)) == TEXT.encode()
    assert "new/data.bin: 1,800 tokens (uint16, vocabulary of 384) of 1 documents" in capsys.readouterr().out


def test_a_folder_of_parts_by_fractions_and_by_files(home, capsys):
    words = ("rows.jsonl", "--field", "body", "--val-fraction", "0.1", "--test", "rows.jsonl", "--out", "data")
    assert emp(*words) == 0
    told = {part: json.loads((home / "data" / f"{part}.bin.json").read_text()) for part in ("train", "val", "test")}
    assert told["train"]["documents"] + told["val"]["documents"] == told["test"]["documents"] == 100
    assert told["val"]["documents"] == pytest.approx(10, abs=1)
    before = (home / "data" / "train.bin").stat().st_mtime_ns
    assert emp(*words) == 0  # nothing is left to do
    assert (home / "data" / "train.bin").stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("data/val.bin: ") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("text.txt", "--out", "a.bin", "--val-fraction", "0.1"), "--out a.bin is one file; name a folder"),
        (("text.txt", "--out", "a", "--val-fraction", "1.5"), "--val-fraction must lie in (0, 1), got 1.5"),
        (("text.txt", "--out", "a", "--val-fraction", "0.5", "--test-fraction", "0.5"), "leave nothing for train.bin"),
        (("nowhere.txt", "--out", "a.bin"), "there is no file or folder nowhere.txt"),
        (("tokenizer", "text.txt", "--out", "a.bin", "--field", "x"), 'must hold an object with a "x"'),
        (("text.txt", "--out", "a.bin", "--workers", "0"), "workers must be an integer >= 1, got 0"),
    ],
)
def test_what_cannot_be_done_is_one_line(words, message, home, capsys):
    assert main(["tokenize", "--tokenizer", "tokenizer", "--workers", "1", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not list(home.glob("a*"))


def test_ctrl_c_says_how_to_go_on(home, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenOutput, "add", interrupted)
        assert emp("text.txt", "--out", "a.bin") == 130
    assert "emp: interrupted; the same command goes on" in capsys.readouterr().err
    assert emp("text.txt", "--out", "a.bin") == 0
