"""What each rank of a study does in test_several_processes.py: `torchrun ... study_ranks.py FOLDER`."""

import json
import os
import signal
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

from emp_callbacks.study.comparison import StudyInterrupted, run_study
from emp_callbacks.study.recipe.recipe import Recipe


class Terminated(pl.Callback):
    """A scheduler that tells one of the ranks to stop."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_rank == 1 and trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


def main(folder):
    torch.set_num_threads(1)
    run_study(Recipe(folder / "recipe.yaml"), folder / "whole")
    stopped, build = Recipe(folder / "recipe.yaml"), Recipe.build

    def build_with_signal(edit, **settings):
        cut = "training_feedback" in str(settings.get("default_root_dir"))
        build(stopped, (lambda own: [*edit(own), Terminated()]) if cut else edit, **settings)

    stopped.build = build_with_signal
    told = "not interrupted"
    try:
        run_study(stopped, folder / "resumed")
    except StudyInterrupted as error:
        told = str(error)
    left = [path.name for path in (folder / "resumed").rglob("*.ckpt")]
    run_study(Recipe(folder / "recipe.yaml"), folder / "resumed")
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps({"told": told, "left": left}))
    # gloo's threads now and then abort a process at its end
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
