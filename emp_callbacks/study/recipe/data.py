"""Data of the studies, all of it on the machine: digits, Fashion-MNIST files, text as bytes."""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from emp_callbacks.schedule import check_count
from emp_callbacks.study.recipe.loading import already_batched, evaluation_loader, training_loader
from emp_callbacks.study.recipe.sources import read_idx, read_text, stdlib_text

Batch = tuple[Tensor, Tensor]

# Mean and standard deviation of the pixels of the training part, in raw pixel units.
_DIGITS_MEAN_STD = (4.88, 6.02)
_FASHION_MEAN_STD = (72.94, 90.02)
_FASHION_FILES = {
    ("train", "images"): "train-images-idx3-ubyte.gz",
    ("train", "labels"): "train-labels-idx1-ubyte.gz",
    ("test", "images"): "t10k-images-idx3-ubyte.gz",
    ("test", "labels"): "t10k-labels-idx1-ubyte.gz",
}


class TensorPart(Dataset[Batch]):
    """One part of the data, held in tensors."""

    def content(self) -> list[Tensor]:
        """Return the tensors as they lie in memory: what a digest is of."""
        raise NotImplementedError


class ImageDataset(TensorPart):
    """Images in memory as uint8 of shape (N, 1, H, W); handed out as normalised float32."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean_std: tuple[float, float]) -> None:
        self.images = torch.from_numpy(np.array(images, dtype=np.uint8)).unsqueeze(1)
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.mean, self.std = mean_std

    def content(self) -> list[Tensor]:
        return [self.images, self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Batch:
        return (self.images[index].float() - self.mean) / self.std, self.labels[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a finished batch: one gather instead of one call and one stack per image."""
        return self[torch.tensor(indices)]


class TokenWindows(TensorPart):
    """Windows of `sequence_length` tokens and, as target, the same windows one token later (both int64).

    Windows follow each other: one token is an input once.

    Attributes:
        tokens: All tokens, shape (N,).
        sequence_length: Tokens in a window, without the last target.
    """

    tokens: Any
    sequence_length: int

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.sequence_length

    def __getitem__(self, index: int) -> Batch:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a finished batch of windows."""
        raise NotImplementedError


class TokenDataset(TokenWindows):
    """Windows of tokens that are held in a tensor."""

    def __init__(self, tokens: Tensor, sequence_length: int) -> None:
        self.tokens, self.sequence_length = tokens, sequence_length

    def content(self) -> list[Tensor]:
        return [self.tokens]

    def __getitems__(self, indices: list[int]) -> Batch:
        starts = torch.tensor(indices)[:, None] * self.sequence_length
        window = self.tokens[starts + torch.arange(self.sequence_length + 1)].long()
        return window[:, :-1], window[:, 1:]


def sha256_of(parts: Iterable[TensorPart]) -> str:
    """Return the SHA-256, 64 hexadecimal digits, of the bytes of all tensors of some parts, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        for tensor in part.content():
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


