"""What README.md and docs/ show is run or checked: every block, every command, every link.

Blocks of a page run in order, in one namespace and one empty folder. A ```python block that begins with `# NAME.py` is
written to that file, for a later block or command of the page. A ```text block directly below another is what that one
prints, numbers within a tenth. Blocks around a DeepSpeed engine run on a rank of their own.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import itertools
import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from torch import nn

from tests.distributed import ranks
from tests.distributed.zero_ranks import deepspeed_ranks

with contextlib.suppress(ImportError):
    import peft  # noqa: F401  (not within a test: where bitsandbytes is, that compiles as it is imported)

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def name_of(page):
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("recipes/**/*.md"))], ids=name_of)


# ---- a page and its parts -----------------------------------------------------------------------------------------


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    is_below_a_block: bool

    @property
    def where(self):
        return f"{self.page.name}:{self.line}"

    @property
    def file(self):
        found = re.match(r"# (\w+\.py)\n", self.text) if self.language == "python" else None
        return found and found[1]

    @property
    def needs_an_engine(self):
        return self.language == "python" and "deepspeed.initialize(" in self.text


class Parts(NamedTuple):
    blocks: list[Block]
    prose: list[str]  # the lines outside of blocks


@functools.cache
def parts_of(page):
    blocks, prose, inside, is_below = [], [], None, False
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = re.match(r"\s*(`{3,}|~{3,})(.*)", line)
        if inside is None and fence:
            inside, lines = (number, fence[1], fence[2].strip()), []
        elif inside is None:
            prose.append(line)
            is_below = is_below and not line.strip()
        elif line.strip() == inside[1]:
            text = "".join(f"{line}\n" for line in lines)
            blocks.append(Block(page, inside[0], inside[2], text, is_below))
            inside, is_below = None, True
        else:
            lines.append(line)
    assert inside is None, f"{page.name}:{inside[0]}: the block does not end"
    return Parts(blocks, prose)


# ---- running blocks -----------------------------------------------------------------------------------------------


class Run:
    """The blocks of one page as they run.

    Attributes:
        names: The namespace that its Python blocks share.
        printed: What the last block printed.
        after: Text of each Python block -> the namespace and what was printed after it.
    """

    def __init__(self, page, folder):
        self.page, self.folder = page, folder
        self.names = {"__name__": "page", **(readme_names() if page == README else {})}
        self.printed = ""
        self.after = {}
        self._unused = {}

    def block(self, block):
        assert block.language in RUNNERS, f"{block.where}: nothing checks a block of {block.language or 'no'} language"
        for file in [file for file in self._unused if Path(file).stem in block.text]:
            del self._unused[file]
        RUNNERS[block.language](self, block)

    def finish(self):
        for line in commands_of(self.page):
            run_command(line, self.folder)
        assert not self._unused, f"{self._unused} are files that no later block of the page reads"

    def python(self, block):
        if block.needs_an_engine:
            return  # test_blocks_around_an_engine_run
        if block.file:
            (self.folder / block.file).write_text(block.text)
            importlib.invalidate_caches()
            self._unused[block.file] = block.where
            return
        with contextlib.redirect_stdout(io.StringIO()) as output:
            run_python(block, self.names)
        self.printed = output.getvalue()
        self.after[block.text] = dict(self.names), self.printed

    def shell(self, block):
        self.printed = ""
        lines = block.text.replace("\\\n", " ").splitlines()
        for line in [line for line in lines if line.startswith("$ ")] if block.language == "console" else lines:
            check_command(line, block.where)
            self.printed += run_command(line, self.folder)

    def printout(self, block):
        if not block.is_below_a_block:
            return
        number = r"-?\d+(?:\.\d+)?"
        shown, printed = (re.sub(number, "#", text).split() for text in (block.text, self.printed))
        assert shown == printed, f"{block.where} shows\n{block.text}\nthe block above it prints\n{self.printed}"
        for one, other in zip(re.findall(number, block.text), re.findall(number, self.printed), strict=True):
            close = pytest.approx(float(one), rel=0.1, abs=0.02)
            assert float(other) == close, f"{block.where} shows {one}; printed: {self.printed}"

    def recipe(self, block):
        for chosen in classes_in(yaml.safe_load(block.text)):
            module, _, name = chosen["class_path"].rpartition(".")
            found = getattr(importlib.import_module(module), name)
            if name == "EMPCallback":
                found(**chosen.get("init_args", {}))

    def toml(self, block):
        if sys.version_info >= (3, 11):
            importlib.import_module("tomllib").loads(block.text)

    def bibtex(self, block):
        assert re.fullmatch(r"@\w+\{\w+,\n(  \w+ += \{.*\},?\n)+\}\n", block.text), block.where


RUNNERS = {
    "python": Run.python,
    **dict.fromkeys(("bash", "sh", "console"), Run.shell),
    "text": Run.printout,
    "yaml": Run.recipe,
    "toml": Run.toml,
    "bibtex": Run.bibtex,
}


def run_python(block, names):
    exec(compile("\n" * block.line + block.text, str(block.page), "exec"), names)  # errors name the page's own line


def classes_in(value):
    if isinstance(value, dict):
        if "class_path" in value:
            yield value
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from classes_in(inner)


def run_page(page, folder):
    if page.name == "distributed.md" and torch.__version__ < (2, 9):
        pytest.skip(
            "gloo of this torch adds up where FSDP2 asks for a mean, so two processes train another model than one"
        )
    run = Run(page, folder)
    threads, modules = torch.get_num_threads(), set(sys.modules)
    torch.set_num_threads(1)  # nothing here is large, and two threads on a busy machine wait for each other
    try:
        with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
            patch.chdir(folder)
            patch.syspath_prepend(folder)
            for block in parts_of(page).blocks:
                run.block(block)
            run.finish()
    finally:
        torch.set_num_threads(threads)
        for name in set(sys.modules) - modules:
            if getattr(sys.modules[name], "__file__", None) == str(folder / f"{name}.py"):
                del sys.modules[name]
    return run


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Return what runs a page, once."""
    return functools.cache(lambda page: run_page(page, tmp_path_factory.mktemp(page.stem)))


