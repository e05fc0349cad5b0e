import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from emp_callbacks.folders.samples import image_samples
from tests.folders.tiny import write_folder

COLOURS = [(200, 10, 20), (10, 200, 20), (10, 20, 200), (90, 90, 90), (255, 255, 0), (0, 255, 255)]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    return path


@pytest.fixture
def images(tmp_path):
    """Six images of one colour each, in two subfolders, whose sorted paths are in the order of COLOURS."""
    for i, colour in enumerate(COLOURS):
        path = tmp_path / "images" / f"class{i // 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 9), colour).save(path)
    return tmp_path / "images"


def colours(samples):
    """Return each sample's mean colour in 0 to 255."""
    return [tuple(((inputs["pixel_values"].mean((0, 2, 3)) + 1) * 127.5).round().tolist()) for inputs in samples.inputs]


def test_a_model_runs_on_what_its_folder_makes_of_images(folder, images):
    config = write_folder(folder, "ViTForImageClassification")
    samples = image_samples(folder, config, images, count=6)
    assert samples.unit == "images"
    assert samples.notes == ()
    assert colours(samples) == [tuple(map(float, colour)) for colour in COLOURS]
    model = transformers.ViTForImageClassification(config).eval()
    for inputs in samples.inputs:
        assert {name: (value.shape, value.dtype) for name, value in inputs.items()} == {
            "pixel_values": ((1, 3, 8, 8), torch.float32)
        }
        assert model(**inputs).logits.shape == (1, 2)


@pytest.mark.parametrize(("count", "taken"), [(1, [0]), (2, [0, 3]), (3, [0, 2, 4]), (4, [0, 1, 3, 4])])
def test_images_are_taken_evenly_spaced(count, taken, folder, images):
    config = write_folder(folder, "ViTForImageClassification")
    samples = image_samples(folder, config, images, count=count)
    assert colours(samples) == [tuple(map(float, COLOURS[i])) for i in taken]
    assert samples.notes == ()


def test_fewer_images_than_asked_for_are_said(folder, images):
    config = write_folder(folder, "ViTForImageClassification")
    assert image_samples(folder, config, images).notes == ("6 of the 128 images that were asked for",)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_images_of_other_colours_become_those_of_the_model(mode, folder, tmp_path):
    config = write_folder(folder, "ViTForImageClassification")
    path = tmp_path / ("grey.tiff" if mode == "CMYK" else "grey.png")
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
    assert colours(image_samples(folder, config, path, count=1)) == [(255.0, 255.0, 255.0)]


def test_a_model_of_one_channel_gets_one(folder, images):
    write_folder(folder, "ViTForImageClassification")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]).save_pretrained(
        folder
    )
    config = transformers.AutoConfig.from_pretrained(folder, num_channels=1)
    (inputs,) = image_samples(folder, config, images, count=1).inputs
    assert inputs["pixel_values"].shape == (1, 1, 8, 8)
    grey = np.array(Image.new("RGB", (1, 1), COLOURS[0]).convert("L")).item()
    assert inputs["pixel_values"].mean().item() == pytest.approx(grey / 127.5 - 1, abs=1e-3)


def test_images_that_cannot_be_read_are_named_and_left_out(folder, images):
    config = write_folder(folder, "ViTForImageClassification")
    whole = (images / "class0" / "0.png").read_bytes()
    (images / "class0" / "1.png").write_bytes(whole[: len(whole) // 2])
    (images / "class1" / "4.png").write_bytes(b"no image")
    (images / "README.md").write_text("not an image either, and not meant as one")
    samples = image_samples(folder, config, images, count=6)
    assert len(samples.inputs) == 4
    assert samples.notes[0] == "4 of the 6 images that were asked for"
    assert samples.notes[1].startswith("left out, because they cannot be read: ")
    assert [name in samples.notes[1] for name in ("1.png", "4.png", "0.png", "README")] == [True, True, False, False]
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of 6 files can be read: .*0.png .*, .* and 2 more; give others"):
        image_samples(folder, config, images)


def test_a_folder_without_images_is_refused(folder, tmp_path):
    config = write_folder(folder, "ViTForImageClassification")
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (empty, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=rf"{path} holds no file that ends in .*; name a folder that does"):
            image_samples(folder, config, path)


def test_a_folder_without_an_image_processor_is_refused(folder, images):
    config = write_folder(folder, "ViTForImageClassification")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"^the image processor of .*model cannot be used: .*$"):
        image_samples(folder, config, images)


def test_a_model_of_text_gets_no_images(folder, images, tmp_path):
    vision = tmp_path / "vision"
    vision.mkdir()
    write_folder(vision, "ViTForImageClassification")
    config = write_folder(folder, "GPT2LMHeadModel")
    with pytest.raises(ValueError, match=r"a GPT2LMHeadModel takes no pixel_values, .*give a text or sounds"):
        image_samples(vision, config, images)


def test_channels_that_no_file_gives_are_refused(folder, images):
    config = write_folder(folder, "ViTForImageClassification")
    config.num_channels = 4
    with pytest.raises(ValueError, match="takes images of 4 channels; files give 1 or 3"):
        image_samples(folder, config, images)
