from pathlib import Path

import pytest

from emp_callbacks.cli.main import main
from emp_callbacks.cli.recipes import find_recipe, shipped_recipes, with_files

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_recipe_goes_by_its_name():
    files = [file.relative_to(ROOT / "recipes") for file in (ROOT / "recipes").rglob("*.yaml")]
    assert {str(file.with_suffix("")) for file in files} == set(shipped_recipes())
    assert next(iter(shipped_recipes().values())).is_file()


@pytest.mark.parametrize("given", ["paper/gpt", "paper/gpt.yaml", "recipes/paper/gpt.yaml"])
def test_a_name_or_the_path_in_a_checkout_finds_the_shipped_recipe(given):
    assert Path(find_recipe(given)).read_text() == (ROOT / "recipes" / "paper" / "gpt.yaml").read_text()


def test_a_file_of_the_user_comes_first(empty_folder):
    (empty_folder / "quickstart.yaml").write_text("mine: 1\n")
    (empty_folder / "quickstart").mkdir()
    assert find_recipe("quickstart.yaml") == "quickstart.yaml"
    assert find_recipe("quickstart") == str(shipped_recipes()["quickstart"])  # a folder is no recipe


def test_what_is_neither_is_refused_with_the_nearest(empty_folder):
    with pytest.raises(FileNotFoundError, match=r"recipe quikstart does not exist; did you mean 'quickstart'\?"):
        find_recipe("quikstart")
    (empty_folder / "mine.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"did you mean 'mine.yaml'\?"):
        find_recipe("mime.yaml")
    with pytest.raises(FileNotFoundError, match="emp recipes lists those"):
        find_recipe("zzz")


def test_words_of_a_command_line_get_paths():
    path = str(shipped_recipes()["quickstart"])
    words = ["--config", "quickstart", "-c", "quickstart", "--config=quickstart", "--model.name", "quickstart"]
    found = ["--config", path, "-c", path, f"--config={path}", "--model.name", "quickstart"]
    assert with_files(words) == found


def test_a_recipe_is_listed_copied_and_never_overwritten(empty_folder, capsys):
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*shipped_recipes(), "cluster"])
    assert "emp compare --config quickstart " in shown
    assert "emp sweep-beta --config paper/gpt " in shown
    assert main(["recipes", "paper/gpt", "--out", "new/mine.yaml"]) == 0
    assert "copied to new/mine.yaml" in capsys.readouterr().out
    (empty_folder / "new" / "mine.yaml").write_text("edited: 1\n")
    assert main(["recipes", "paper/gpt", "--out", "new/mine.yaml"]) == 2
    assert capsys.readouterr().err == "emp: new/mine.yaml exists; name another place with --out\n"
    assert (empty_folder / "new" / "mine.yaml").read_text() == "edited: 1\n"
    assert main(["recipes", "quickstart", "--out", "new"]) == 0
    assert (empty_folder / "new" / "quickstart.yaml").is_file()
    assert main(["recipes", "cluster"]) == 0
    assert (empty_folder / "cluster" / "torchrun.sh").is_file()
    assert main(["recipes", "quikstart"]) == 2
    assert "did you mean 'quickstart'?" in capsys.readouterr().err


def test_a_study_of_a_shipped_recipe_runs_in_any_folder(capsys):
    assert main(["compare", "--config", "quickstart", "--list-cells"]) == 0
    assert "training_feedback:0" in capsys.readouterr().out