STARTS_PROCESSES = {"distributed.md"}  # its torchrun


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.processes] * (p.name in STARTS_PROCESSES), id=name_of(p)) for p in PAGES],
)
def test_blocks_run(page, ran):
    ran(page)


# ---- commands -----------------------------------------------------------------------------------------------------

SHOWN = r"(?:[A-Z_]+=\S+ )*(?:emp|make|python|torchrun|bash|sbatch|pip) "


def commands_of(page):
    """Return the command lines in the text: those that are indented, and those in code spans."""
    prose = parts_of(page).prose
    indented = [line[4:] for line in prose if line.startswith("    ")]
    spans = re.findall(r"`([^`]+)`", "\n".join(line for line in prose if not line.startswith("    ")))
    return [line.replace("\n", " ") for line in indented + spans if re.match(SHOWN, line)]


@every_page
def test_commands_are_what_the_programs_accept(page):
    check_commands(page)


def check_commands(page):
    for line in commands_of(page):
        check_command(line, page.name)


def check_command(line, where):
    words = words_of(line)
    if not words:
        return
    assert words[0] in COMMANDS, f"{where}: nothing checks {words[0]!r} in {line!r}"
    try:
        COMMANDS[words[0]](words[1:], f"{where}: {line!r}")
    except SystemExit as stop:
        raise AssertionError(f"{where}: {words[0]} does not accept {line!r}") from stop


