"""A recipe: an ordinary LightningCLI configuration plus a `study:` section."""

from __future__ import annotations

import argparse
import errno
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import DefaultHelpFormatter
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from emp_callbacks.integrations.lightning_requeue import RequeueBetweenSteps
from emp_callbacks.study.recipe.building import building
from emp_callbacks.study.recipe.check import (
    RecipeError,
    check_options,
    check_recipe,
    explain_parse_error,
)
from emp_callbacks.study.recipe.checkpoints import (
    check_resumable,
    fitting_weights,
    goes_on_in,
    newest_checkpoint,
    settle_checkpoints,
)
from emp_callbacks.study.recipe.reading import check_yaml, counts_given, read_recipe
from emp_callbacks.study.recipe.seeds import check_seed
from emp_callbacks.study.recipe.smoke import FLAG, FallingLoss, smoke_options
from emp_callbacks.study.recipe.study_config import StudyConfig
from emp_callbacks.study.recipe.whereabouts import Whereabouts

_SMOKE_HELP = "what --smoke alone lays over the recipe: a minute on stand-in data, which fails unless the loss falls"
_USAGE = "emp %s --config recipe.yaml [--KEY VALUE ...]"
CallbackEdit = Callable[[list[pl.Callback]], list[pl.Callback]]


class _SaveConfig(SaveConfigCallback):
    """Saves the resolved recipe next to a fit's results; overwrites only that of the fit which it goes on with."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":  # evaluating a finished run must not need a new folder
            return
        saved = Path(trainer.log_dir or trainer.default_root_dir) / self.config_filename
        # Also where Lightning itself takes up what it saved before Slurm requeued the job.
        self.overwrite = goes_on_in(self.config.get("ckpt_path"), trainer.default_root_dir)
        taken = trainer.strategy.broadcast(saved.is_file()) and not (self.already_saved or self.overwrite)
        if taken:
            raise FileExistsError(
                f"{saved} exists: an earlier run lives in this folder; choose another one with"
                " --trainer.default_root_dir DIR, or move the old folder away"
            )
        if trainer.is_global_zero:
            saved.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(saved.parent, os.W_OK):  # before jsonargparse fails on the file, with a traceback
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(saved.parent))
        super().setup(trainer, pl_module, stage)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of our examples."""


class _EmpCLI(LightningCLI):
    """LightningCLI that knows the study section and explains a mistyped recipe in one line."""

    def __init__(self, command: str, description: str, args: list[str], **settings: Any) -> None:
        """Parse `args` for one command; `fit`, `validate` and `test` also run it."""
        self._command = command
        self._smoke = FLAG in args
        lightning = command in LightningCLI.subcommands()
        parser_settings: dict[str, Any] = {
            "prog": "emp" if lightning else f"emp {command}",
            "exit_on_error": False,
            "allow_abbrev": False,
            "formatter_class": _HelpFormatter,
        }
        if lightning:
            own = {"description": description, "usage": _USAGE % command}
            parser_settings[command] = {**parser_settings, **own}
        with _without_notices():
            super().__init__(
                pl.LightningModule,
                pl.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                parser_kwargs=parser_settings,
                args=[command, *args] if lightning else args,
                run=lightning,
                **settings,
            )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {self._command: LightningCLI.subcommands()[self._command]} if self._runs else {}

    @property
    def _runs(self) -> bool:
        return self._command in LightningCLI.subcommands()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(StudyConfig, "study")
        parser.add_argument(FLAG, type=dict[str, Any] | None, help=_SMOKE_HELP)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        known = self._parser(self._command) if self._runs else parser
        if self._smoke:
            args = _with_smoke(args)
        files, options = _files_and_options(args)
        for file in files:
            check_recipe(read_recipe(file), known)
        check_options(options, known)
        for word in args:
            check_yaml(word, "the command line")
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            raise RecipeError(explain_parse_error(str(error))) from error
        self._counts = counts_given(files, args)
        for name, count in self._counts.items():
            self._given.trainer[name] = count
        self._check_values()

    def _check_values(self) -> None:
        """Check what no class of the recipe looks at before work begins."""
        seed = self._given.seed_everything
        if isinstance(seed, int) and not isinstance(seed, bool):
            check_seed("seed_everything", seed)
        checkpoint = self._given.get("ckpt_path")
        if isinstance(checkpoint, str):
            check_resumable(checkpoint)

    @property
    def _given(self) -> Any:
        """The values of the command, from the recipe and from options."""
        return self.config[self._command] if self._runs else self.config

    def instantiate_classes(self) -> None:
        """Make model, data module and trainer; what goes wrong names its entry of the recipe."""
        with building(self._given):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        if self._command == "fit":
            trainer.callbacks += [RequeueBetweenSteps(), Whereabouts()]  # type: ignore[attr-defined]
            folder = self._given.trainer.default_root_dir
            settle_checkpoints(trainer.checkpoint_callbacks, folder)
            if self._given.ckpt_path == "last" and folder is None and (newest := newest_checkpoint(trainer)):
                self.config_init[self._command].ckpt_path = newest
            if self._smoke:
                trainer.callbacks.append(FallingLoss())  # type: ignore[attr-defined]
        return trainer


