"""Training batches whose order is known beforehand, so that a fit resumes in the middle of an epoch."""

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Example = TypeVar("Example")


class EpochSampler(DistributedSampler[Any]):
    """Shuffled indices that are a pure function of (seed, epoch, rank); no global generator is read.

    Ranks get disjoint parts of one permutation; if it does not divide evenly, its start fills the last parts.
    A subclass of torch's DistributedSampler because Lightning leaves that in place: its older releases wrap
    any other sampler without passing `set_epoch` on, so that every epoch has the order of the first.

    Attributes:
        start: So many of the rank's own indices are left out at the start of the epoch; its length stays as it is.
    """

    start = 0

    def __iter__(self) -> Iterator[Any]:
        places = torch.arange(self.rank, self.total_size, self.num_replicas)[self.start :]
        return self.drawn(places, self.order())

    def order(self) -> Tensor:
        """Return the permutation of this epoch: all ranks' indices, shape (examples,), int64."""
        # Mixed, not added: seed 0 in epoch 1 must not be seed 1 in epoch 0.
        mixed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(mixed))
        return torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]

    def drawn(self, places: Tensor, order: Tensor) -> Iterator[Any]:
        """Return what the dataset is asked for, of places in the epoch of all ranks, shape (n,), int64."""
        return iter(order[places % len(order)].tolist())


class EvenBatches(DistributedSampler[Any]):
    """Lists of indices, each a batch: every index once, in order, and as many batches on each rank.

    Lightning's own sampler has some examples counted twice where the ranks' parts would differ in length. Here they
    differ by at most one, so that the last batch of some ranks is smaller by one, or comes in two; a rank must not run
    out of batches before the others, which wait for it in the collectives of sharded and normalized models.

    Args:
        dataset: What the indices are of.
        batch_size: Most indices in a batch.
        num_replicas: Ranks.
        rank: This one, in [0, num_replicas).

    Raises:
        ValueError: Fewer examples than ranks, or batches of one that cannot come in two.
    """

    def __init__(self, dataset: Any, batch_size: int, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.batch_size, size = batch_size, len(dataset)
        if size < num_replicas or (batch_size == 1 and size % num_replicas):
            raise ValueError(
                f"{size} examples to evaluate in batches of {batch_size} do not make as many batches on each of "
                f"{num_replicas} ranks: choose a larger batch_size, fewer ranks or more examples"
            )

    def __iter__(self) -> Iterator[list[int]]:
        mine = list(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]
        batches = [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]
        if len(batches) < len(self):
            batches[-1:] = [batches[-1][:-1], batches[-1][-1:]]
        return iter(batches)

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)