def words_of(line):
    words = shlex.split(line.removeprefix("$ "), comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


@functools.cache
def parsers():
    from emp_callbacks.cli import check, folder_options, once_options, options, submit, tokenize

    modules = (options, once_options, folder_options, check, submit, tokenize)
    homes = {name: module for module in modules for name in module.__all__}
    made = [getattr(module, name)() for name, module in homes.items() if name.endswith("_parser")]
    return {parser.prog.removeprefix("emp "): parser for parser in made}


def check_emp(words, where):
    from emp_callbacks.cli.main import COMMANDS

    command, *options = words
    assert command in {*COMMANDS, "--help", "--version"}, f"{where}: there is no emp {command}"
    if options in ([], ["--help"]):
        return  # only named
    if command not in parsers():
        assert "--config" in options, f"{where}: no --config"
        recipe = after_option(options, "--config")[:1]
        files_of(recipe, where)
        check_fit(
            command, *(str(ROOT / word) if word in recipe and (ROOT / word).exists() else word for word in options)
        )
        return
    parser = parsers()[command]
    with contextlib.redirect_stderr(io.StringIO()):
        _, keys = parser.parse_known_args(options)
    takes_keys = any(action.required for action in parser._actions if "--config" in action.option_strings)
    assert takes_keys or not keys, f"{where}: emp {command} has no {keys}"
    for recipe in files_of(after_option(options, "--config"), where):
        check_recipe(recipe, tuple(keys))


def after_option(words, option):
    """Return the words between an option and the next."""
    rest = words[words.index(option) + 1 :] if option in words else []
    return list(itertools.takewhile(lambda word: not word.startswith("-"), rest))


def files_of(globs, where):
    # A recipe of the package goes by its name, wherever one stands.
    found = {glob: sorted(ROOT.glob(glob)) or [*ROOT.glob(f"recipes/{glob}.yaml")] for glob in globs}
    for glob, paths in found.items():
        assert paths, f"{where}: {glob} does not exist"
    return [path for paths in found.values() for path in paths]


@functools.cache
def check_fit(command, *options):
    """Let Lightning's parser read the options; it prints the recipe instead of running it."""
    from emp_callbacks.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = main([command, *options, "--print_config"])
        except SystemExit as stop:
            code = stop.code
    assert not code, errors.getvalue()


@functools.cache
def check_recipe(path, keys):
    from emp_callbacks.study.recipe.recipe import Recipe

    try:
        Recipe(path, keys)
    except (ValueError, argparse.ArgumentError, SystemExit) as error:
        raise AssertionError(f"{path.name} {keys}: {error}") from error


def check_make(words, where):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(words) <= set(targets), f"{where}: the Makefile has {targets}"


def check_script(words, where):
    """Check that a script exists and knows the options; `-m MODULE` must be installed."""
    if words[:1] == ["-m"]:
        assert importlib.util.find_spec(words[1]), where
        return
    file, *options = [word for word in words if not word.startswith("--array")]
    assert (ROOT / file).is_file(), f"{where}: {file} does not exist"
    for option in options if file.endswith(".py") else ():
        assert not option.startswith("--") or f'"{option}"' in (ROOT / file).read_text(), f"{where}: {option}"


def check_torchrun(words, where):
    from torch.distributed.run import get_args_parser

    with contextlib.redirect_stderr(io.StringIO()):
        get_args_parser().parse_args(words)


def check_pip(words, where):
    extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
    for extra in ",".join(extras).split(",") if extras else ():
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(), f"{where}: no extra {extra!r}"


COMMANDS = {
    "emp": check_emp,
    "make": check_make,
    **dict.fromkeys(("python", "bash", "sbatch"), check_script),
    "torchrun": check_torchrun,
    "pip": check_pip,
}


def run_command(line, folder):
    """Run torchrun, and emp where the file or folder that it reads is there; return what was printed."""
    words = words_of(line)
    if words[:1] == ["emp"] and len(words) > 2 and (folder / words[2]).exists():
        from emp_callbacks.cli.main import main

        with contextlib.redirect_stdout(io.StringIO()) as output:
            assert main(words[1:]) == 0, line
        return output.getvalue()
    if words[:1] != ["torchrun"]:
        return ""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    done = ranks.run_command(
        [sys.executable, "-m", "torch.distributed.run", *words[1:]], cwd=folder, env=environment, seconds=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---- links --------------------------------------------------------------------------------------------------------


def check_links(page):
    """Check links, pictures and paths of the repository; return how many there are."""
    text = "\n".join(parts_of(page).prose)
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text))
    paths = re.findall(r"(?:recipes|benchmarks|tests|emp_callbacks)/[\w/.-]*\w", text)
    for link in links:
        path, _, heading = link.partition("#")
        if re.match(r"https?:", link):
            continue
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), f"{page.name}: {link} does not exist"
        assert not heading or heading in headings_of(target), f"{page.name}: {link} names no heading"
    for path in paths:
        assert (ROOT / path).exists() or path in NOT_YET, f"{page.name}: {path} does not exist"
    return len(links) + len(paths)


