"""Images per second of ImageFolderData beside timm's own create_loader, one process, and what a reseeded image costs.

    python benchmarks/bench_loading.py [--images 256] [--size 400] [--rounds 3]

Both decode and augment the same generated JPEGs in the same way (random resized crop to 224, RandAugment, random
erasing), without workers, prefetcher or GPU, in turns; the ratio is of the best round of each.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader

from emp_callbacks.study.recipe.image_folders import ImageFolderData, _generators_kept, _reseed

AUGMENTATION = {"auto_augment": "rand-m9-inc1", "re_prob": 0.25, "interpolation": "bicubic"}
BATCH = 32


def draw(root: Path, images: int, size: int) -> None:
    """Write blurred noise, which a JPEG compresses about as well as a photograph."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(images if split == "train" else 2):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(rng.integers(0, 255, (size // 8, size // 8, 3), dtype=np.uint8))
            small.resize((size * 5 // 4, size), Image.Resampling.BICUBIC).save(folder / f"{number}.JPEG", quality=90)


def rate(loader, images: int) -> float:
    start = time.process_time()
    seen = sum(len(batch[0]) for batch in loader)
    assert seen == images // BATCH * BATCH
    return seen / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("timm").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), arguments.images, arguments.size)
        data = ImageFolderData(folder, 2, batch_size=BATCH, num_workers=0, augmentation=AUGMENTATION, seed=0)
        data.setup("fit")
        ours = data.train_dataloader()
        timms = create_loader(
            create_dataset("", folder, split="train"), 224, BATCH, is_training=True, num_workers=0,
            use_prefetcher=False, persistent_workers=False, **AUGMENTATION,
        )  # fmt: skip
        rounds = [(rate(ours, arguments.images), rate(timms, arguments.images)) for _ in range(arguments.rounds)]
    best = [max(column) for column in zip(*rounds, strict=True)]
    start = time.process_time()
    with _generators_kept():
        for index in range(5000):
            _reseed(0, 0, index, 0)
    reseeding = (time.process_time() - start) / 5000
    print(f"images per second of CPU: ours {best[0]:.1f}, timm's {best[1]:.1f}, ratio {best[0] / best[1]:.2f}")
    print(f"reseeding an image: {reseeding * 1e6:.0f} us, {100 * reseeding * best[0]:.2f} % of its time")


if __name__ == "__main__":
    main()
