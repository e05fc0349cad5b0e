import gzip
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from emp_callbacks.study import documents, token_output, tokenizing
from emp_callbacks.study.documents import Place, cut, pieces
from emp_callbacks.study.folder_lock import LOCKS, BusyError
from emp_callbacks.study.recipe.text_tokenizer import TextTokenizer
from emp_callbacks.study.text_sources import sources_of
from emp_callbacks.study.tokenizing import tokenize
from tests.study.recipe.token_makers import END, KINDS, TEXT, byte_level


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    for kind, make in KINDS.items():
        make().save_pretrained(root / kind)
    return root


@pytest.fixture(scope="module")
def gpt2(folders):
    return TextTokenizer(str(folders / "gpt2"))


@pytest.fixture
def small(monkeypatch):
    """Blocks of 64 characters, and the place is saved after each batch."""
    for module in (documents, tokenizing):
        monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(token_output, "_SAVED_EVERY", -1.0)


def texts_of(path, texts):
    """Write documents in the format that a file's name says."""
    if ".json" in path.name:
        data = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()
    elif path.suffix == ".parquet":
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=2)
        return path
    else:
        (text,) = texts
        data = text.encode()
    if path.suffix == ".zst":
        data = pyarrow.compress(data, "zstd", asbytes=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def run(paths, out, tokenizer, **settings):
    return tokenize(sources_of([str(path) for path in paths], "text"), {"train": out}, tokenizer, **settings)["train"]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != LOCKS)


def split_at(end, ids):
    """Return the documents before each end."""
    ends = [-1, *(i for i, token in enumerate(ids) if token == end)]
    return [ids[a + 1 : b] for a, b in itertools.pairwise(ends)]


def ids_in(path, dtype="<u2"):
    return np.fromfile(path, dtype).tolist()


# ---- the documents ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.jsonl.zst", "a.parquet"])
def test_each_line_or_row_with_text_is_a_document(name, tmp_path, gpt2):
    texts = ["one\ntwo", "", "drei\u2028vier", "five " * 30, "six"]
    told = run([texts_of(tmp_path / name, texts)], tmp_path / "a.bin", gpt2)
    expected = [token for text in texts if text for token in [*gpt2(text), gpt2.end_of_text]]
    assert ids_in(tmp_path / "a.bin") == expected
    assert (told["documents"], told["tokens"]) == (4, len(expected))


def test_a_text_is_read_as_python_opens_it_and_files_follow_in_the_order_of_their_names(tmp_path, gpt2):
    home = tmp_path / "texts"
    (home / "deep").mkdir(parents=True)
    (home / "b.txt").write_bytes("\ufeffone\r\ntwo ü\rthree".encode())
    (home / "c.text.gz").write_bytes(gzip.compress(b"packed", mtime=0))
    (home / "deep" / "a.md").write_text("# deep")
    (home / "picture.png").write_bytes(b"\x89PNG")
    run([home], tmp_path / "a.bin", gpt2)
    texts = ["one\ntwo ü\nthree", "packed", "# deep"]
    assert ids_in(tmp_path / "a.bin") == [token for text in texts for token in [*gpt2(text), gpt2.end_of_text]]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama2"])
def test_a_cut_changes_no_token(kind, folders, small):
    tokenizer = TextTokenizer(str(folders / kind))
    draw = random.Random(0)
    words = ["word", "x.", "12345", "don't", "ü—", "\n\n", "  ", "\t", "(a)", ":\n", "if:\n    y"]
    joints = [" ", " ", "", "\n"]  # one of them in each block has no white space around it
    texts = ["".join(f"{draw.choice(joints)}{draw.choice(words)} in" for _ in range(300)) for _ in range(5)]
    for text in [TEXT, *texts]:
        parts = [part for part, _ in cut([text])]
        assert "".join(parts) == text
        assert max(map(len, parts)) <= 64
        assert [token for part in parts for token in tokenizer(part)] == tokenizer(text)


