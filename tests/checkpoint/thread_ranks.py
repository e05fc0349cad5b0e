"""Ranks as threads of one process: masks saved and loaded under any layout of parameters, without starting anything."""

import threading
from types import SimpleNamespace

import torch
from torch import nn

from emp_callbacks import EMPPruner
from emp_callbacks.backends import Backend
from emp_callbacks.checkpoint.state import masked_weights
from emp_callbacks.config import EMPConfig
from emp_callbacks.criteria import make_criterion
from emp_callbacks.layer import WeightLayer
from emp_callbacks.layer.mask_mode import MASK_MODES
from emp_callbacks.layer.segment import Segment
from emp_callbacks.pruning.evidence import Evidence
from emp_callbacks.pruning.gating import Gating
from emp_callbacks.pruning.persistence import Persistence
from emp_callbacks.schedule import Clock
from emp_callbacks.trajectory import Trajectory

CLOCK = Clock(steps=5, epochs=2, last_position=4, steps_at_refresh=4, steps_at_epoch=4, epoch_length=2)
SHAPES = {"a": (7, 13), "b.bits": (1, 1), "b": (5, 9)}


class ThreadRank:
    """A rank among threads: sums like a backend."""

    def __init__(self, rank, world_size, shared):
        self.rank, self.world_size, self._shared, self.refreshed = rank, world_size, shared, 0

    def all_sum(self, value):
        barrier, values = self._shared
        values[self.rank] = value
        barrier.wait()
        total = sum(values[1:], start=values[0].clone())
        barrier.wait()
        return total

    from_all = Backend.from_all

    def refresh_copies(self):
        self.refreshed += 1


def on_ranks(world_size, work):
    """Return what `work(backend)` returns, or raises, on each of `world_size` threads."""
    shared, results = (threading.Barrier(world_size, timeout=20), [None] * world_size), [None] * world_size

    def one(rank):
        try:
            results[rank] = work(ThreadRank(rank, world_size, shared))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def whole(rank, ranks, shape):
    size = shape[0] * shape[1]
    return 0, size, slice(size * rank // ranks, size * (rank + 1) // ranks)


def flat(rank, ranks, shape):
    """Chunks of one size, the last cut short or empty: ZeRO."""
    size, chunk = shape[0] * shape[1], -(-shape[0] * shape[1] // ranks) + 3
    start, stop = min(size, rank * chunk), min(size, (rank + 1) * chunk)
    return start, stop - start, slice(0, stop - start)


def columns(rank, ranks, shape):
    """A range of columns: positions that do not follow each other."""
    low, high = shape[1] * rank // ranks, shape[1] * (rank + 1) // ranks
    positions = torch.arange(shape[0] * shape[1]).view(shape)[:, low:high].reshape(-1)
    return positions, len(positions), slice(0, len(positions))


def strided(rank, ranks, shape):
    positions = torch.arange(shape[0] * shape[1])[rank::ranks]
    return positions, len(positions), slice(0, len(positions))


def replicas_of_columns(rank, ranks, shape):
    """Two halves of the ranks hold the same columns, the first half counts them."""
    half = (ranks + 1) // 2
    positions, size, _ = columns(rank % half, half, shape)
    return positions, size, slice(0, size if rank < half else 0)


LAYOUTS = [whole, flat, columns, strided, replicas_of_columns]


def full_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.rand(shape, generator=generator) > 0.4, torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }


def weights_of(layout, backend, full=None):
    """Return this rank's weights in `feedback`, masked and hidden as in `full`; without it dense ones of 1."""
    return masked_weights(layers_of(layout, backend, full))


def layers_of(layout, backend, full=None):
    layers = []
    for name, shape in SHAPES.items():
        positions, size, counted = layout(backend.rank, backend.world_size, shape)
        index = torch.arange(positions, positions + size) if isinstance(positions, int) else positions
        values = torch.ones(size) if full is None else full[name][1].reshape(-1)[index].clone()
        segment = Segment(
            name=name,
            shape=torch.Size(shape),
            output_dim=0,
            owner=values,
            view=lambda tensor: tensor,
            positions=positions,
            replicated=layout is whole,
            counted=counted,
        )
        layers.append(WeightLayer(segment, backend))
        (weight,) = layers[-1].weights
        if full is not None:
            weight.mask = full[name][0].reshape(-1)[index]
            weight.hide()
    return layers


def some_rows():
    trajectory = Trajectory()
    torch.manual_seed(0)
    trajectory.extend(EMPPruner(nn.Linear(3, 2)).refresh())
    return trajectory


def persistence(layers, rows, backend):
    criterion, weights = make_criterion("magnitude", "weights"), masked_weights(layers)
    evidence = Evidence(layers, [], criterion, backend)
    gating = Gating(EMPConfig(), backend)
    parts = SimpleNamespace(
        layers=layers, weights=weights, dynamic=[], criterion=criterion, growth=None, evidence=evidence, gating=gating
    )
    return Persistence(EMPConfig(), MASK_MODES["feedback"](), parts, rows, backend)


def save_from(layout, ranks, folder, full):
    rows = some_rows()

    def work(backend):
        persistence(layers_of(layout, backend, full), rows, backend).save(folder, CLOCK)

    assert on_ranks(ranks, work) == [None] * ranks


def load_to(layout, ranks, folder):
    def work(backend):
        layers = layers_of(layout, backend)
        weights = masked_weights(layers)
        untouched = [weight.weight.clone() for weight in weights]
        rows = Trajectory()
        try:
            clock = persistence(layers, rows, backend).load(folder)
        except Exception:
            for weight, before in zip(weights, untouched, strict=True):
                assert weight.mask is None
                assert torch.equal(weight.weight, before)
            assert not backend.refreshed
            assert not rows
            raise
        assert clock == CLOCK
        assert backend.refreshed == 1
        assert len(rows) == 1
        return weights

    return on_ranks(ranks, work)
