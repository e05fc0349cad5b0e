import gzip
import hashlib
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from emp_callbacks.study.recipe.data import DigitsData, FashionMNISTData, TextData
from emp_callbacks.study.recipe.loading import EpochSampler
from emp_callbacks.study.recipe.sources import read_idx, read_text, stdlib_text


def ready(data):
    data.setup("fit")
    return data


def order(data, epoch):
    loader = ready(data).train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader.sampler)


# --- digits ---


def test_digits_have_the_documented_shapes_types_and_scale():
    data = ready(DigitsData(batch_size=64))
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (64, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) <= set(range(10))
    everything, _ = data._parts["train"][:]
    assert abs(everything.mean()) < 0.01
    assert abs(everything.std() - 1) < 0.01


def test_digits_parts_are_disjoint_complete_stratified_and_independent_of_the_seed():
    first, second = ready(DigitsData(seed=1)), ready(DigitsData(seed=2))
    assert [len(first._parts[part]) for part in ("train", "val", "test")] == [1077, 360, 360]
    images = torch.cat([first._parts[part].images for part in ("train", "val", "test")])
    # No digit occurs twice in the data set, so that a repeated image would be a shared one.
    assert len(torch.unique(images.flatten(1), dim=0)) == len(images) == 1797
    for part in first._parts:
        assert torch.equal(first._parts[part].images, second._parts[part].images)
        shares = torch.bincount(first._parts[part].labels) / len(first._parts[part])
        assert shares.min() > 0.09
        assert shares.max() < 0.11


def test_validation_keeps_every_image_in_order_and_training_drops_the_incomplete_batch():
    data = ready(DigitsData(batch_size=100))
    val_labels = torch.cat([labels for _, labels in data.val_dataloader()])
    assert torch.equal(val_labels, data._parts["val"].labels)
    assert len(torch.cat([labels for _, labels in data.test_dataloader()])) == 360
    assert [len(labels) for _, labels in data.train_dataloader()] == [100] * 10


def test_a_batch_equals_its_examples_one_by_one():
    dataset = ready(DigitsData())._parts["train"]
    images, labels = dataset.__getitems__([5, 3])
    assert torch.equal(images, torch.stack([dataset[5][0], dataset[3][0]]))
    assert labels.tolist() == [dataset[5][1], dataset[3][1]]


@pytest.mark.processes
def test_workers_deliver_the_same_batches():
    alone = [labels for _, labels in ready(DigitsData(batch_size=500, seed=3)).train_dataloader()]
    worked = [labels for _, labels in ready(DigitsData(batch_size=500, seed=3, num_workers=1)).train_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(alone, worked, strict=True))


def test_a_data_module_can_be_pickled():
    data = ready(DigitsData(seed=1))
    assert order(pickle.loads(pickle.dumps(data)), 2) == order(data, 2)


def test_a_batch_size_that_leaves_no_full_batch_is_an_error():
    with pytest.raises(ValueError, match=r"batch_size=2000.*1077"):
        ready(DigitsData(batch_size=2000)).train_dataloader()


@pytest.mark.parametrize(
    ("data", "name", "least"),
    [
        (DigitsData, "batch_size", 1),
        (DigitsData, "num_workers", 0),
        (DigitsData, "seed", 0),
        (FashionMNISTData, "limit_train", 1),
        (FashionMNISTData, "val_size", 1),
        (TextData, "sequence_length", 1),
        (TextData, "max_bytes", 1),
    ],
)
def test_a_number_of_something_is_a_whole_number(data, name, least):
    for value in (least - 1, 1.5, True, "x"):
        with pytest.raises(ValueError, match=rf"{name} must be an integer >= {least}, got {value!r}"):
            data(**{name: value})


# --- batch order ---


def test_the_order_is_a_permutation_and_a_function_of_seed_and_epoch_alone():
    expected = order(DigitsData(seed=7), 3)
    assert sorted(expected) == list(range(1077))
    torch.manual_seed(99)
    torch.rand(1000)
    np.random.seed(4)
    assert order(DigitsData(seed=7), 3) == expected