def test_the_cuts_depend_on_the_text_alone(small):
    whole = list(cut([TEXT]))
    assert list(cut(TEXT[i : i + 7] for i in range(0, len(TEXT), 7))) == whole
    assert [ends for _, ends in whole] == [False] * (len(whole) - 1) + [True]
    assert [len(part) for part, _ in cut(["x" * 150])] == [64, 64, 22]


def test_a_cut_that_changes_tokens_is_said_once(folders, tmp_path, small):
    tokenizer = TextTokenizer(str(folders / "llama2"))
    with pytest.warns(UserWarning, match="some tokens at the cuts are others") as caught:
        run([texts_of(tmp_path / "a.txt", [TEXT])], tmp_path / "a.bin", tokenizer)
    assert len(caught) == 1


def test_a_documents_own_end_of_text_is_text(gpt2):
    assert gpt2.end_of_text not in gpt2(f"one {END} two")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl", "a.parquet"])
def test_what_follows_a_place_is_what_followed_it_before(name, tmp_path, small):
    documents_in = [TEXT[:700]] if "txt" in name else ["one", TEXT[:300], "", "two\n" * 50, "three", TEXT[300:400]]
    paths = [str(texts_of(tmp_path / name, documents_in)), str(texts_of(tmp_path / "z.txt", [TEXT[:200]]))]
    found = list(pieces(sources_of(paths, "text"), Place()))
    assert len(found) > 10
    for i, piece in enumerate(found):
        rest = list(pieces(sources_of(paths, "text"), piece.after))
        assert [one[:4] for one in rest] == [one[:4] for one in found[i + 1 :]]


# ---- the file -----------------------------------------------------------------------------------------------------


