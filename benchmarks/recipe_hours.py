"""How fast the recipes of cluster size train on one GPU, dense and with EMP, and how many hours that makes of each.

    python benchmarks/recipe_hours.py                   # benchmarks/results/recipe_hours.json (3 minutes on an H200)
    python benchmarks/recipe_hours.py --tiny            # the recipes' smoke sizes on a CPU: does it run?

Each recipe is trained by its own Trainer at its own batch size per GPU, on one batch of random examples that lies on
the device: what is read from disk, decoded, and sent between GPUs is not in it. "hours" is for the number of GPUs of
the recipe, as if they did nothing but compute. With EMP, the masks of a first refresh are in force while it is timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from emp_callbacks import EMPCallback
from emp_callbacks.study.recipe.recipe import Recipe

ROOT = Path(__file__).parents[1]
NAMES = (
    "imagenet/vit_s16",
    "imagenet/features_vit_s16",
    "imagenet/resnet50",
    "gpt2/gpt2_124m",
    "gpt2/features_gpt2",
    "llama/llama_1b",
)
IMAGENET = 1_281_167
REFRESH_AT = 3


def main(words: Sequence[str] | None = None) -> None:
    options = parsed(words)
    rows = []
    for name in options.recipes:
        rows.append(row_of(name, options))
        print(json.dumps(rows[-1]), flush=True)
    told = {
        "command": "python benchmarks/recipe_hours.py",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "tiny": options.tiny,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(told, indent=1) + "\n")
    print(table(rows))


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=NAMES, metavar="NAME", help="(all)")
    parser.add_argument("--steps", type=int, default=30, help="timed batches (30)")
    parser.add_argument("--tiny", action="store_true", help="the recipes' smoke sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/recipe_hours.json")
    return parser.parse_args(words)


def row_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    file = ROOT / "recipes" / f"{name}.yaml"
    whole = Recipe(file).config.trainer
    here = [
        "--trainer.devices=1",
        "--trainer.strategy=auto",
        "--trainer.max_epochs=-1",
        "--trainer.limit_val_batches=0",
    ]
    here += [f"--trainer.max_steps={options.steps + 10}", "--trainer.accumulate_grad_batches=1"]
    here += ["--trainer.limit_val_batches=0"]
    recipe = Recipe(file, [*(["--smoke"] if options.tiny else []), *here])
    dense, emp = timed(recipe, options.steps, prunes=False), timed(recipe, options.steps, prunes=True)
    batches = whole.max_steps * (whole.accumulate_grad_batches or 1)
    if whole.max_steps < 0:
        batches = whole.max_epochs * (IMAGENET // (recipe.config.data.init_args.batch_size * whole.devices))
    return {
        "recipe": name,
        "parameters": emp["parameters"],
        "per_gpu": recipe.config.data.init_args.batch_size,
        "gpus": whole.devices,
        "dense_seconds": dense["seconds"],
        "emp_seconds": emp["seconds"],
        "ratio": emp["seconds"] / dense["seconds"],
        "refresh_seconds": emp["refresh_seconds"],
        "density": emp["density"],
        "peak_gb": emp["peak_gb"],
        "dense_peak_gb": dense["peak_gb"],
        "examples_per_second": recipe.config.data.init_args.batch_size / emp["seconds"],
        "batches": batches,
        "hours": batches * emp["seconds"] / 3600,
    }


def timed(recipe: Recipe, steps: int, *, prunes: bool) -> dict[str, Any]:
    """Train for some batches and return the median seconds of one, and the peak of memory."""
    pl.seed_everything(0, verbose=False)
    clock = Clock()

    def callbacks(own: list[pl.Callback]) -> list[pl.Callback]:
        found = [callback.config for callback in own if isinstance(callback, EMPCallback)]
        config = replace(found[0], every_n_epochs=None, every_n_steps=REFRESH_AT, start=REFRESH_AT, stop=REFRESH_AT)
        return [EMPCallback.from_config(config, summary=False), clock] if prunes else [clock]

    recipe.build(callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=None)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    recipe.trainer.fit(recipe.model, train_dataloaders=Batches(batch_like(recipe), steps + 10))
    rows = [callback.trajectory[-1] for callback in recipe.trainer.callbacks if isinstance(callback, EMPCallback)]
    found = {
        "seconds": statistics.median(clock.between[-steps:]),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "parameters": sum(parameter.numel() for parameter in recipe.model.parameters()),
        "refresh_seconds": rows[0].seconds if rows else None,
        "density": rows[0].density if rows else 1.0,
    }
    recipe.model = recipe.trainer = recipe.datamodule = None
    gc.collect()
    torch.cuda.empty_cache()
    return found


def batch_like(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random examples and targets of a recipe's batch."""
    data, model = recipe.config.data.init_args, recipe.config.model.init_args
    generator = torch.Generator().manual_seed(0)
    if "input_size" in data:
        images = torch.randn(data.batch_size, 3, data.input_size, data.input_size, generator=generator)
        return images, torch.randint(model.num_classes, (data.batch_size,), generator=generator)
    tokens = torch.randint(data.vocab_size, (data.batch_size, data.sequence_length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


class Batches:
    """The same batch again and again, which goes to the device once."""

    def __init__(self, batch: tuple[torch.Tensor, torch.Tensor], count: int) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.batch, self.count = tuple(part.to(device) for part in batch), count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * self.count)


class Clock(pl.Callback):
    """Seconds from the end of one batch to that of the next."""

    def __init__(self) -> None:
        self.between: list[float] = []
        self._last = 0.0

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.between.append(now - self._last)
        self._last = now


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| recipe | batch per GPU | examples/s | EMP / dense | refresh | peak GB | GPUs | hours |", "|---|" * 8]
    lines[1] = "|---|---|---|---|---|---|---|---|"
    for row in rows:
        peak = "-" if row["peak_gb"] is None else f"{row['peak_gb']:.0f}"
        lines.append(
            f"| {row['recipe']} | {row['per_gpu']} | {row['examples_per_second']:,.0f} | {row['ratio']:.2f} | "
            f"{row['refresh_seconds']:.2f} s | {peak} | {row['gpus']} | {row['hours']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
