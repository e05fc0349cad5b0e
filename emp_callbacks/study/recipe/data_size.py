"""How much data a rank will see in an epoch: the data are set up, where that is soon done, and nothing is fetched."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from emp_callbacks.blame import raised_by_us
from emp_callbacks.study.recipe.on_meta import AskedTrainer

__all__ = ["DataSize", "data_size"]


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """What training data are.

    Attributes:
        told: Class of the data module, and what was not looked at.
        batch: Examples in a batch of one rank; None: not known.
        batches: Of an epoch, on each rank; None: not known.
        problem: Why there are none, in one line; "" where there are.
        unsure: Why there may be none, in one line.
    """

    told: str
    batch: int | None = None
    batches: int | None = None
    problem: str = ""
    unsure: str = ""


def data_size(data: Any, trainer: AskedTrainer, patience: float) -> DataSize:
    """Set the training data up and return their size.

    Args:
        data: The data module; None: the recipe has none.
        trainer: Says what is asked for.
        patience: Seconds that this may take.
    """
    if data is None:
        return DataSize(told="none")
    name, data.trainer = type(data).__name__, trainer
    try:
        with _at_most(patience):
            data.setup("fit")
            loader = data.train_dataloader()
    except TimeoutError:
        return DataSize(told=f"{name}: not looked at, to set it up takes more than {patience:g} seconds")
    except Exception as error:
        return _missing(name, error, prepares=type(data).prepare_data is not pl.LightningDataModule.prepare_data)
    batch, batches = _batch_of(loader, data), _batches_of(loader, trainer)
    problem = (
        "" if batches != 0 else f"{name}: {trainer.world_size} ranks do not get one batch of {batch} examples each"
    )
    return DataSize(told=name, batch=batch, batches=batches, problem=problem)


def _missing(name: str, error: Exception, *, prepares: bool) -> DataSize:
    told = " ".join(str(error).split())
    told = f"{name}: {told if raised_by_us(error) else f'{type(error).__name__}: {told}'}"
    if prepares:
        return DataSize(told=f"{name}: not set up", unsure=f"{told} (prepare_data was not called: it may download)")
    return DataSize(told=f"{name}: not set up", problem=told)


def _batch_of(loader: Any, data: Any) -> int | None:
    places = (loader, getattr(loader, "batch_sampler", None), data)
    sizes = (getattr(place, "batch_size", None) for place in places)
    return next((size for size in sizes if isinstance(size, int)), None)


def _batches_of(loader: Any, trainer: AskedTrainer) -> int | None:
    """Return how many batches of an epoch a rank gets; None where a stream does not say."""
    try:
        batches: int = len(loader)
    except (TypeError, NotImplementedError):
        return None
    ranks = trainer.distributed_sampler_kwargs["num_replicas"]
    sampler: Any = getattr(loader, "sampler", None)
    size: int | None = getattr(loader, "batch_size", None)
    divided = getattr(sampler, "num_replicas", 1) == ranks or not trainer._accelerator_connector.use_distributed_sampler
    if divided or sampler is None or size is None:
        return batches
    own: int = -(-len(sampler) // ranks)  # Lightning will give it a sampler that divides it
    return own // size if loader.drop_last else -(-own // size)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError when a block takes longer; outside of the main thread, which signals reach, it may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