def test_seeds_and_epochs_do_not_share_orders():
    orders = [tuple(order(DigitsData(seed=seed), epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9  # in particular not: seed 0, epoch 1 = seed 1, epoch 0


def test_reading_the_order_leaves_torchs_generator_alone():
    sampler = EpochSampler(range(10), num_replicas=1, rank=0, seed=0)
    before = torch.get_rng_state()
    list(sampler)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_seed_is_the_run_seed_at_the_time_of_the_loader(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    data = DigitsData()
    assert order(data, 0) == order(DigitsData(seed=0), 0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert order(data, 0) == order(DigitsData(seed=5), 0)


@pytest.mark.parametrize(("size", "ranks"), [(12, 3), (13, 3), (2, 5)])
def test_ranks_share_one_permutation(size, ranks):
    parts = []
    for rank in range(ranks):
        sampler = EpochSampler(range(size), num_replicas=ranks, rank=rank, seed=1)
        sampler.set_epoch(2)
        parts.append(list(sampler))
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) == len(sampler)
    together = [index for part in parts for index in part]
    assert set(together) == set(range(size))
    assert len(together) == -(-size // ranks) * ranks  # fewer than one index per rank occurs twice


class Recorder(pl.LightningModule):
    """Notes the labels that it trains on; `noise` consumes the global generator."""

    def __init__(self, noise=0):
        super().__init__()
        self.weight, self.noise, self.seen = nn.Parameter(torch.zeros(1)), noise, []

    def training_step(self, batch, batch_idx):
        torch.rand(self.noise)
        self.seen.append((self.current_epoch, *batch[1].tolist()))
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, epochs, noise=0, ckpt_path=None, **settings):
    task = Recorder(noise)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, enable_checkpointing=False, **settings,
    )  # fmt: skip
    trainer.fit(task, datamodule=DigitsData(batch_size=200, seed=1), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return task.seen


def test_lightning_sets_the_epoch_and_a_resumed_run_continues_the_order(tmp_path):
    whole = fit(tmp_path, 3)
    assert len({labels for _, *rest in whole for labels in [tuple(rest)]}) == 15  # every epoch another order
    assert fit(tmp_path, 3, noise=17) == whole
    fit(tmp_path, 2)
    assert fit(tmp_path, 3, ckpt_path=tmp_path / "2.ckpt") == whole[10:]


# --- Fashion-MNIST ---


HUGE_HEADER = (0x0803).to_bytes(4, "big") + b"\xff" * 12


def idx(array):
    header = (0x0800 + array.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path):
    for prefix, count in (("train", 30), ("t10k", 10)):
        labels = np.arange(count) % 10
        images = np.broadcast_to(np.arange(count)[:, None, None], (count, 28, 28))
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


def test_fashion_reads_the_four_files_and_splits_off_the_end(fashion):
    data = ready(FashionMNISTData(str(fashion), batch_size=4, val_size=6))
    train, val, test = (data._parts[part] for part in ("train", "val", "test"))
    assert train.images[:, 0, 0, 0].tolist() == list(range(24))
    assert val.images[:, 0, 0, 0].tolist() == list(range(24, 30))
    assert test.images[:, 0, 27, 27].tolist() == list(range(10))
    assert val.labels.tolist() == [4, 5, 6, 7, 8, 9]
    images, _ = next(iter(data.val_dataloader()))
    assert images.shape == (4, 1, 28, 28)
    assert images.dtype == torch.float32
    assert images[0, 0, 0, 0] == pytest.approx((24 - 72.94) / 90.02)


def test_fashion_limit_train_shortens_training_only(fashion):
    data = ready(FashionMNISTData(str(fashion), limit_train=8, val_size=6))
    assert [len(data._parts[part]) for part in ("train", "val", "test")] == [8, 6, 10]


def test_fashion_missing_files_name_the_folder_and_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        FashionMNISTData(str(tmp_path / "nowhere")).setup()
    for part in (str(tmp_path / "nowhere"), "dataset-fashion-mnist", "--data.folder", "zalandoresearch"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda raw: raw[:-20], "truncated", id="cut-gzip"),
        pytest.param(lambda raw: b"<html>", "not a gzip file", id="not-gzip"),
        pytest.param(lambda raw: gzip.compress(gzip.decompress(raw)[:-5]), "header says 23520", id="cut-data"),
        pytest.param(lambda raw: gzip.compress(b"\0" * 16), "magic number 00000803", id="magic"),
        pytest.param(lambda raw: gzip.compress(b"\0\0\x08\x03\0"), "magic number", id="short-header"),
        pytest.param(lambda raw: gzip.compress(gzip.decompress(raw) + b"0"), "more than 23520", id="long-data"),
        pytest.param(lambda raw: gzip.compress(HUGE_HEADER), "promises 79,228,162,", id="huge-header"),
        pytest.param(lambda raw: gzip.compress(idx(np.zeros((29, 28, 28)))), "29 images.*30 labels", id="count"),
    ],
)
def test_fashion_damaged_files_are_clear_errors(fashion, damage, message):
    path = fashion / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        FashionMNISTData(str(fashion), val_size=6).setup()
    assert str(path) in str(error.value)


def test_a_file_is_unpacked_no_further_than_its_header_says(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(idx(np.zeros((2, 3, 3))) + bytes(50_000_000)))
    tracemalloc.start()
    with pytest.raises(ValueError, match="holds more than 18 bytes of data, its header says 18"):
        read_idx(path, dims=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_fashion_sizes_are_checked(fashion):
    with pytest.raises(ValueError, match=r"val_size.*29.*got 30"):
        FashionMNISTData(str(fashion), val_size=30).setup()


# --- text ---


def text_file(folder, size):
    path = folder / "my.txt"
    path.write_bytes(bytes(i % 251 for i in range(size)))
    return str(path)


def test_text_windows_are_shifted_by_one_and_parts_are_contiguous(tmp_path):
    data = ready(TextData(text_file(tmp_path, 2000), sequence_length=16, batch_size=4))
    inputs, targets = next(iter(data.val_dataloader()))
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs[0].tolist() == [(1800 + i) % 251 for i in range(16)]
    assert targets[0, -1] == (1800 + 16) % 251
    assert torch.equal(inputs[1], (inputs[0] + 16) % 251)
    assert torch.cat([data._parts[part].tokens for part in ("train", "val", "test")]).numpy().tobytes() == (
        Path(data.file).read_bytes()
    )
    assert [len(data._parts[part].tokens) for part in ("train", "val", "test")] == [1800, 100, 100]
    assert torch.equal(data._parts["val"][1][0], inputs[1])


@pytest.mark.parametrize(("length", "windows"), [(9, 11), (10, 9)])
def test_the_last_text_window_has_its_last_target(tmp_path, length, windows):
    data = TextData(text_file(tmp_path, 2000), sequence_length=length, batch_size=4)
    dataset = ready(data)._parts["val"]
    assert len(dataset) == windows  # 99 of 100 tokens have a successor
    assert dataset[windows - 1][1][-1] == dataset.tokens[windows * length]


def test_text_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no-such\.txt.*--data\.file"):
        TextData(str(tmp_path / "no-such.txt")).setup()
    with pytest.raises(ValueError, match=r"320 bytes.*sequence_length=16.*at least 360 bytes"):
        TextData(text_file(tmp_path, 320), sequence_length=16).setup()  # 16 bytes: no target for the last
    assert ready(TextData(text_file(tmp_path, 360), sequence_length=16, batch_size=1))._parts["val"]


@pytest.mark.parametrize("name", ["my.txt.gz", "my.dict.dz", "no-suffix"])
def test_a_packed_text_is_read_as_its_content_whatever_its_name(tmp_path, name):
    plain, packed = Path(text_file(tmp_path, 2000)), tmp_path / name
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    settings = {"sequence_length": 16, "max_bytes": 1000}
    assert read_text(packed, 1000) == plain.read_bytes()[:1000]
    assert ready(TextData(str(packed), **settings)).content_digest == (
        ready(TextData(str(plain), **settings)).content_digest
    )


def test_a_plain_text_named_like_a_packed_one_is_read_as_it_is(tmp_path):
    (tmp_path / "plain.gz").write_bytes(b"not packed")
    assert read_text(tmp_path / "plain.gz", 100) == b"not packed"


def test_a_text_is_unpacked_no_further_than_asked(tmp_path):
    path = tmp_path / "long.gz"
    path.write_bytes(gzip.compress(bytes(50_000_000)))
    tracemalloc.start()
    assert len(read_text(path, 3_000_000)) == 3_000_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6_000_000  # the text, the piece that comes next, and room for what grows


def test_a_damaged_packed_text_is_a_clear_error(tmp_path):
    path, raw = tmp_path / "cut.dz", gzip.compress(np.random.default_rng(0).bytes(5000))
    for damaged in (raw[:-500], raw[:40] + b"\xff" * 200 + raw[240:], raw[:2] + b"\x09" + raw[3:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cut\.dz is a damaged gzip file .*get the file again"):
            read_text(path, 10_000)


def test_a_missing_text_of_a_package_names_the_package(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gcide\.dict\.dz.*`apt-get install dict-gcide`.*--data\.file"):
        TextData(str(tmp_path / "gcide.dict.dz")).setup()
    with pytest.raises(FileNotFoundError) as error:
        TextData(str(tmp_path / "my.txt")).setup()
    assert "apt-get" not in str(error.value)


def test_the_default_text_is_documentation_and_respects_the_cap():
    topics_only = stdlib_text(100_000)
    assert len(topics_only) == 100_000
    assert "statement" in topics_only.decode(errors="ignore")
    data = ready(TextData(max_bytes=100_000))
    assert len(data._parts["train"]) == (90_000 - 1) // 128


def test_the_docstrings_follow_the_topics_in_one_fixed_order():
    text = stdlib_text(500_000)
    stdlib_text.cache_clear()
    assert stdlib_text(500_000) == text
    assert len(text) == 500_000
    assert b"Record of phased-in incompatible language changes." in text  # __future__.py sorts first


# --- digests ---


def sha256(*arrays):
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def test_the_digest_of_images_is_that_of_pixels_and_labels(fashion):
    data = ready(FashionMNISTData(str(fashion), val_size=6))
    pixels = np.repeat(np.arange(30, dtype=np.uint8), 28 * 28)
    labels = np.arange(30, dtype=np.int64) % 10
    assert list(data.content_digest) == ["train", "val", "test"]
    assert data.content_digest["train"] == sha256(pixels[: 24 * 784], labels[:24])
    assert data.content_digest["val"] == sha256(pixels[24 * 784 :], labels[24:])


def test_the_digest_of_text_is_that_of_the_bytes_used(tmp_path):
    data = ready(TextData(text_file(tmp_path, 3000), sequence_length=16, max_bytes=2000))
    used = np.frombuffer(Path(data.file).read_bytes()[:2000], np.uint8)
    assert data.content_digest == {
        "text": sha256(used), "train": sha256(used[:1800]), "val": sha256(used[1800:1900]), "test": sha256(used[1900:]),
    }  # fmt: skip


def test_the_digest_follows_the_content_and_nothing_else(fashion):
    sizes = {"batch_size": 4, "val_size": 6}
    digest = ready(FashionMNISTData(str(fashion), seed=1, **sizes)).content_digest
    assert ready(FashionMNISTData(str(fashion), seed=2, **{**sizes, "batch_size": 8})).content_digest == digest
    labels = np.arange(30) % 10
    labels[[0, 1]] = labels[[1, 0]]
    (fashion / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    changed = ready(FashionMNISTData(str(fashion), **sizes)).content_digest
    assert [name for name in digest if digest[name] != changed[name]] == ["train"]


def test_the_digest_is_computed_once(tmp_path, monkeypatch):
    data = ready(TextData(text_file(tmp_path, 2000), sequence_length=16))
    first = data.content_digest
    monkeypatch.delattr(hashlib, "sha256")
    assert data.content_digest is first


@pytest.mark.parametrize("data", [DigitsData, TextData])
def test_there_is_no_digest_before_setup(data):
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        _ = data().content_digest
