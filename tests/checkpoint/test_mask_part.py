"""What any layout of ranks wrote, any other reads; nobody writes or reads more than its part."""

import pytest
import torch
from safetensors import safe_open

from emp_callbacks.checkpoint import mask_part
from tests.checkpoint.thread_ranks import (
    LAYOUTS,
    SHAPES,
    ThreadRank,
    flat,
    full_tensors,
    load_to,
    save_from,
    weights_of,
    whole,
)


def parts_of(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_what_any_ranks_wrote_any_other_ranks_read(layout, ranks, tmp_path):
    full = full_tensors()
    save_from(layout, ranks, tmp_path, full)
    assert len(parts_of(tmp_path)) == ranks
    for other in LAYOUTS:
        for other_ranks in (1, 2, 3, 4):
            for rank, weights in enumerate(load_to(other, other_ranks, tmp_path)):
                assert not isinstance(weights, Exception), weights
                for weight in weights:
                    positions, size, _ = other(rank, other_ranks, SHAPES[weight.name])
                    index = slice(positions, positions + size) if isinstance(positions, int) else positions
                    mask, dense = (tensor.reshape(-1)[index] for tensor in full[weight.name])
                    assert torch.equal(weight.mask, mask)
                    assert torch.equal(weight.stash, dense[~mask])
                    assert not weight.weight[~mask].any()


def test_each_rank_writes_only_what_it_counts_and_ranges_split_bytes(tmp_path):
    save_from(flat, 3, tmp_path, full_tensors())
    held = []
    for name in parts_of(tmp_path):
        with safe_open(tmp_path / name, framework="pt") as file:
            held += [file.get_tensor(key).tolist() for key in file.keys() if key == "a.runs"]  # noqa: SIM118
    assert held == [[[0, 34]], [[34, 68]], [[68, 91]]]


def test_only_the_needed_ranges_are_read(tmp_path, monkeypatch):
    save_from(whole, 1, tmp_path, full_tensors())
    read = []

    class Slice:
        def __init__(self, inner, key):
            self.inner, self.key = inner, key

        def __getitem__(self, part):
            read.append((self.key, part.start, part.stop))
            return self.inner[part]

    class File:
        def __init__(self, file):
            self.keys, self.get_tensor = file.keys, file.get_tensor
            self.get_slice = lambda key: Slice(file.get_slice(key), key)

    pieces = mask_part._pieces
    monkeypatch.setattr(mask_part, "_pieces", lambda file, *rest: pieces(File(file), *rest))
    weights = weights_of(flat, ThreadRank(0, 9, None))
    [first, *_] = mask_part.read_parts([tmp_path / parts_of(tmp_path)[0]], weights, dense=True)
    pruned = int((~full_tensors()["a"][0].reshape(-1)[:14]).sum())
    assert read[:2] == [("a.bits", None, 2), ("a.dense", 0, pruned)]
    assert len(first[1]) == pruned