class Recipe(_EmpCLI):
    """A parsed recipe that builds a fresh model, data module and trainer as often as needed.

    Raises:
        FileNotFoundError: If there is no such recipe.
        RecipeError: If a key or a value in it is not known.
    """

    def __init__(self, path: str | Path, overrides: Sequence[str] = (), *, called: str | None = None) -> None:
        """Parse the file `path`, then `overrides` such as ["--trainer.max_epochs", "1"].

        Reports call it `called`, by default its path: a recipe of the package is known by its name.
        """
        self.path = Path(path)
        self.called = called or str(path)
        self.overrides = tuple(overrides)
        self._trainer_settings: dict[str, Any] = {}
        self._edit_callbacks: CallbackEdit = list
        super().__init__(
            "compare",
            "",
            ["--config", str(path), *overrides],
            save_config_callback=None,
            load_from_checkpoint_support=False,
        )
        self.study = StudyConfig(**vars(self.config.study))

    def with_model(self, **init_args: Any) -> Recipe:
        """Return the recipe with other arguments of its model.

        Raises:
            RecipeError: The model has no such argument.
        """
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in init_args.items()}
        changed = [f"--model.init_args.{name}={text}" for name, text in texts.items()]
        return Recipe(self.path, [*self.overrides, *changed], called=self.called)

    def _set_seed(self) -> None:
        """Do nothing: a study seeds each of its runs itself."""

    def instantiate_classes(self) -> None:
        """Do nothing while parsing; `build` does it for each run."""

    def build(self, edit_callbacks: CallbackEdit, **trainer_settings: Any) -> None:
        """Make a fresh `model`, `datamodule` and `trainer`.

        Args:
            edit_callbacks: Turns the recipe's callbacks into those of this run.
            trainer_settings: Trainer arguments that replace those of the recipe.
        """
        self._edit_callbacks, self._trainer_settings = edit_callbacks, trainer_settings
        with _without_notices():
            super().instantiate_classes()

    def build_bare(self, **trainer_settings: Any) -> list[pl.Callback]:
        """Make a fresh `model`, `datamodule` and a `trainer` without callbacks; return those of the recipe."""
        own: list[pl.Callback] = []

        def take(callbacks: list[pl.Callback]) -> list[pl.Callback]:
            own.extend(callbacks)
            return []

        self.build(take, **trainer_settings)
        return own

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        callbacks = self._edit_callbacks(_as_list(self.config_init.trainer.callbacks))
        return super().instantiate_trainer(**{**kwargs, **self._trainer_settings, "callbacks": callbacks})

    def resolved(self) -> dict[str, Any]:
        """Return the recipe with every default filled in, as plain data."""
        data = json.loads(self.parser.dump(self.config, format="json"))
        data["trainer"] |= self._counts
        return {key: value for key, value in data.items() if key not in ("config", "smoke")}


def run_lightning(command: str, args: list[str], description: str) -> None:
    """Run `fit`, `validate` or `test` of LightningCLI on a recipe.

    Raises:
        FileNotFoundError: If there is no such recipe.
        RecipeError: If a key or a value in it is not known.
        ValueError: If a checkpoint is none, or does not fit the model.
        FileExistsError: If the results of an earlier fit would be overwritten.
    """
    with fitting_weights():
        _EmpCLI(command, description, args, save_config_callback=_SaveConfig)


def _files_and_options(args: list[str]) -> tuple[list[str], list[str]]:
    """Return the recipe files and the names of all other options, without their dashes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    try:
        known, rest = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise RecipeError(f"{error}; write --config recipe.yaml") from error
    return known.config, [text[2:].split("=")[0] for text in rest if text.startswith("--")]


def _with_smoke(args: list[str]) -> list[str]:
    """Return the words of a command with the options of `--smoke` in front of the user's own, which win."""
    words = [word for word in args if word != FLAG]
    files, _ = _files_and_options(words)
    options = smoke_options(files)
    apart = ("-c", "--config")
    ends = [i + (word in apart) for i, word in enumerate(words) if word in apart or word.startswith("--config=")]
    return [*words[: ends[-1] + 1], *options, *words[ends[-1] + 1 :]]


def _as_list(callbacks: Any) -> list[pl.Callback]:
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, list) else [callbacks]


@contextmanager
def _without_notices() -> Iterator[None]:
    """Hide what Lightning's own use of jsonargparse and torch warns about; users can do nothing about it."""
    with warnings.catch_warnings():
        message = r"(?s).*(was deprecated in v4\.|JsonargparseDeprecationWarning)"
        warnings.filterwarnings("ignore", message=message, module=r"pytorch_lightning\.cli")
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
        yield