def test_what_is_beside_the_file_says_what_it_holds(tmp_path, gpt2):
    told = run([texts_of(tmp_path / "a.txt", ["one two"])], tmp_path / "a.bin", gpt2, end_of_text=False)
    data = (tmp_path / "a.bin").read_bytes()
    assert json.loads((tmp_path / "a.bin.json").read_text()) == told
    assert told["sha256"] == hashlib.sha256(data).hexdigest()
    assert (told["dtype"], told["vocab_size"], told["eot"], told["documents"]) == ("uint16", gpt2.vocab_size, None, 1)
    assert told["tokens"] == len(data) // 2 == len(gpt2("one two"))
    assert told["sources"] == [{"name": str(tmp_path / "a.txt"), "bytes": 7}]
    assert names_in(tmp_path) == ["a.bin", "a.bin.json", "a.txt"]


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    words = {word: i for i, word in enumerate([END, "<unk>", *map(str, range(1 << 16))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    large = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, unk_token="<unk>")
    large.save_pretrained(tmp_path / "large")
    tokenizer = TextTokenizer(str(tmp_path / "large"))
    told = run([texts_of(tmp_path / "a.txt", ["7 65535 a"])], tmp_path / "a.bin", tokenizer)
    assert told["dtype"] == "uint32"
    assert ids_in(tmp_path / "a.bin", "<u4") == [9, 65537, 1, 0]


@pytest.mark.processes
def test_workers_write_the_same_file(tmp_path, gpt2, small):
    path = texts_of(tmp_path / "a.jsonl", ["one", TEXT[:900], "two\n" * 90, *map(str, range(200))])
    run([path], tmp_path / "one.bin", gpt2)
    run([path], tmp_path / "two.bin", gpt2, workers=2)
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()


def test_the_parts_share_the_documents_and_each_is_in_one(tmp_path, gpt2):
    texts = [f"document {i}" for i in range(200)]
    path = texts_of(tmp_path / "a.jsonl", texts)
    outs = {part: tmp_path / f"{part}.bin" for part in ("train", "val", "test")}
    shares = {"train": Fraction("0.7"), "val": Fraction("0.1"), "test": Fraction("0.2")}
    told = tokenize(sources_of([str(path)], "text"), outs, gpt2, shares=shares)
    assert [told[part]["documents"] for part in outs] == pytest.approx([140, 20, 40], abs=2)
    found = [split_at(gpt2.end_of_text, ids_in(out)) for out in outs.values()]
    assert sorted(itertools.chain(*found)) == sorted(map(gpt2, texts))


def test_one_text_is_cut_into_the_parts_in_their_order(tmp_path, gpt2):
    path = texts_of(tmp_path / "a.txt", [TEXT])
    outs = {part: tmp_path / f"{part}.bin" for part in ("train", "val")}
    tokenize(sources_of([str(path)], "text"), outs, gpt2, shares={"train": Fraction(9, 10), "val": Fraction(1, 10)})
    at = len(TEXT) * 9 // 10
    assert ids_in(outs["train"]) == [*gpt2(TEXT[:at]), gpt2.end_of_text]
    assert ids_in(outs["val"]) == [*gpt2(TEXT[at:]), gpt2.end_of_text]


# ---- going on -----------------------------------------------------------------------------------------------------


class StopError(Exception):
    pass


@pytest.mark.parametrize("stops", [[1], [3, 9], [1, 2, 3, 4, 5]])
def test_an_interrupted_run_goes_on_to_the_same_files(stops, tmp_path, gpt2, small):
    path = texts_of(tmp_path / "a.jsonl", ["one", TEXT[:900], "", *(f"{i} " * 30 for i in range(20))])
    outs = {part: tmp_path / f"{part}.bin" for part in ("train", "val")}
    shares = {"train": Fraction(2, 3), "val": Fraction(1, 3)}

    def go(stop=None):
        seen = []

        def told(read):
            seen.append(read)
            if len(seen) == stop:
                raise StopError

        tokenize(sources_of([str(path)], "text"), outs, gpt2, shares=shares, told=told)
        return seen

    whole = len(go())
    expected = {out: out.read_bytes() for out in outs.values()}
    for file in tmp_path.glob("*.bin*"):
        file.unlink()
    for stop in stops:
        with pytest.raises(StopError):
            go(stop)
        assert not any(out.exists() for out in outs.values())
    with (tmp_path / "train.bin.partial").open("ab") as file:
        file.write(b"what a kill left unsaid")
    assert len(go()) == whole - sum(stops)
    assert {out: out.read_bytes() for out in outs.values()} == expected
    assert go() == []  # nothing is left to do


def test_a_kill_between_two_renamings_is_mended(tmp_path, gpt2, monkeypatch):
    path = texts_of(tmp_path / "a.jsonl", ["one", "two", "three"])
    outs = {part: tmp_path / f"{part}.bin" for part in ("train", "val")}
    shares = {"train": Fraction(1, 2), "val": Fraction(1, 2)}

    def go():
        tokenize(sources_of([str(path)], "text"), outs, gpt2, shares=shares)

    replace = os.replace

    def killed(source, target):
        if str(target).endswith("val.bin"):
            raise StopError
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(StopError):
            go()
    assert (tmp_path / "train.bin").exists()
    go()
    for out in outs.values():
        told = json.loads(out.with_name(f"{out.name}.json").read_text())
        assert hashlib.sha256(out.read_bytes()).hexdigest() == told["sha256"]
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.processes
def test_a_killed_command_goes_on_and_leaves_no_worker(tmp_path, folders):
    path = texts_of(tmp_path / "a.jsonl", [f"{i} {TEXT}" for i in range(100)])
    command = [sys.executable, "-m", "tests.study.tokenize_slowly", str(path), "--tokenizer", str(folders / "gpt2")]
    command += ["--workers", "2", "--out", str(tmp_path / "a.bin")]
    process = subprocess.Popen(command, start_new_session=True)
    state = tmp_path / "a.bin.partial.json"
    while not state.exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for _ in range(100):
        if not _alive(process.pid):
            break
        time.sleep(0.1)
    assert not _alive(process.pid)
    tokenizer = TextTokenizer(str(folders / "gpt2"))
    before = json.loads(state.read_text())["tokens"][0]
    told = run([path], tmp_path / "a.bin", tokenizer)
    run([path], tmp_path / "b.bin", tokenizer)
    assert 0 < before < told["tokens"]
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def _alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_another_run_under_the_same_name_is_refused(tmp_path, gpt2, folders, small):
    path = texts_of(tmp_path / "a.jsonl", ["one"] * 50)

    def stop(read):
        raise StopError

    with pytest.raises(StopError):
        run([path], tmp_path / "a.bin", gpt2, told=stop)
    with pytest.raises(FileExistsError, match=r"a.bin.partial was begun with other values of eot; .*--overwrite"):
        run([path], tmp_path / "a.bin", gpt2, end_of_text=False)
    os.utime(path, (1, 1))
    with pytest.raises(FileExistsError, match="other values of the time of a source"):
        run([path], tmp_path / "a.bin", gpt2)
    run([path], tmp_path / "a.bin", gpt2, overwrite=True)
    with pytest.raises(FileExistsError, match=r"a.bin is there, of other texts, another tokenizer"):
        run([path], tmp_path / "a.bin", TextTokenizer(str(folders / "bert")))


def test_two_processes_do_not_write_one_file(tmp_path, gpt2):
    path = texts_of(tmp_path / "a.txt", ["one"])

    def second(read):
        run([path], tmp_path / "a.bin", gpt2)

    with pytest.raises(BusyError, match="another process writes"):
        run([path], tmp_path / "a.bin", gpt2, told=second)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"12345678\n12\xff", "a.txt is no UTF-8 text: byte 0xff at 11; give a text file"),
        ("a.txt.gz", gzip.compress(b"x" * 9999, mtime=0)[:-9], "a.txt.gz is no whole gzip file"),
        ("a.jsonl.zst", b"no zstd at all", "a.jsonl.zst is no whole zstd file"),
        ("a.jsonl", b'{"text": "a"}\n{"content": "b"}', 'line 2 of .*must hold an object with a "text".*--field NAME'),
        ("a.json", b'[{"text": "a"}]', 'line 1 of .*must hold an object with a "text"'),
        ("a.parquet", b"PAR1 and more", "a.parquet is no whole parquet file"),
        ("a.txt", b"", "of 0 documents with text, train gets none; give other texts"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_nothing_stays(name, data, message, tmp_path, gpt2):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        run([tmp_path / name], tmp_path / "out.bin", gpt2)
    assert names_in(tmp_path) == [name]


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path, gpt2):
    path = texts_of(tmp_path / "a.parquet", ["one"])
    with pytest.raises(ValueError, match=r"no column 'content' of text; its columns: id \(int64\), text \(string\)"):
        tokenize(sources_of([str(path)], "content"), {"train": tmp_path / "a.bin"}, gpt2)


def test_a_part_that_gets_no_document_is_refused_before_the_work(tmp_path, gpt2):
    paths = [str(texts_of(tmp_path / f"{i}.txt", ["text"])) for i in range(3)]
    shares = {"train": Fraction(99, 100), "val": Fraction(1, 100)}
    outs = {part: tmp_path / f"{part}.bin" for part in shares}
    with pytest.raises(ValueError, match="of 3 documents with text, val gets none; give a larger --val-fraction"):
        tokenize(sources_of(paths, "text"), outs, gpt2, shares=shares)


def test_a_tokenizer_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer can be read from '.*nowhere'"):
        TextTokenizer(str(tmp_path / "nowhere"))


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    made = byte_level()
    made.eos_token = None
    made.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match=r"has no end-of-text token.*--no-eot"):
        _ = TextTokenizer(str(tmp_path / "endless")).end_of_text
