"""`emp recipes`, and what stands behind a recipe's name on the command line."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Sequence
from pathlib import Path

from emp_callbacks.cli.options import recipes_parser
from emp_callbacks.terminal import FittedTable, make_console

__all__ = ["cluster_file", "find_recipe", "recipes", "shipped_recipes", "with_files"]

_CLUSTER = "cluster"  # a folder of scripts and configurations, copied as one


def shipped_recipes() -> dict[str, Path]:
    """Return name -> file of every recipe that comes with the package, such as "quickstart" or "paper/gpt"."""
    folder = _folder()
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (len(file.relative_to(folder).parts), file))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def find_recipe(given: str) -> str:
    """Return the path of a recipe that the user named: a file of theirs, or else a shipped one.

    Raises:
        FileNotFoundError: It is neither; the message names the nearest.
    """
    if Path(given).is_file():
        return given
    shipped = shipped_recipes()
    name = given.removeprefix("recipes/").removesuffix(".yaml")
    if name in shipped:
        return str(shipped[name])
    siblings = [str(other) for other in Path(given).parent.glob("*.y*ml")]
    near = difflib.get_close_matches(given, siblings, n=1) or difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "emp recipes lists those that come with the package"
    raise FileNotFoundError(f"recipe {given} does not exist; {hint}")


def cluster_file(name: str) -> Path:
    """Return a file of the folder that `emp recipes cluster` copies."""
    return _folder() / _CLUSTER / name


def with_files(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with the path of each recipe that stands after -c or --config."""
    found = list(words)
    for i, word in enumerate(found):
        if i and found[i - 1] in ("-c", "--config"):
            found[i] = find_recipe(word)
        elif word.startswith("--config="):
            found[i] = f"--config={find_recipe(word.partition('=')[2])}"
    return found


def recipes(words: list[str]) -> None:
    """List the recipes that come with the package, or copy one out to edit."""
    options = recipes_parser().parse_args(words)
    if options.name is None:
        _list()
        return
    out = _copy(options.name, Path(options.out) if options.out else None)
    make_console().print(f"copied to {out}", highlight=False, soft_wrap=True)


def _list() -> None:
    table = FittedTable()
    table.add_column("recipe")
    table.add_column("what it runs", words=True)
    files = shipped_recipes()
    strategies = [name for name in files if name.startswith(f"{_CLUSTER}/")]
    for name, file in files.items():
        if name not in strategies:  # it may lie in no checkout
            table.add_row(name, _first_command(file).replace(f"recipes/{name}.yaml", name))
    table.add_row(_CLUSTER, f"scripts for Slurm, torchrun, Kubernetes; to lay over a recipe: {', '.join(strategies)}")
    console = make_console()
    console.print(table)
    console.print("\nemp recipes NAME --out FILE.yaml copies one out to edit", highlight=False)


def _first_command(file: Path) -> str:
    """Return the command in the comment at a recipe's head, with what it says of time."""
    lines = [line.removeprefix("#").strip() for line in file.read_text(encoding="utf-8").splitlines()[:3]]
    command = next((line for line in lines if line.startswith("emp ") and "--config" in line), lines[0])
    return " ".join(command.split())


def _copy(name: str, out: Path | None) -> Path:
    """Copy a recipe, or the folder of cluster files, and return where to; nothing is overwritten."""
    source = _folder() / _CLUSTER if name == _CLUSTER else Path(find_recipe(name))
    target = out or Path(source.name)
    if target.is_dir() and source.is_file():
        target = target / source.name
    if target.exists():
        raise FileExistsError(f"{target} exists; name another place with --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
    return target


def _folder() -> Path:
    package = Path(__file__).parents[1]
    # In a checkout the recipes lie beside the package; a wheel carries them inside it.
    beside, inside = package.parent / "recipes", package / "recipes"
    return inside if inside.is_dir() else beside