class _Batches(Dataset[Any]):
    """Asked for a list of indices; a single one is a batch of one (Lightning's overfit_batches asks so)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, indices: Any) -> Any:
        return self.dataset.__getitems__(indices if isinstance(indices, list) else [indices])


class ExampleError(ValueError):
    """An example that cannot be read, in one line: also from a worker, which sends its traceback as the message."""


class _Loader(DataLoader[Example]):
    def __iter__(self) -> Iterator[Example]:  # type: ignore[override]  # a generator: it begins with the first batch
        try:
            yield from super().__iter__()
        except ExampleError as error:
            raise ExampleError(str(error).strip().rpartition(f"{ExampleError.__name__}: ")[2]) from None


class ResumableLoader(_Loader[Example]):
    """A DataLoader that goes on where a fit was interrupted, in the middle of an epoch, with the batch that is due.

    With an `EpochSampler` and examples that are pure functions of what it yields, the batches of an epoch are known
    beforehand; all that is missing is how many of them are done. The trainer counts that, in its checkpoint: batches
    whose step is finished, not those that workers fetched ahead, nor the one in hand when a signal made it save in the
    middle of a step, which is then done again. So the place is read there, and the epoch too, when the first batch is
    asked for. `iter` alone is too early: Lightning calls it before it has told the sampler the epoch, and workers
    would begin to fetch the first epoch's order; and what it tells is one too many after a fit that is bounded by
    max_steps was resumed from an epoch's end (2.5.2 to 2.6.6).

    torchdata's StatefulDataLoader keeps a place of its own. It counts the batch in hand as done, and what it saves
    differs between ranks (states of workers, of random generators), while Lightning keeps that of rank 0 and gives it
    to all. Here `state_dict` is the same on each rank: it says what the count means (batch size, ranks, examples,
    seed), and where the resumed fit differs in that, one line warns that the rest of the epoch is of another split.

    Lightning keeps no random generators and no gradients: dropout goes on with other numbers, and a checkpoint taken
    between two batches of one accumulated step loses the batches of that step so far, which one line says.

    Args:
        args: As in DataLoader, also `settings`.
        trainer: Whose fit it is; counts epochs and batches. None: `sampler.set_epoch` is the caller's.
    """

    def __init__(self, *args: Any, trainer: pl.Trainer | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.trainer = trainer
        self._saved: dict[str, int] | None = None
        self._begun = False

    def __iter__(self) -> Iterator[Example]:  # type: ignore[override]
        if isinstance(self.sampler, EpochSampler):  # Lightning's overfit_batches takes another
            self.sampler.start = 0
            if self.trainer is not None and self._is_trained_on(self.trainer):
                self.sampler.set_epoch(self.trainer.current_epoch)
                self.sampler.start = self._batches_done(self.trainer) * (self.batch_size or 1)
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Return what a number of batches means here; equal on all ranks."""
        sampler: Any = self.sampler
        return {
            "batch_size": self.batch_size or 1,
            "num_replicas": getattr(sampler, "num_replicas", 1),
            "examples": len(self.dataset),  # type: ignore[arg-type]
            "seed": getattr(sampler, "seed", 0),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take the interrupted fit's `state_dict`, to compare with where the fit goes on in the middle of an epoch."""
        self._saved = state

    def _is_trained_on(self, trainer: pl.Trainer) -> bool:
        # Not so for a second loader, of which somebody takes a few batches during the fit.
        return any(loader is self for loader in CombinedLoader(trainer.train_dataloader).flattened)

    def _batches_done(self, trainer: pl.Trainer) -> int:
        if self._begun:  # only the first epoch of a resumed fit may have some
            return 0
        self._begun = True
        # Modulo, because beside a longer loader Lightning goes through this one several times in an epoch.
        done = int(trainer.fit_loop.epoch_loop.batch_progress.current.ready) % len(self)
        if done and trainer.is_global_zero:
            self._say_what_is_lost(done, trainer.accumulate_grad_batches)
        return done

    def _say_what_is_lost(self, done: int, accumulated: int) -> None:
        now = self.state_dict()
        before = self._saved or now
        changed = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
        if changed:
            warnings.warn(
                f"resumed after {done} batches of an epoch with {', '.join(changed)}: the rest of it is of another "
                "split, some examples come twice in this epoch and others not at all; resume with the old values, or "
                "from an epoch's end, to avoid that",
                stacklevel=3,
            )
        if done % accumulated:
            warnings.warn(
                f"resumed after {done} batches of an epoch, within an optimizer step: the gradients of its first "
                f"{done % accumulated} batch(es) are not in the checkpoint; save after a multiple of "
                f"accumulate_grad_batches={accumulated} batches to avoid that",
                stacklevel=3,
            )


def already_batched(batch: Any) -> Any:
    """Return what a dataset's `__getitems__` made of a batch: the loader collates nothing."""
    return batch


def training_loader(
    dataset: Any,
    batch_size: int,
    *,
    trainer: pl.Trainer | None,
    seed: int | None,
    sampler: Callable[..., EpochSampler] = EpochSampler,
    **settings: Any,
) -> ResumableLoader[Any]:
    """Return a loader of the full batches of each epoch, in an order of its own, split over the trainer's ranks.

    Args:
        dataset: Its examples must be a pure function of what `sampler` yields, whichever worker asks.
        batch_size: Examples in a batch, per rank.
        trainer: Gives ranks and place; None: one rank, from the start.
        seed: Seed of the order; None: see `run_seed`.
        sampler: Makes what draws the indices.
        settings: Further arguments of DataLoader.

    Raises:
        ValueError: Not even one full batch fits.
    """
    ranks = _ranks(trainer)
    if len(dataset) < batch_size * ranks["num_replicas"]:
        raise ValueError(
            f"batch_size={batch_size} on {ranks['num_replicas']} rank(s) is more than the {len(dataset)} training "
            "examples: no full batch; choose a smaller batch_size"
        )
    order = sampler(dataset, seed=run_seed(seed), **ranks)
    return ResumableLoader(dataset, batch_size, sampler=order, drop_last=True, trainer=trainer, **settings)


def evaluation_loader(dataset: Any, batch_size: int, *, trainer: pl.Trainer | None, **settings: Any) -> DataLoader[Any]:
    """Return a loader of every example once, split over the trainer's ranks as `EvenBatches` says.

    Args:
        dataset: Has `__getitems__`, which returns a finished batch of a list of indices.
        batch_size: Most examples in a batch, per rank.
        trainer: Gives the ranks; None: one.
        settings: Further arguments of DataLoader.

    Raises:
        ValueError: Not every rank would get as many batches.
    """
    batches = EvenBatches(dataset, batch_size, **_ranks(trainer))
    return _Loader(_Batches(dataset), batch_size=None, sampler=batches, **settings)


def _ranks(trainer: pl.Trainer | None) -> dict[str, int]:
    ranks: dict[str, int] | None = trainer.distributed_sampler_kwargs if trainer else None
    return ranks or {"num_replicas": 1, "rank": 0}


def run_seed(seed: int | None) -> int:
    """Return `seed`, or the run's where it is None: PL_GLOBAL_SEED, set by `seed_everything`, else 0.

    Torch's own seed may differ between ranks, so it is not used.
    """
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
