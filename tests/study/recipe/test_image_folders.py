"""Real image data on small stand-ins in the same format: class folders, tar files, parquet, torchvision."""

import pickle
import random
import shutil
import tarfile

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform
from torch import nn

from emp_callbacks.blame import raised_by_us
from emp_callbacks.study.recipe.image_folders import DrawSampler, ImageFolderData, _transforms

CLASSES = ("n01440764", "n01443537", "n01484850")
STRONG = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "re_mode": "pixel", "interpolation": "random"}
MIXED = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def draw(root, per_class=6, seed=0):
    """A folder per class of JPEGs; the mean of an image tells class and number."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.normal(60 * (label + 1), 40, (40 + number, 44, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name}_{number}.JPEG", quality=90)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The usual layout of ImageNet; tests that change it take `folder`."""
    root = tmp_path_factory.mktemp("imagenet")
    draw(root / "train")
    draw(root / "val", per_class=3, seed=1)
    return root


@pytest.fixture
def folder(drawn, tmp_path):
    return shutil.copytree(drawn, tmp_path / "imagenet")


def ready(root, **settings):
    defaults = {"num_classes": 3, "input_size": 32, "batch_size": 4, "num_workers": 0, "seed": 1}
    data = ImageFolderData(str(root), **{**defaults, **settings})
    data.setup("fit")
    return data


