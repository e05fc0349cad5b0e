"""Does a dense teacher help a pruned network to heal? Digits, Vision Transformer, three seeds, about two minutes.

Each seed trains a dense network, prunes a copy of it to a density by EMP, and trains the copy on (`freeze`, one
refresh at the first step), once on the task alone and once with `distill=` from the dense one, at equal steps.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import warnings

import pytorch_lightning as pl
import torch

from emp_callbacks import Distillation, EMPCallback
from emp_callbacks.study.recipe.data import DigitsData
from emp_callbacks.study.recipe.tasks import ImageClassification

VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4, "class_token": False}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def trained(module, data, seed, epochs, callbacks=()):
    """Train and return the accuracy on the test images, in percent."""
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **QUIET)
    trainer.fit(module, datamodule=data)
    return 100 * trainer.test(module, datamodule=data, verbose=False)[0]["test/accuracy"]


def main() -> None:
    """Print a table, one line per density."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="of the dense training; healing takes half as many")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2, 0.1, 0.05])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    data = DigitsData(batch_size=64)
    found = {(density, kind): [] for density in options.densities for kind in ("task alone", "distilled")}
    dense = []
    for seed in range(options.seeds):
        pl.seed_everything(seed, verbose=False)
        start = ImageClassification(model_args={**VIT, "global_pool": "avg"}, lr=5e-3, warmup_fraction=0.2)
        dense.append(trained(start, data, seed, options.epochs))
        for density, kind in found:
            module = copy.deepcopy(start)
            module.distill = Distillation(teacher=copy.deepcopy(start.model)) if kind == "distilled" else None
            emp = EMPCallback(every_n_steps=1, stop=1, mode="freeze", density=density, summary=False)
            found[density, kind].append(trained(module, data, seed, options.epochs // 2, [emp]))
    print(f"dense: {statistics.mean(dense):.2f} % of {options.seeds} seeds")
    print("| density | task alone | distilled | difference, by seed |")
    print("|---|---|---|---|")
    for density in options.densities:
        alone, taught = (found[density, kind] for kind in ("task alone", "distilled"))
        differences = ", ".join(f"{b - a:+.2f}" for a, b in zip(alone, taught, strict=True))
        print(f"| {density:g} | {statistics.mean(alone):.2f} | {statistics.mean(taught):.2f} | {differences} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
