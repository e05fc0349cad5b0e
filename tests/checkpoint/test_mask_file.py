"""Masks on disk: a resumed run is the run that was not stopped; damage is refused and a kill loses nothing."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from emp_callbacks import EMPPruner
from emp_callbacks.checkpoint import mask_file, mask_part
from emp_callbacks.trajectory import Trajectory
from tests.checkpoint.thread_ranks import (
    CLOCK,
    flat,
    full_tensors,
    layers_of,
    load_to,
    on_ranks,
    persistence,
    save_from,
    some_rows,
    weights_of,
    whole,
)
from tests.pruning.test_resume import SETTINGS, STEPS, Run, assert_equal


def parts_of(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def index_of(folder):
    return json.loads((folder / mask_file.INDEX).read_text())


# ---- one process --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("stop", [0, 4, 7])
def test_a_run_resumed_from_a_folder_equals_the_run_that_was_not_stopped(kind, stop, tmp_path):
    whole = Run(SETTINGS[kind]).train(0, STEPS)
    first = Run(SETTINGS[kind]).train(0, stop)
    first.pruner.save(tmp_path)
    resumed = Run(SETTINGS[kind])
    resumed.net.load_state_dict(first.net.state_dict())
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    resumed.pruner.load(tmp_path)
    assert_equal(first, resumed)
    assert_equal(whole, resumed.train(stop, STEPS))


@pytest.mark.parametrize("seed", [5, 2**64 - 1])
def test_random_scores_of_a_resumed_process_follow_the_seed_in_the_folder(seed, tmp_path):
    whole, stopped = (Run(SETTINGS["random"], seed=seed).train(0, last) for last in (STEPS, 3))
    stopped.pruner.save(tmp_path)
    assert index_of(tmp_path)["seed"] == seed
    resumed = Run(SETTINGS["random"], seed=1)
    resumed.net.load_state_dict(stopped.net.state_dict())
    resumed.optimizer.load_state_dict(stopped.optimizer.state_dict())
    resumed.pruner.load(tmp_path)
    assert_equal(whole, resumed.train(3, STEPS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masks_cost_one_bit_per_weight_and_the_stash_what_is_pruned(dtype, tmp_path):
    net = nn.Linear(301, 203, bias=False, dtype=dtype)
    pruner = EMPPruner(net)
    pruner.refresh()
    pruner.save(tmp_path)
    pruned = int((~pruner.masks["weight"]).sum())
    least = (301 * 203 + 7) // 8 + pruned * dtype.itemsize
    [name] = parts_of(tmp_path)
    assert least < (tmp_path / name).stat().st_size < least + 512
    with pruner.dense_weights():
        dense = net.weight.detach().clone()
    other = nn.Linear(301, 203, bias=False, dtype=dtype)
    other.load_state_dict(net.state_dict())
    loaded = EMPPruner(other)
    loaded.load(tmp_path)
    with loaded.dense_weights():
        assert torch.equal(other.weight, dense)


def test_convolutions_keep_their_memory_format(tmp_path):
    torch.manual_seed(0)
    nets = [nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last), nn.Conv2d(3, 5, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    saved = EMPPruner(nets[0])
    saved.refresh()
    saved.save(tmp_path)
    loaded = EMPPruner(nets[1])
    loaded.load(tmp_path)
    assert torch.equal(saved.masks["weight"], loaded.masks["weight"])
    assert torch.equal(nets[0].weight, nets[1].weight)
    with saved.dense_weights(), loaded.dense_weights():
        assert torch.equal(nets[0].weight, nets[1].weight)


def test_a_new_save_replaces_the_old_one_and_leaves_other_files_alone(tmp_path):
    (tmp_path / "model.safetensors").write_text("not ours")
    run = Run(SETTINGS["feedback"]).train(0, 4)
    run.pruner.save(tmp_path)
    old = parts_of(tmp_path)
    run.train(4, 7).pruner.save(tmp_path)
    assert len(parts_of(tmp_path)) == 2
    assert set(parts_of(tmp_path)) & set(old) == {"model.safetensors"}
    clock = index_of(tmp_path)["clock"]
    assert (clock["steps"], clock["epochs"], clock["last_position"], clock["steps_at_refresh"]) == (7, 3, 6, 6)


# ---- damage -------------------------------------------------------------------------------------------------------


def cut(folder):
    path = folder / parts_of(folder)[1]
    path.write_bytes(path.read_bytes()[:-3])
    return ValueError, f"{path.name} is truncated"


def flip(folder):
    path = folder / parts_of(folder)[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return ValueError, f"{path.name} is damaged"


def lose(folder):
    path = folder / parts_of(folder)[1]
    path.unlink()
    return FileNotFoundError, f"{path.name} is missing"


def lose_index(folder):
    (folder / mask_file.INDEX).unlink()
    return FileNotFoundError, f"{mask_file.INDEX} is missing.*holds no finished save"


def sign(folder, **changes):
    """Change the index and sign it again: what only the checks behind the signature can find."""
    index = index_of(folder) | changes
    del index["sha256"]
    (folder / mask_file.INDEX).write_bytes(mask_file._signed(index))


def edit(**changes):
    def damage(folder):
        sign(folder, **{k: v for k, v in changes.items() if k != "message"})
        return ValueError, rf"{mask_file.INDEX}: .*{changes['message']}"

    return damage


def clock(**changes):
    return edit(
        clock=dataclasses.asdict(CLOCK) | changes, message="position, units or trajectory cannot be read .*clock"
    )


def edit_unsigned(folder):
    path = folder / mask_file.INDEX
    path.write_text(path.read_text().replace('"last_position":4', '"last_position":3'))
    return ValueError, rf"{mask_file.INDEX}: it is damaged or was edited"


def evidence_of_another_shape(folder):
    path = folder / parts_of(folder)[0]
    save_file({**load_file(path), "evidence/site:a:total": torch.zeros(3, dtype=torch.float64)}, path)
    files = index_of(folder)["files"]
    files[0] |= {"bytes": path.stat().st_size, "sha256": mask_part.sha256(path).hex()}
    sign(folder, files=files)
    return ValueError, r"evidence 'site:a:total', \(3,\), torch.float64, is not of this model"


def tear_index(folder):
    path = folder / mask_file.INDEX
    path.write_text(path.read_text()[:-20])
    return ValueError, mask_file.INDEX


def uncover(folder):
    index = index_of(folder)
    sign(folder, files=index["files"][:1] + index["files"][2:], world_size=2)
    return ValueError, r"no file covers the mask of 'a' at flat index \d+; .* older checkpoint"


def cover_twice(folder):
    index = index_of(folder)
    sign(folder, files=[*index["files"], index["files"][1]], world_size=4)
    return ValueError, r"two files cover the mask of 'a' at flat index \d+; .* older checkpoint"


DAMAGES = {
    "truncated": cut,
    "flipped": flip,
    "missing": lose,
    "no-index": lose_index,
    "torn-index": tear_index,
    "uncovered": uncover,
    "twice": cover_twice,
    "format": edit(format=99, message="not the state of an EMP pruner"),
    "mode": edit(mode="freeze", message="mode='freeze', this run has mode='feedback'"),
    "scope": edit(scope="row", message="scope='row', this run has scope='global'"),
    "shape": edit(shapes={"a": [7, 13]}, message="masks belong to other parameters: b"),
    "no-shapes": edit(shapes=None, message="no parameter shapes"),
    "edited": edit_unsigned,
    "no-clock": edit(clock=[1], message="position, units or trajectory cannot be read"),
    "negative-clock": clock(steps=-5),
    "empty-clock": edit(clock={}, message="its clock says nothing of steps, epochs, last_position, steps_at_refresh, "),
    "true-clock": clock(epochs=True),
    "clock-of-words": clock(steps_at_epoch="4"),
    "epoch-of-nothing": clock(epoch_length=0.5),
    "position-ahead": clock(last_position=4000),
    "refresh-ahead": clock(steps_at_refresh=6),
    "units": edit(units={"a": {"units": 3, "pruned": [], "mean": None}}, message="units of \\['a'\\]"),
    "seed": edit(seed="0", message="its seed is '0', not an integer"),
    "rows": edit(
        trajectory={"rows": [{"step": 1}], "total": 1, "path": None},
        message="position, units or trajectory cannot be read",
    ),
    "fewer-rows": edit(trajectory={"rows": [], "total": 3, "path": None}, message="0 rows of 3"),
    "batches": edit(batches=None, message="the steps of its gradients are None"),
    "evidence": evidence_of_another_shape,
    "files": edit(files=[{"name": "x"}], message="no valid list of files"),
    "few-files": edit(world_size=9, message="3 files of 9 ranks"),
    "masked": edit(masked=None, message="what is masked"),
    "masked-by-number": edit(masked=[3], message="what is masked"),
    "masked-others": edit(masked=["a", "b", "x"], message="masks belong to other parameters: x"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_damage_is_refused_by_all_ranks_and_changes_nothing(damage, ranks, tmp_path):
    save_from(flat, 3, tmp_path, full_tensors())
    kind, message = DAMAGES[damage](tmp_path)
    errors = load_to(flat, ranks, tmp_path)
    for error in errors:
        assert type(error) is kind
        with pytest.raises(kind, match=message):
            raise error


def test_layers_without_a_mask_beside_layers_with_one(tmp_path):
    full = full_tensors()

    def save(backend):
        layers = layers_of(flat, backend, full)
        layers[-1].weights[0].unhide()
        layers[-1].weights[0].mask = None
        persistence(layers, some_rows(), backend).save(tmp_path, CLOCK)

    assert on_ranks(2, save) == [None] * 2
    for ranks in (1, 3):
        for weights in load_to(flat, ranks, tmp_path):
            assert [weight.name for weight in weights if weight.mask is not None] == ["a", "b.bits"]


def test_every_flipped_bit_of_the_index_is_refused(tmp_path):
    save_from(flat, 1, tmp_path, full_tensors())
    path = tmp_path / mask_file.INDEX
    content = path.read_bytes()
    assert mask_file._signed({k: v for k, v in json.loads(content).items() if k != "sha256"}) == content
    for position in range(0, len(content), 7):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            [error] = load_to(flat, 1, tmp_path)
            assert type(error) is ValueError
            assert "\n" not in str(error)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_all_files_of_a_save_have_the_mode_that_the_umask_gives(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        save_from(flat, 2, tmp_path, full_tensors())
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {
        name: oct(mode) for name in [*parts_of(tmp_path), mask_file.INDEX]
    }


def test_damage_that_one_rank_sees_is_told_by_all(tmp_path):
    save_from(whole, 3, tmp_path, full_tensors())
    flip(tmp_path)  # of three ranks the second reads this file through
    errors = load_to(whole, 3, tmp_path)
    assert [str(error).startswith("rank 1: ") for error in errors] == [True, False, True]
    assert all("-00001-of-00003.safetensors is damaged" in str(error) for error in errors)


def test_ranks_that_see_different_folders_are_refused(tmp_path):
    for i in range(2):
        save_from(whole, 1, tmp_path / str(i), full_tensors(i))

    def work(backend):
        folder = tmp_path / str(backend.rank)
        persistence(layers_of(whole, backend), Trajectory(), backend).load(folder)

    for error in on_ranks(2, work):
        with pytest.raises(ValueError, match=r"ranks \[1\] see another file than rank 0"):
            raise error


def test_a_save_into_folders_of_single_hosts_is_refused_when_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(mask_file, "_PATIENCE", 0.1)
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for folder in folders:
        folder.mkdir()
    full, rows = full_tensors(), some_rows()

    def work(backend):
        persistence(layers_of(flat, backend, full), rows, backend).save(folders[backend.rank], CLOCK)

    for error in on_ranks(2, work):
        assert isinstance(error, FileNotFoundError)
        assert "which rank 1 wrote: its host has another folder of this name. Save to a folder that all" in str(error)
        assert str(error).count("host0/emp_masks-") == 1
    assert not parts_of(folders[0])
    assert not parts_of(folders[1])


def test_a_part_that_cannot_be_written_leaves_the_old_checkpoint_on_all_ranks(tmp_path, monkeypatch):
    full = full_tensors()
    save_from(flat, 2, tmp_path, full)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = mask_file.write_part

    def full_disk(path, weights, evidence):
        if "-00001-of" in path.name:
            path.write_bytes(b"half")
            raise OSError("no space left")
        return write(path, weights, evidence)

    monkeypatch.setattr(mask_file, "write_part", full_disk)

    def work(backend):
        weights = weights_of(flat, backend, full_tensors(1))
        mask_file.save_masks(tmp_path, {}, weights, backend)

    for error in on_ranks(2, work):
        with pytest.raises(OSError, match="no space left"):
            raise error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_trajectory_that_cannot_be_written_leaves_the_run_untouched(tmp_path):
    Run(SETTINGS["feedback"]).train(0, 4).pruner.save(tmp_path / "masks")
    run = Run(SETTINGS["feedback"], tmp_path / "rows.jsonl").train(0, 7)
    before, rows, weights = run.pruner.masks, list(run.pruner.trajectory), run.net[0].weight.detach().clone()
    (tmp_path / "rows.jsonl.partial").mkdir()
    with pytest.raises(OSError, match="partial"):
        run.pruner.load(tmp_path / "masks")
    assert list(run.pruner.trajectory) == rows
    assert run.pruner.steps == 7
    assert torch.equal(run.net[0].weight, weights)
    assert all(torch.equal(mask, before[name]) for name, mask in run.pruner.masks.items())


# ---- a kill in the middle -----------------------------------------------------------------------------------------


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_part(tensors, path):
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{")
    die()


def half_an_index(folder, index):
    (folder / f"{mask_file.INDEX}.host-0.partial").write_bytes(mask_file._signed(index)[:40])
    die()


def replace_and_die(source, target):
    os.rename(source, target)
    die()


KILLS = {
    "half-a-part": ((mask_part, "write_tensors"), half_a_part, "old"),
    "before-the-index": ((mask_file, "_write_index"), die, "old"),
    "half-an-index": ((mask_file, "_write_index"), half_an_index, "old"),
    "before-the-rename": ((mask_file.os, "replace"), die, "old"),
    "after-the-rename": ((mask_file.os, "replace"), replace_and_die, "new"),
    "while-tidying": ((mask_file, "_remove"), die, "new"),
}


@pytest.mark.processes
@pytest.mark.parametrize("moment", KILLS)
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_kill_leaves_the_old_checkpoint_or_the_new_one(moment, tmp_path, monkeypatch):
    run = Run(SETTINGS["feedback"]).train(0, 4)
    run.pruner.save(tmp_path)
    expected = {"old": (4, run.pruner.masks)}
    run.train(4, 7)
    expected["new"] = (7, run.pruner.masks)
    where, how, left = KILLS[moment]
    child = os.fork()
    if child == 0:
        try:
            setattr(*where, how)
            run.pruner.save(tmp_path)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    resumed = Run(SETTINGS["feedback"])
    resumed.pruner.load(tmp_path)
    steps, masks = expected[left]
    assert resumed.pruner.steps == steps
    assert all(torch.equal(mask, masks[name]) for name, mask in resumed.pruner.masks.items())
    run.pruner.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "the next save tidies up"
