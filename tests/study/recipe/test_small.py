import pytest
import torch

from emp_callbacks.study.recipe.small import narrower
from emp_callbacks.study.recipe.tasks import ImageClassification, LanguageModel
from emp_callbacks.targets.weights import prunable_weights

IMAGES = "emp_callbacks.study.recipe.tasks.ImageClassification"
TEXT = "emp_callbacks.study.recipe.tasks.LanguageModel"
PATCHES = {"img_size": 28, "patch_size": 4, "class_token": False, "global_pool": "avg"}
RESNET = {"model": "resnet10t", "model_args": {"channels": [16, 32, 64, 128], "stem_width": 8}, "lr": 0.5}
VIT = {"model": "vit_tiny_patch16_224", "model_args": {**PATCHES, "embed_dim": 64, "depth": 1, "num_heads": 4}}
FC = {"model": "emp_fc2", "model_args": {"widths": [100]}}
GPT = {"n_layer": 1, "n_head": 4, "n_embd": 128, "lr": 0.5}
MODELS = {"resnet": (IMAGES, RESNET), "vit": (IMAGES, VIT), "fc": (IMAGES, FC), "gpt": (TEXT, GPT)}


def count(path, init_args):
    task = ImageClassification if path == IMAGES else LanguageModel
    return sum(target.parameter.numel() for target in prunable_weights(task(**init_args)))


@pytest.mark.parametrize("density", [0.4, 0.2, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_the_narrower_model_has_nearly_as_many_weights_as_asked_for_and_never_more(name, density):
    path, init_args = MODELS[name]
    target = int(density * count(path, init_args))
    assert 0.85 * target <= count(path, narrower(path, init_args, target)) <= target


def test_no_width_between_is_nearer():
    counts = {width: count(TEXT, {**GPT, "n_embd": width}) for width in range(4, 132, 4)}
    for target in (20_000, 60_000, 100_000):
        found = narrower(TEXT, GPT, target)
        assert (found["n_embd"], found["n_head"]) == (max(w for w in counts if counts[w] <= target), 4)


def test_only_widths_change_and_together():
    found = narrower(IMAGES, RESNET, 123_000)
    assert set(found) == set(RESNET)
    assert found["lr"] == 0.5
    assert found["model_args"] == {"channels": [10, 20, 40, 81], "stem_width": 5}
    assert RESNET["model_args"]["channels"] == [16, 32, 64, 128]
    settings = narrower(IMAGES, VIT, 20_000)["model_args"]
    assert {key: settings[key] for key in (*PATCHES, "depth")} == {**PATCHES, "depth": 1}


def test_heads_are_halved_only_where_the_target_is_missed_otherwise():
    kept, halved = narrower(TEXT, GPT, 12 * 43**2), narrower(TEXT, GPT, 12 * 14**2)  # a block has 12 * n_embd^2
    assert (kept["n_embd"], kept["n_head"]) == (40, 4)  # with 2 heads it would be 42, which is nearer
    assert (halved["n_embd"], halved["n_head"]) == (14, 2)  # with 4 heads it would be 12: 27 % below
    odd = {**VIT, "model_args": {**VIT["model_args"], "embed_dim": 63, "num_heads": 3}}
    assert narrower(IMAGES, odd, 10_000)["model_args"]["num_heads"] == 3


def test_nothing_is_widened():
    assert narrower(TEXT, GPT, 10**9) == GPT
    assert narrower(IMAGES, RESNET, 308_582) == RESNET
    assert narrower(TEXT, {}, 10**9) == {"n_embd": 128, "n_head": 4}  # the task's defaults, written out


def test_the_generators_of_random_numbers_stay_as_they_are():
    before = torch.get_rng_state()
    narrower(IMAGES, VIT, 20_000)
    narrower(TEXT, GPT, 20_000)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("path", "init_args", "message"),
    [
        pytest.param("my.Task", {}, r"my\.Task narrower is not known: give .* init_args yourself", id="task"),
        pytest.param(IMAGES, {"model": "resnet18"}, "'resnet18' are not known: write them into", id="widths"),
        pytest.param(IMAGES, {"model_args": {"embed_dim": 64}}, "num_heads must divide.*beside embed_dim", id="heads"),
        pytest.param(TEXT, {"pretrained": "gpt2"}, "narrower 'gpt2' has no pretrained weights: leave", id="gpt2"),
        pytest.param(IMAGES, {**RESNET, "pretrained": True}, "narrower 'resnet10t' has no pretrained", id="timm"),
        pytest.param(TEXT, GPT, "has 48 prunable weights, more than the 47 asked for: take fewer blocks", id="least"),
    ],
)
def test_what_cannot_be_made_narrower_is_refused_with_the_remedy(path, init_args, message):
    with pytest.raises(ValueError, match=message):
        narrower(path, init_args, 47)