# What new_criterion.md and new_target.md tell their reader to write.
NOT_YET = {
    "emp_callbacks/criteria/squared_taylor.py",
    "emp_callbacks/targets/low_rank.py",
    "tests/targets/test_low_rank.py",
}


def headings_of(page):
    titles = [line.lstrip("# ") for line in parts_of(page).prose if re.match("#+ ", line)]
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@every_page
def test_links_pictures_and_files_exist(page):
    assert check_links(page) > 5 or page != README


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"({page.name})" in index or page.name == "README.md", page.name


# ---- the README's own ---------------------------------------------------------------------------------------------


def readme_names():
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(torch.randn(8, 4), 4)

    return {"model": Model(), "data": Data()}


@pytest.fixture
def after(ran):
    """Return what gives the namespace and the output after the one block of the README that holds a text."""

    def find(text):
        (found,) = [result for block, result in ran(README).after.items() if text in block]
        return found

    return find


def test_readme_lightning(after):
    _, printed = after("EMPCallback(every_n_epochs=1)")
    assert "net.weight" in printed


def test_readme_plain_loop(after):
    names, _ = after("EMPPruner(model, optimizer")
    assert [event.step for event in names["pruner"].trajectory] == [100, 200, 300]
    assert int((names["model"][0].weight == 0).sum()) > 0


def test_readme_criterion_and_finished_model(after):
    names, _ = after("def row_share")
    events = names["pruner"].trajectory
    assert {event.criterion for event in events} == {"row_share"}
    zeros = sum(int((names["model"].state_dict()[name] == 0).sum()) for name in names["pruner"].masks)
    assert zeros == sum(event.n - event.keep for event in events) > 0


def test_the_readme_is_read_in_one_sitting():
    assert len(README.read_text().splitlines()) <= 180


def test_the_settings_page_names_every_setting():
    from emp_callbacks import EMPConfig

    rows = [
        line.split("|")[1] for line in (ROOT / "docs" / "settings.md").read_text().splitlines() if line[:3] == "| `"
    ]
    assert sorted(re.findall(r"`(\w+)`", "".join(rows))) == sorted(
        field.name for field in dataclasses.fields(EMPConfig)
    )


def test_the_table_of_targets_names_every_pair():
    from emp_callbacks.criteria import DEFAULT_CRITERIA, fitting_criteria

    page = ROOT / "docs" / "targets_and_criteria.md"
    rows = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("| `")]
    for target, default in DEFAULT_CRITERIA.items():
        (row,) = [row for row in rows if row[0].strip() == f"`{target}`"]
        named = re.findall(r"`(\w+)`", "|".join(row[1:3]))
        assert named[0] == default
        assert sorted(named) == sorted(fitting_criteria(target)), f"{page.name}: {target}"


def test_the_page_of_a_target_names_its_criteria():
    from emp_callbacks.criteria import DEFAULT_CRITERIA, fitting_criteria

    for target in DEFAULT_CRITERIA.keys() - {"experts"}:  # mixtures.md is of three targets
        page = ROOT / "docs" / f"{target}.md"
        (row,) = [line for line in page.read_text().splitlines() if line.startswith("| criteria |")]
        assert set(re.findall(r"`(\w+)`", row)) == set(fitting_criteria(target)), page.name


def test_the_glossary_is_in_order():
    rows = (ROOT / "docs" / "glossary.md").read_text().splitlines()
    words = [re.sub(r"\W", "", row.split("|")[1]).lower() for row in rows if row.startswith("| ")][1:]
    assert words == sorted(words)


