"""Images of an ImageNet-like folder, tar file, Hugging Face or torchvision dataset, augmented and mixed by timm."""

import difflib
import hashlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import repeat
from typing import Any
from unittest.mock import patch

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from emp_callbacks.schedule import check_count
from emp_callbacks.study.recipe.image_sources import ImageSource, open_split
from emp_callbacks.study.recipe.loading import (
    EpochSampler,
    already_batched,
    evaluation_loader,
    run_seed,
    training_loader,
)

Batch = tuple[Tensor, Tensor]
Draw = tuple[int, int, int]  # epoch, index, copy

_OURS = ("input_size", "is_training", "tf_preprocessing", "use_prefetcher", "normalize", "separate")
_HELD_OUT_SEED = 0  # the same images in every run


class DrawSampler(EpochSampler):
    """An EpochSampler of (epoch, index, copy): what makes an augmentation, so that persistent workers know it too.

    Args:
        args: As in EpochSampler, also `settings`.
        copies: Each image comes so many times in a row, on different ranks where there are several, and an epoch has
            that many fewer images (repeated augmentation, Hoffer et al., arXiv:1901.09335).
    """

    def __init__(self, *args: Any, copies: int = 1, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.copies = copies

    def drawn(self, places: Tensor, order: Tensor) -> Iterator[Draw]:
        indices = order[(places // self.copies) % len(order)]
        return zip(repeat(self.epoch), indices.tolist(), (places % self.copies).tolist(), strict=False)


class _Images(Dataset[tuple[Tensor, int]]):
    """Some images of a source, transformed; a list of indices is a finished batch."""

    def __init__(self, source: ImageSource, indices: Sequence[int], transform: Callable[[Image.Image], Tensor]) -> None:
        self.source, self.indices, self.transform = source, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.source[self.indices[index]]
        return self.transform(image), target

    def __getitems__(self, indices: list[Any]) -> Batch:
        images, targets = default_collate([self[index] for index in indices])
        return images, targets


class _AugmentedImages(Dataset[Batch]):
    """Images whose augmentation is a pure function of the seed and the draw, and mixed batches of such."""

    def __init__(self, images: _Images, seed: int, mixup: Mixup | None) -> None:
        self.images, self.seed, self.mixup = images, seed, mixup

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, draws: list[Draw | int]) -> Batch:
        keys = [(0, draw, 0) if isinstance(draw, int) else draw for draw in draws]  # int: Lightning's overfit_batches
        with _generators_kept():
            examples = []
            for key in keys:
                _reseed(self.seed, *key)
                examples.append(self.images[key[1]])
            images, targets = default_collate(examples)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)  # goes on with the numbers of the last image's seed
        return images, targets


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Put the generators of Python, numpy and torch (CPU) back: in the main process they are the training's."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


def _reseed(*key: int) -> None:
    for_python, for_numpy, for_torch = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.default_generator.manual_seed(for_torch)  # not torch.manual_seed, which resets those of GPUs as well


class ImageFolderData(pl.LightningDataModule):
    """Images (B, 3, input_size, input_size), float32, with classes (B,), int64, or mixed (B, num_classes), float32.

    The order of an epoch is a function of (seed, epoch, rank), an image's augmentation of (seed, epoch, image), a
    batch's mixing of (seed, epoch, rank, batch), whatever the number of workers, and where a fit was resumed. The
    parts are train, test (`val_split`) and val: `held_out` training images, so that nothing is chosen by the test
    images; those that are, are the same in every run. In evaluation every image counts once, on any number of ranks.

    Args:
        root: The folder that holds a folder or a tar file per split, with a folder per class in each; see `open_split`,
            also for `dataset`.
        num_classes: Classes of the data; compared with what is found.
        dataset: "" for `root` itself, hfds/NAME_OR_FOLDER for a Hugging Face dataset (which may be a folder of parquet
            files), torch/NAME for torchvision's.
        train_split: Name of the training split.
        val_split: Name of the other one.
        held_out: So many training images are the validation part. 0: that is `val_split`, as is the test part.
        input_size: Height and width of the images handed out, in pixels.
        batch_size: Images in a batch, per rank; the last incomplete batch of a training epoch is dropped.
        num_workers: Processes that decode and augment, per rank and loader.
        augmentation: Arguments of `timm.data.create_transform`, such as {auto_augment: rand-m9-mstd0.5-inc1, re_prob:
            0.25, interpolation: bicubic, crop_pct: 0.9}; evaluation takes those that are not random (an interpolation
            of random is bicubic there).
        mixup: Arguments of `timm.data.Mixup`, such as {mixup_alpha: 0.8, cutmix_alpha: 1.0, label_smoothing: 0.1};
            with prob 0 only labels are smoothed. None: no mixing, and class indices.
        copies: Repeated augmentation, see `DrawSampler`.
        seed: Seed of order, augmentation and mixing. None: the run's seed, see `run_seed`.
        pin_memory: Batches in page-locked memory, where there is an accelerator.

    Raises:
        ValueError: An argument that timm does not know, or an odd batch_size with mixup.
    """

    def __init__(
        self,
        root: str = "",
        num_classes: int = 1000,
        dataset: str = "",
        train_split: str = "train",
        val_split: str = "validation",
        held_out: int = 0,
        input_size: int = 224,
        batch_size: int = 256,
        num_workers: int = 8,
        augmentation: dict[str, Any] | None = None,
        mixup: dict[str, Any] | None = None,
        copies: int = 1,
        seed: int | None = None,
        pin_memory: bool = True,
    ) -> None:
        super().__init__()
        for name in ("num_classes", "input_size", "batch_size", "copies"):
            check_count(name, locals()[name])
        for name in ("held_out", "num_workers"):
            check_count(name, locals()[name], least=0)
        if seed is not None:
            check_count("seed", seed, least=0)
        self.root, self.dataset, self.train_split, self.val_split = root, dataset, train_split, val_split
        self.num_classes, self.held_out, self.copies, self.seed = num_classes, held_out, copies, seed
        self.batch_size, self.num_workers, self.pin_memory = batch_size, num_workers, pin_memory
        self._augment, self._prepare = _transforms(input_size, augmentation or {})
        self._mixup = None if mixup is None else _mixing(mixup, num_classes, batch_size)
        self._parts: dict[str, _Images] = {}

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  (Lightning's signature)
        """Find the images; none is decoded.

        Raises:
            FileNotFoundError: A folder or split is missing.
            ValueError: The classes are not `num_classes`, differ between the splits, or a class folder is empty;
                held_out is all there is.
        """
        if self._parts:
            return
        train, other = (open_split(self.root, self.dataset, split) for split in (self.train_split, self.val_split))
        _check_classes(train, self.num_classes)
        other.take_classes_of(train)
        if self.held_out >= len(train):
            raise ValueError(f"held_out={self.held_out} leaves none of {len(train)} images to train on")
        mixed = np.random.default_rng(_HELD_OUT_SEED).permutation(len(train))
        kept, held = (np.sort(part).tolist() for part in (mixed[self.held_out :], mixed[: self.held_out]))
        test = _Images(other, range(len(other)), self._prepare)
        self._parts = {
            "train": _Images(train, kept, self._augment),
            "val": _Images(train, held, self._prepare) if self.held_out else test,
            "test": test,
        }

    @cached_property
    def content_digest(self) -> dict[str, str]:
        """What the data is: "train", "val" and "test" -> SHA-256, 64 hexadecimal digits, of the sorted list of images.

        A line per image: its path inside the split, its size in bytes and its class, between tabs; pixels do not enter.
        Of hfds/ and torch/ names, which have no files of their own, the lines hold number and class. Computed at the
        first use, and asks the file system for every size.

        Raises:
            RuntimeError: Before `setup`.
        """
        if not self._parts:
            raise RuntimeError("content_digest is known after setup: call setup() first")
        return {name: _digest(part) for name, part in self._parts.items()}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Raises ValueError when not even one full batch fits."""
        images = _AugmentedImages(self._parts["train"], run_seed(self.seed), self._mixup)
        sampler = partial(DrawSampler, copies=self.copies)
        return training_loader(
            images, self.batch_size, trainer=self.trainer, seed=self.seed, sampler=sampler, **self._settings
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        return evaluation_loader(self._parts["val"], self.batch_size, trainer=self.trainer, **self._settings)

    def test_dataloader(self) -> DataLoader[Batch]:
        return evaluation_loader(self._parts["test"], self.batch_size, trainer=self.trainer, **self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": self.pin_memory and torch.accelerator.is_available(),
            "collate_fn": already_batched,
        }


def _transforms(size: int, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    _check_names("augmentation", settings, create_transform, without=_OURS)
    still = {**settings, "interpolation": settings.get("interpolation", "bilinear")}
    if still["interpolation"] == "random":
        still["interpolation"] = "bicubic"
    posterize = dict.fromkeys((name for name in auto_augment.NAME_TO_OP if "Posterize" in name), _posterize)
    try:
        with patch.dict(auto_augment.NAME_TO_OP, posterize):  # read as the transform is made
            return create_transform(size, is_training=True, **settings), create_transform(size, **still)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"timm.data.create_transform cannot do augmentation={settings}: {error!r}") from error


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Return timm's posterized image; black without a bit, as Pillow drew it before 13.0, which refuses.

    timm's strongest level asks for that: with rand-m9-mstd0.5-inc1 about one image of a thousand.
    """
    if bits_to_keep:
        found: Image.Image = auto_augment.posterize(image, bits_to_keep)  # type: ignore[no-untyped-call]
        return found
    return Image.new(image.mode, image.size)


def _mixing(settings: Mapping[str, Any], num_classes: int, batch_size: int) -> Mixup:
    _check_names("mixup", settings, Mixup, without=("num_classes", "multi_label"))
    if batch_size % 2:
        raise ValueError(f"mixup takes images in pairs, and batch_size={batch_size} is odd: choose an even one")
    mixup = Mixup(num_classes=num_classes, **settings)  # type: ignore[no-untyped-call]
    if mixup.mix_prob and not mixup.mixup_alpha and not mixup.cutmix_alpha:
        raise ValueError("mixup needs mixup_alpha or cutmix_alpha above 0, or prob: 0 to smooth labels only")
    return mixup


def _check_names(what: str, settings: Mapping[str, Any], call: Callable[..., Any], without: Sequence[str]) -> None:
    known = [name for name in inspect.signature(call).parameters if name not in without]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            raise ValueError(
                f"{what} has no {name!r}; " + (f"nearest: {', '.join(near)}" if near else f"it has {known}")
            )


def _check_classes(source: ImageSource, num_classes: int) -> None:
    found = len(source.classes) or max(source.targets()) + 1
    if found > num_classes or (source.classes and found < num_classes):
        raise ValueError(
            f"{source.name} has {found} classes, and num_classes={num_classes}: set num_classes to {found}, in the "
            "model as well, or look for folders too many"
        )


def _digest(part: _Images) -> str:
    entries, targets = list(part.source.entries()), part.source.targets()
    lines = sorted(f"{entries[i][0]}\t{entries[i][1]}\t{targets[i]}\n" for i in part.indices)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
