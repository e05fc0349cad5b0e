"""Labelled images of one split as timm reads them: class folders, tar files, Hugging Face and torchvision datasets."""

import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.readers.img_extensions import IMG_EXTENSIONS

from emp_callbacks.extras import needs
from emp_callbacks.study.recipe.loading import ExampleError

_SYNONYMS = (("train", "training"), ("validation", "val", "valid", "eval", "evaluation"))  # timm's
_STREAMS = ("hfids/", "tfds/", "wds/")


class ImageSource:
    """Decoded images and class indices of one split; what cannot be decoded is an error.

    timm's own dataset hands out the next image instead, with a line in the log, so that an image counts twice.

    Args:
        dataset: What `timm.data.create_dataset` returned.
        name: What it was read from, for messages.

    Attributes:
        classes: Class name -> index; empty where the data do not name them.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._reader, self.name = dataset, getattr(dataset, "reader", None), name
        found = self._reader or dataset
        self.classes: dict[str, int] = dict(
            getattr(found, "class_to_idx", None) or getattr(found, "class_name_to_idx", None) or {}
        )
        self._indices: list[int] | None = None  # ours of the names that another split has
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an RGB image, as it lies in the file (no EXIF rotation, as in timm), and its class.

        Raises:
            ExampleError: It cannot be decoded; names the file.
        """
        self._close_what_was_forked()
        try:
            if self._reader is None:
                image, target = self._dataset[index]
                image = image.convert("RGB")
            else:
                file, target = self._reader[index]
                with file:
                    image = Image.open(file).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ExampleError(
                f"{self._file(index)} cannot be read as an image ({error}): get it again, or take it out"
            ) from error
        return image, self._index_of(int(target))

    def targets(self) -> list[int]:
        """Return the class index of each image; none is decoded."""
        reader = self._reader
        if reader is None:
            found = self._dataset.targets
        elif hasattr(reader, "samples") and hasattr(reader, "targets"):  # of a tar file
            found = reader.targets
        elif hasattr(reader, "samples"):
            found = [target for _, target in reader.samples]
        else:
            found = reader.dataset[reader.label_key]
        return [self._index_of(int(target)) for target in found]

    def entries(self) -> Iterator[tuple[str, int]]:
        """Yield each image's path inside the split and its size in bytes; without files its number and -1."""
        samples = getattr(self._reader, "samples", None)
        for index in range(len(self)):
            if samples is None:
                yield str(index), -1
            elif isinstance(samples[index][0], tarfile.TarInfo):
                image, tar, inner = samples[index]
                yield "/".join(filter(None, (tar, inner and inner.name, image.name))), image.size
            else:
                path = samples[index][0]
                yield path.removeprefix(f"{self._dataset.reader.root}{os.sep}"), os.stat(path).st_size

    def take_classes_of(self, other: "ImageSource") -> None:
        """Count classes as another split does, of which this one may lack some.

        Raises:
            ValueError: It has classes of its own.
        """
        strange = [name for name in self.classes if name not in other.classes]
        if strange and other.classes:
            raise ValueError(
                f"{self.name} has {len(strange)} class(es) that {other.name} has not: {_some(strange)}; name its "
                "folders as those of training"
            )
        if self.classes and self.classes != other.classes:
            self._indices = [other.classes[name] for name in self.classes]
            self.classes = other.classes

    def _index_of(self, target: int) -> int:
        return target if self._indices is None else self._indices[target]

    def _file(self, index: int) -> str:
        name = self._reader.filename(index) if self._reader is not None else None
        return f"{name or f'image {index}'} of {self.name}"

    def _close_what_was_forked(self) -> None:
        # A tar file that was open before the fork has one position for all processes: they would read each other's.
        if self._process != os.getpid():
            self._process = os.getpid()
            self._forget_open_files()

    def _forget_open_files(self) -> None:
        state = getattr(self._reader, "tar_state", None)
        for tar in state.values() if isinstance(state, dict) else filter(None, [state]):
            for part in (tar, *tar.children.values()):
                part.reset()

    def __getstate__(self) -> dict[str, Any]:
        self._forget_open_files()  # they do not travel to a process that is spawned
        return self.__dict__


def open_split(root: str, dataset: str, split: str) -> ImageSource:
    """Return the images of one split.

    Args:
        root: The folder of all splits; for `dataset` names, timm's `root`: where they are kept.
        dataset: "": a folder or a tar file per split in `root`, such as train/ and val/, or train.tar and val.tar,
            with a folder per class inside. Else a name of timm's `create_dataset`, hfds/NAME_OR_FOLDER or torch/NAME.
        split: Its name; train and validation also by timm's other names of them (training; val, valid, eval, ...).

    Raises:
        FileNotFoundError: No such folder, or no such split; names those that are there.
        ValueError: A stream, a class folder without images, or images outside any class folder.
        ImportError: hfds/ needs the package datasets.
    """
    if dataset.lower().startswith(_STREAMS):
        raise ValueError(
            f"dataset={dataset!r} is read as a stream, which has no order to shuffle and resume in: use class folders, "
            "a tar file, hfds/NAME or torch/NAME"
        )
    if not dataset:
        return _open_folder(_find(Path(root).expanduser(), split))
    if dataset.lower().startswith("hfds/"):
        needs(f"dataset={dataset!r}", "text", "datasets")
    source = ImageSource(create_dataset(dataset, root=root or None, split=split), f"split {split!r} of {dataset}")
    _check_labels(source)
    return source


def _find(root: Path, split: str) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder: give the one that holds the splits, such as train and val")
    same = next((names for names in _SYNONYMS if split in names), ())
    for name in (split, *same):
        for path in (root / name, root / f"{name}.tar"):
            if path.exists():
                return path
    there = [entry.name for entry in sorted(root.iterdir()) if entry.is_dir() or entry.suffix == ".tar"]
    raise FileNotFoundError(
        f"{root} has no split {split!r} (folder or .tar file); it holds {_some(there) or 'neither'}"
    )


def _open_folder(path: Path) -> ImageSource:
    try:
        source = ImageSource(create_dataset("", root=str(path), split="", search_split=False), str(path))
    except (RuntimeError, ValueError, tarfile.TarError) as error:  # timm's words for a folder, a tar file without any
        raise ValueError(
            f"{path} holds no images ({', '.join(IMG_EXTENSIONS)}) in class folders, or is damaged: {error}"
        ) from error
    if "" in source.classes:
        raise ValueError(f"{path} holds images outside of class folders: move each into a folder named after its class")
    if path.is_dir() and (empty := [name for name in _folders_in(path) if _is_empty(path / name, source.classes)]):
        raise ValueError(f"{path} has {len(empty)} class folder(s) without images: {_some(empty)}; fill or remove them")
    return source


def _folders_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _is_empty(folder: Path, classes: Mapping[str, int]) -> bool:
    return folder.name not in classes and not any(
        Path(name).suffix.lower() in IMG_EXTENSIONS
        for _, _, names in os.walk(folder, followlinks=True)
        for name in names
    )


def _check_labels(source: ImageSource) -> None:
    unlabelled = sum(target < 0 for target in source.targets())
    if unlabelled:
        raise ValueError(
            f"{source.name}: {unlabelled} of {len(source)} images have no label (a test split of a contest?): "
            "name a split that has"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
