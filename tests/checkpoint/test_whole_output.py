"""An output is there as a whole or not at all, and what others wrote stays."""

import os

import pytest

from emp_callbacks.checkpoint.whole_output import appearing, aside, has_content


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "Llama-3.2"
    with appearing(out, folder=True) as partial:
        (partial / "a").write_text("new")
        assert not out.exists()
    assert contents(tmp_path) == {"Llama-3.2/a": "new"}


def test_an_empty_folder_makes_way(tmp_path):
    (tmp_path / "out").mkdir()
    with appearing(tmp_path / "out", folder=True) as partial:
        (partial / "a").write_text("new")
    assert contents(tmp_path) == {"out/a": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_folder_held_is_moved_aside_as_a_whole(tmp_path):
    out = tmp_path / "out"
    for number in range(3):
        with appearing(out, folder=True) as partial:
            (partial / f"file{number}").write_text(str(number))
    assert contents(tmp_path) == {"out/file2": "2", "out.old-1/file0": "0", "out.old-2/file1": "1"}
    assert aside(out).name == "out.old-3"
    assert has_content(out)


@pytest.mark.parametrize("folder", [True, False])
def test_a_failure_leaves_everything_as_it_was(folder, tmp_path):
    out = tmp_path / "out"
    if folder:
        out.mkdir()
    (out / "old" if folder else out).write_text("precious")
    before = contents(tmp_path)

    def cut_off():
        with appearing(out, folder=folder) as partial:
            (partial / "new" if folder else partial).write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_take_its_place_brings_the_old_one_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("precious")

    def full(*_):
        raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"), appearing(out, folder=True):
        pass
    assert contents(tmp_path) == {"out/old": "precious"}


def test_two_containers_with_one_process_number_write_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    out = tmp_path / "out"
    with appearing(out, folder=False) as one, appearing(out, folder=False) as other:
        one.write_text("one")
        other.write_text("other")
    assert contents(tmp_path) == {"out": "one"}