def epoch_of(data, epoch=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def assert_equal_batches(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- what comes out ---


def test_batches_have_the_documented_shapes_types_and_scale(drawn):
    plain, mixed = epoch_of(ready(drawn)), epoch_of(ready(drawn, mixup=MIXED))
    assert [tuple(images.shape) for images, _ in plain] == [(4, 3, 32, 32)] * 4  # 18 images: 2 are dropped
    assert (plain[0][0].dtype, plain[0][1].dtype) == (torch.float32, torch.int64)
    assert (tuple(mixed[0][1].shape), mixed[0][1].dtype) == ((4, 3), torch.float32)
    assert torch.allclose(mixed[0][1].sum(1), torch.ones(4))


def test_evaluation_images_are_those_of_timms_own_dataset(drawn):
    settings = {"interpolation": "bicubic", "crop_pct": 0.9}
    images, _ = next(iter(ready(drawn, augmentation=settings).val_dataloader()))
    own = ImageDataset(str(drawn / "val"), transform=create_transform(32, **settings))
    assert torch.equal(images, torch.stack([own[index][0] for index in range(4)]))


def test_evaluation_takes_every_image_once_in_order_and_without_chance(drawn):
    data = ready(drawn, augmentation=STRONG)
    first, second = list(data.val_dataloader()), list(data.test_dataloader())
    assert_equal_batches(first, second)
    assert torch.cat([labels for _, labels in first]).tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_held_out_images_are_those_of_every_run_and_not_trained_on(drawn):
    runs = [ready(drawn, held_out=5, seed=seed) for seed in (1, 2)]
    held = [run._parts["val"].indices for run in runs]
    assert held[0] == held[1]
    assert len(held[0]) == 5
    assert sorted(held[0] + list(runs[0]._parts["train"].indices)) == list(range(18))
    assert len(runs[0]._parts["test"]) == 9
    assert_equal_batches(list(runs[0].val_dataloader()), list(runs[1].val_dataloader()))  # not augmented
    with pytest.raises(ValueError, match="held_out=18 leaves none of 18"):
        ready(drawn, held_out=18)


# --- chance is a function of seed, epoch and image ---


@pytest.mark.processes
def test_workers_make_the_same_batches_and_other_epochs_others(drawn):
    alone, working = (ready(drawn, augmentation=STRONG, mixup=MIXED, num_workers=workers) for workers in (0, 2))
    loader = working.train_dataloader()  # persistent workers, which were told no epoch
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        assert_equal_batches(list(loader), epoch_of(alone, epoch))
    assert not torch.equal(epoch_of(alone, 0)[0][0], epoch_of(alone, 1)[0][0])


def test_an_image_is_augmented_anew_in_each_epoch_and_by_each_seed(drawn):
    variants = [
        ready(drawn, augmentation=STRONG, seed=seed).train_dataloader().dataset.__getitems__([(epoch, 3, copy)])[0]
        for seed, epoch, copy in ((1, 0, 0), (1, 1, 0), (2, 0, 0), (1, 0, 1), (1, 0, 0))
    ]
    assert torch.equal(variants[0], variants[4])
    assert all(not torch.equal(variants[0], other) for other in variants[1:4])


def test_the_strongest_posterizing_is_a_black_image_with_every_pillow():
    augment, _ = _transforms(32, {"auto_augment": "rand-m10-inc1"})
    (operations,) = [transform.ops for transform in augment.transforms if hasattr(transform, "ops")]
    (operation,) = [operation for operation in operations if operation.name.startswith("Posterize")]
    operation.prob = 1.0
    assert np.asarray(operation(Image.new("RGB", (8, 8), (90, 90, 90)))).max() == 0  # Pillow 13 itself refuses


def test_generators_are_neither_read_nor_moved(drawn):
    expected = epoch_of(ready(drawn, augmentation=STRONG, mixup=MIXED))
    torch.rand(3), np.random.rand(3), random.random()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    images = ready(drawn, augmentation=STRONG, mixup=MIXED).train_dataloader().dataset
    batch = images.__getitems__([(0, index, 0) for index in range(4)])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert_equal_batches(epoch_of(ready(drawn, augmentation=STRONG, mixup=MIXED)), expected)
    assert batch[0].isfinite().all()


class Task(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.seen = nn.Linear(3, 3), []

    def training_step(self, batch, batch_idx):
        images, targets = batch
        self.seen.append(images.sum().item())
        return nn.functional.cross_entropy(self.net(images.mean((2, 3))), targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_fit_resumes_within_an_epoch_with_the_same_augmentations(drawn, tmp_path):
    def fit(ckpt=None):
        task, saver = Task(), pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
        trainer = pl.Trainer(accelerator="cpu", callbacks=[saver], max_epochs=2, logger=False, limit_val_batches=0,
                             enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        trainer.fit(task, datamodule=ready(drawn, augmentation=STRONG, mixup=MIXED), ckpt_path=ckpt)
        return task

    whole = fit()
    resumed = fit(tmp_path / "step=6.ckpt")
    assert resumed.seen == whole.seen[6:]
    assert len(resumed.seen) == 2
    assert torch.equal(resumed.net.weight, whole.net.weight)


def test_copies_of_an_image_come_in_a_row_on_different_ranks():
    ranks = [DrawSampler(range(8), num_replicas=2, rank=rank, seed=0, copies=2) for rank in range(2)]
    first, second = (list(sampler) for sampler in ranks)
    assert [draw[:2] for draw in first] == [draw[:2] for draw in second]
    assert ({draw[2] for draw in first}, {draw[2] for draw in second}) == ({0}, {1})
    assert len({draw[1] for draw in first}) == len(first) == len(ranks[0]) == 4


# --- the formats ---


def pack(folder, file):
    with tarfile.open(file, "w") as tar:
        for path in sorted(folder.rglob("*.JPEG")):
            tar.add(path, path.relative_to(folder))


@pytest.mark.processes
def test_a_tar_file_per_split_is_as_good_as_folders(drawn, tmp_path):
    for split in ("train", "val"):
        pack(drawn / split, tmp_path / f"{split}.tar")
    expected = epoch_of(ready(drawn, augmentation=STRONG))
    assert_equal_batches(epoch_of(ready(tmp_path, augmentation=STRONG)), expected)
    data = ready(tmp_path, augmentation=STRONG, num_workers=2)
    source = data._parts["train"].source
    assert source[0]  # opens the file before the fork: one position for all processes, were it kept
    opened = source._reader.tar_state.tf
    assert_equal_batches(epoch_of(data), expected)
    source._process = -1  # as a worker finds it
    assert source[0]
    assert source._reader.tar_state.tf is not opened
    assert pickle.loads(pickle.dumps(data)).content_digest == data.content_digest == ready(drawn).content_digest


def test_a_local_hugging_face_dataset_in_parquet_is_read(drawn, tmp_path):
    datasets = pytest.importorskip("datasets", reason="timm's hfds/ reader needs the package datasets")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    for split in ("train", "validation"):
        files = sorted((drawn / split.replace("validation", "val")).rglob("*.JPEG"))
        rows = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
        labels = [CLASSES.index(path.parent.name) for path in files]
        table = datasets.Dataset.from_dict({"image": rows, "label": labels}, features=kinds)
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    data = ready(tmp_path / "cache", dataset=f"hfds/{tmp_path / 'data'}", augmentation=STRONG)
    assert_equal_batches(epoch_of(data), epoch_of(ready(drawn, augmentation=STRONG)))
    assert len(set(data.content_digest.values())) == 2
    with pytest.raises(ValueError, match="3 classes, and num_classes=4"):
        ready(tmp_path / "cache", dataset=f"hfds/{tmp_path / 'data'}", num_classes=4)


def test_a_torchvision_folder_is_read(drawn):
    data = ready(drawn, dataset="torch/folder", augmentation=STRONG)
    assert_equal_batches(epoch_of(data), epoch_of(ready(drawn, augmentation=STRONG)))


def test_the_oddities_of_real_folders(folder, tmp_path):
    train = folder / "train"
    pixels = np.full((40, 40), 90, np.uint8)
    Image.fromarray(pixels).save(train / CLASSES[0] / "gray.jpg")
    Image.fromarray(np.stack([pixels] * 4, -1), mode="CMYK").save(train / CLASSES[0] / "cmyk.JPG")
    Image.fromarray(pixels).convert("P").save(train / CLASSES[0] / "palette.PNG")
    (train / CLASSES[1] / "notes.txt").write_text("no image")
    (train / ".cache").mkdir()
    shutil.move(train / CLASSES[2], tmp_path / "elsewhere")
    (train / CLASSES[2]).symlink_to(tmp_path / "elsewhere")
    data = ready(folder, batch_size=21)
    (images, labels), *_ = epoch_of(data)
    assert torch.bincount(labels).tolist() == [9, 6, 6]
    assert images.isfinite().all()


def test_a_class_that_validation_lacks_keeps_its_number(folder):
    shutil.rmtree(folder / "val" / CLASSES[1])
    labels = torch.cat([labels for _, labels in ready(folder).val_dataloader()])
    assert labels.tolist() == [0, 0, 0, 2, 2, 2]


def test_the_digest_is_of_paths_sizes_and_classes(folder):
    before = ready(folder).content_digest
    assert before == ready(folder, seed=5, batch_size=2).content_digest
    picture = folder / "val" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    picture.write_bytes(picture.read_bytes() + b"\0")
    after = ready(folder).content_digest
    assert after["train"] == before["train"]
    assert after["val"] == after["test"] != before["val"]


# --- what cannot be done is said ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_split": "training2"}, r"has no split 'training2' \(folder or \.tar file\); it holds train, val"),
        ({"num_classes": 5}, r"train has 3 classes, and num_classes=5: set num_classes to 3"),
        ({"dataset": "wds/shards"}, r"'wds/shards' is read as a stream.*class folders, a tar file"),
        ({"augmentation": {"re_probs": 1}}, r"augmentation has no 're_probs'; nearest: re_prob"),
        ({"augmentation": {"auto_augment": "ran-m9"}}, r"create_transform cannot do augmentation=.*ran-m9"),
        ({"mixup": {"alpha": 1}}, r"mixup has no 'alpha'; nearest: "),
        ({"mixup": {"mixup_alpha": 0.0}}, r"mixup needs mixup_alpha or cutmix_alpha above 0, or prob: 0"),
        ({"mixup": MIXED, "batch_size": 3}, r"batch_size=3 is odd: choose an even one"),
        ({"copies": 0}, r"copies must be an integer >= 1, got 0"),
        ({"num_workers": -1}, r"num_workers must be an integer >= 0, got -1"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(drawn, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        ready(drawn, **settings)
    assert "\n" not in str(error.value)


def test_folders_that_do_not_fit_are_one_line(folder, tmp_path):
    def refused(message, root=folder, **settings):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            ready(root, **settings).train_dataloader()
        assert "\n" not in str(error.value)

    refused("nowhere is no folder: give the one that holds the splits", tmp_path / "nowhere")
    refused(r"batch_size=64 on 1 rank\(s\) is more than the 18 training examples", batch_size=64)
    (folder / "train" / "n09999999").mkdir()
    refused("train has 1 class folder.s. without images: n09999999; fill or remove")
    (folder / "train" / "n09999999").rmdir()
    (folder / "val" / "unknown").mkdir()
    shutil.copy(folder / "val" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG", folder / "val" / "unknown" / "a.jpg")
    refused("val has 1 class.es. that .*train has not: unknown; name its folders")
    shutil.move(folder / "val" / "unknown" / "a.jpg", folder / "val" / "a.jpg")
    refused("val holds images outside of class folders")
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    refused(r"val holds no images \(\.png, \.jpg, \.jpeg\) in class folders")


@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_and_not_replaced(folder, workers):
    picture = folder / "train" / CLASSES[1] / f"{CLASSES[1]}_2.JPEG"
    picture.write_bytes(picture.read_bytes()[:200])
    named = rf"^{CLASSES[1]}.{picture.name} of .*train cannot be read as an image \(.*\): get it again, or take it out$"
    with pytest.raises(ValueError, match=named) as error:
        epoch_of(ready(folder, batch_size=18, num_workers=workers))
    assert raised_by_us(error.value)  # so that the command says it in one line


def test_a_link_to_nowhere_is_named(folder):
    link = folder / "val" / CLASSES[1] / "link.JPEG"
    link.symlink_to("nowhere.JPEG")
    with pytest.raises(ValueError, match=r"link\.JPEG of .*val cannot be read"):
        list(ready(folder).val_dataloader())