class InMemoryData(pl.LightningDataModule):
    """Loaders over the three parts that `load` returns.

    Args:
        batch_size: Examples in a batch, per rank. Training drops the last incomplete batch, so that every
            step has the same size.
        num_workers: Worker processes of each loader; the data is in memory, so 0 is fastest here.
        seed: Seed of the batch order. Default: the run's seed (PL_GLOBAL_SEED, set by
            `seed_everything`), else 0; torch's own seed may differ between ranks, so it is not used.
    """

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int | None = None) -> None:
        super().__init__()
        check_count("batch_size", batch_size)
        check_count("num_workers", num_workers, least=0)
        if seed is not None:
            check_count("seed", seed, least=0)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._parts: dict[str, TensorPart] = {}

    def load(self) -> dict[str, TensorPart]:
        """Return the datasets "train", "val" and "test"."""
        raise NotImplementedError

    @cached_property
    def content_digest(self) -> dict[str, str]:
        """What the data is, whichever release of a package or of Python it came from: name -> SHA-256.

        Names are those of the parts, "train", "val" and "test"; each digest has 64 hexadecimal digits and is that of
        the part's tensors as bytes, one after the other: images (uint8, shape (N, 1, H, W)) and then labels (int64,
        little-endian); or tokens (uint8). Equal digests mean equal examples in equal order; batch size, seed and
        normalisation do not enter. Computed at the first use.

        Raises:
            RuntimeError: Before `setup`.
        """
        if not self._parts:
            raise RuntimeError("content_digest is known after setup: call setup() first")
        return {name: sha256_of([part]) for name, part in self._parts.items()}

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  (Lightning's signature)
        if not self._parts:
            self._parts = self.load()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Raises ValueError when not even one full batch fits."""
        return training_loader(
            self._parts["train"], self.batch_size, trainer=self.trainer, seed=self.seed, **self._settings
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        return evaluation_loader(self._parts["val"], self.batch_size, trainer=self.trainer, **self._settings)

    def test_dataloader(self) -> DataLoader[Batch]:
        return evaluation_loader(self._parts["test"], self.batch_size, trainer=self.trainer, **self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        workers = self.num_workers
        return {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": already_batched}


class DigitsData(InMemoryData):
    """scikit-learn's digits: 1,797 images of shape (1, 8, 8), 10 classes; no download.

    A fixed stratified split (1,077 / 360 / 360), independent of the run's seed.
    """

    def __init__(self, batch_size: int = 64, num_workers: int = 0, seed: int | None = None) -> None:
        super().__init__(batch_size, num_workers, seed)

    def load(self) -> dict[str, TensorPart]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8)
        train, rest = train_test_split(np.arange(len(labels)), test_size=720, stratify=labels, random_state=0)
        val, test = train_test_split(rest, test_size=360, stratify=labels[rest], random_state=0)
        parts = {"train": train, "val": val, "test": test}
        return {name: ImageDataset(images[i], labels[i], _DIGITS_MEAN_STD) for name, i in parts.items()}


class FashionMNISTData(InMemoryData):
    """Fashion-MNIST from its four gzip idx files: images of shape (1, 28, 28), 10 classes.

    Args:
        folder: Where the four files are; Debian's package dataset-fashion-mnist puts them into the default.
        batch_size: See `InMemoryData`, also for `num_workers` and `seed`.
        limit_train: Use only the first so many training images.
        val_size: The last so many images of the training file are the validation part (the file is shuffled).

    Raises:
        FileNotFoundError: A file is missing; says how to get it.
        ValueError: A file is damaged, or a size does not fit.
    """

    def __init__(
        self,
        folder: str = "/usr/share/datasets/fashion-mnist",
        batch_size: int = 256,
        limit_train: int | None = None,
        val_size: int = 5_000,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if limit_train is not None:  # all images
            check_count("limit_train", limit_train)
        check_count("val_size", val_size)
        self.folder, self.limit_train, self.val_size = Path(folder).expanduser(), limit_train, val_size

    def load(self) -> dict[str, TensorPart]:
        images, labels = self._read("train")
        if self.val_size >= len(labels):
            raise ValueError(f"val_size must lie in [1, {len(labels) - 1}], got {self.val_size}")
        kept = slice(0, len(labels) - self.val_size)
        train = slice(0, min(kept.stop, self.limit_train or kept.stop))
        return {
            "train": ImageDataset(images[train], labels[train], _FASHION_MEAN_STD),
            "val": ImageDataset(images[kept.stop :], labels[kept.stop :], _FASHION_MEAN_STD),
            "test": ImageDataset(*self._read("test"), _FASHION_MEAN_STD),
        }

    def _read(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        images_path, labels_path = (self.folder / _FASHION_FILES[part, kind] for kind in ("images", "labels"))
        images, labels = read_idx(images_path, dims=3), read_idx(labels_path, dims=1)
        if len(images) != len(labels):
            raise ValueError(f"{images_path} has {len(images)} images but {labels_path} has {len(labels)} labels")
        return images, labels


class TextData(InMemoryData):
    """Text as bytes (vocabulary 256), cut into windows; train, val and test are contiguous: 90 / 5 / 5 %.

    Args:
        file: A text file, plain or packed by gzip (.gz, .dz), such as Debian's /usr/share/dictd/gcide.dict.dz.
            Default: the documentation inside the running Python (`stdlib_text`), another text in each release.
        sequence_length: Tokens in a window.
        batch_size: See `InMemoryData`, also for `num_workers` and `seed`.
        max_bytes: Use only the first so many bytes, unpacked; memory needed is about that.

    Raises:
        FileNotFoundError: `file` does not exist; says how to get it.
        ValueError: The text is too short for one window in each part, or a gzip file is damaged.
    """

    vocab_size = 256

    def __init__(
        self,
        file: str | None = None,
        sequence_length: int = 128,
        batch_size: int = 16,
        max_bytes: int = 2_000_000,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        check_count("sequence_length", sequence_length)
        check_count("max_bytes", max_bytes)
        self.file, self.sequence_length, self.max_bytes = file, sequence_length, max_bytes

    def load(self) -> dict[str, TensorPart]:
        text = self._text()
        first, second = len(text) * 90 // 100, len(text) * 95 // 100
        if second - first <= self.sequence_length:
            raise ValueError(
                f"{self.file or 'the text'} has {len(text)} bytes, too few: the 5 % for validation must "
                f"hold a window of sequence_length={self.sequence_length}; take at least "
                f"{20 * self.sequence_length + 40} bytes or shorter windows"
            )
        tokens = torch.frombuffer(text, dtype=torch.uint8)
        parts = {"train": tokens[:first], "val": tokens[first:second], "test": tokens[second:]}
        return {name: TokenDataset(part, self.sequence_length) for name, part in parts.items()}

    @cached_property
    def content_digest(self) -> dict[str, str]:
        """As for all data, and "text": the three parts in a row, which is the text used, as `sha256sum` shows it."""
        return {"text": sha256_of(self._parts.values()), **super().content_digest}

    def _text(self) -> bytearray:
        if self.file is None:
            return bytearray(stdlib_text(self.max_bytes))  # a copy: torch's tensors are writable
        return read_text(Path(self.file).expanduser(), self.max_bytes)