def test_the_install_commands_stand_within_the_first_twenty_lines():
    top = "\n".join(README.read_text().splitlines()[:20])
    assert "make quickstart" in top
    assert "make test" in top


# ---- DeepSpeed ----------------------------------------------------------------------------------------------------


def run_engines(rank, world_size, folder):
    settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}
    settings["optimizer"] = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    os.chdir(folder)
    with deepspeed_ranks(rank, world_size, folder) as deepspeed:
        for block in (block for page in PAGES for block in parts_of(page).blocks if block.needs_an_engine):
            data = [(torch.randn(4, 8), torch.randint(0, 3, (4,))) for _ in range(4)]
            names = {"deepspeed": deepspeed, "model": nn.Linear(8, 3), "config": settings, "loader": data}
            run_python(block, names)
            names["hook"].pruner.refresh()
            assert names["hook"].density < 1
            names["hook"].finalize()


@pytest.mark.processes
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_blocks_around_an_engine_run(tmp_path):
    ranks.spawn(run_engines, 1, tmp_path)


# ---- the checks fail where they should ----------------------------------------------------------------------------

BROKEN = {
    "language": ("```ruby\nputs 1\n```", "nothing checks a block of ruby"),
    "no-language": ("```\nx\n```", "nothing checks a block of no language"),
    "open-block": ("```python\nx = 1", "does not end"),
    "python": ("```python\nassert 1 == 2, 'two'\n```", "two"),
    "printout": ("```python\nprint(3, 'pears')\n```\n\n```text\n3 apples\n```", r"prints\s+3 pears"),
    "number": ("```python\nprint(3, 'pears')\n```\n\n```text\n4 pears\n```", "shows 4"),
    "unused-file": ("```python\n# alone.py\n```\n\n```python\nx = 1\n```", "no later block"),
    "failing-torchrun": ("```sh\ntorchrun --standalone nowhere.py\n```", "nowhere.py"),
    "program": ("```sh\nrm -r .\n```", "nothing checks 'rm'"),
    "emp-command": ("    emp inspct last.ckpt", "no emp inspct"),
    "emp-option": ("See `emp inspect last.ckpt --bta 1`.", "no \\['--bta'"),
    "emp-value": ("    emp inspect last.ckpt --scope rows", "does not accept"),
    "recipe": ("    emp compare --config recipes/nothing.yaml", "does not exist"),
    "recipe-key": ("    emp compare --config recipes/quickstart.yaml --trainer.max_epoch 1", "max_epoch"),
    "fit-key": ("    emp fit --config recipes/quickstart.yaml --trainer.max_epoch 1", "max_epoch"),
    "make": ("    make coffee", "the Makefile has"),
    "script": ("    python benchmarks/nothing.py", "does not exist"),
    "script-option": ("    python benchmarks/bench_overhead.py --nothing 1", "--nothing"),
    "extra": ("`pip install 'emp-callbacks[nothing]'`", "no extra 'nothing'"),
    "link": ("[a](nowhere.md)", "does not exist"),
    "heading": ("# A\n\n[a](#b)", "names no heading"),
    "file": ("Read tests/test_nothing.py.", "does not exist"),
    "callback": ("```yaml\nclass_path: emp_callbacks.EMPCallback\ninit_args: {every_epoch: 1}\n```", "every_epoch"),
    "bibtex": ("```bibtex\n@article{a,\n  title = {A\n}\n```", "page.md"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.processes] * ("torchrun" in case)) for case in BROKEN]
)
def test_a_broken_page_is_found(case, tmp_path):
    text, message = BROKEN[case]
    page = tmp_path / "page.md"
    page.write_text(text + "\n")
    with pytest.raises((AssertionError, TypeError), match=message):
        check_all(page, tmp_path)


def check_all(page, folder):
    check_commands(page)
    check_links(page)
    run_page(page, folder)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_pages_name_exist(page):
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{page.name}: {path} has no {name}"
