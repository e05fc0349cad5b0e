import json
import os
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from emp_callbacks.core.packing import pack_bits
from emp_callbacks.finished.export import Source, export, prune
from emp_callbacks.finished.weights_file import report_lines
from emp_callbacks.shrinking import load_shrunk
from emp_callbacks.study.recipe.tasks import ImageClassification

VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4}
EMP = {"every_n_epochs": 1, "target": "heads", "density": 0.5}
IMAGES = torch.linspace(-2, 2, 128).view(2, 1, 8, 8).sin()


def fresh_vit():
    return timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, **VIT).eval()


def metadata(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe and return its path."""
    task, data = "emp_callbacks.study.recipe.tasks.ImageClassification", "emp_callbacks.study.recipe.data.DigitsData"
    settings = {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "callbacks": [{"class_path": "emp_callbacks.EMPCallback", "init_args": EMP}],
        },
        "model": {"class_path": task, "init_args": {"model": "vit_tiny_patch16_224", "model_args": VIT}},
        "data": {"class_path": data, "init_args": {"batch_size": 8}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.fixture
def task():
    torch.manual_seed(0)
    return ImageClassification("vit_tiny_patch16_224", VIT)


@pytest.fixture
def checkpoint(task, tmp_path):
    """Write a Lightning checkpoint of a run that pruned heads: 1 and 2 of block 0, with fc1's unit 7."""
    for columns in (range(4, 8), range(8, 12)):
        task.model.blocks[0].attn.proj.weight.data[:, list(columns)] = 0
    for parameter in task.model.blocks[0].mlp.fc1.parameters():
        parameter.data[7] = 0
    row = {"step": 3, "beta": 1.0, "keep": 6, "n": 8}
    rows = {"rows": [{**row, "step": 2, "keep": 8}, row], "total": 9, "path": None}
    run = {"target": "heads", "criterion": "weight_norm", "scope": "global", "mode": "feedback", "trajectory": rows}
    path = tmp_path / "last.ckpt"
    state = {"state_dict": task.state_dict(), "callbacks": {"EMPCallback{target=heads}": run}}
    torch.save(state, path)
    return str(path)


# ---- export --------------------------------------------------------------------------------------------------------


def test_a_lightning_checkpoint_loads_into_the_users_own_module(checkpoint, task, tmp_path):
    report = export(Source(checkpoint), tmp_path / "out.safetensors")
    model = fresh_vit()
    model.load_state_dict(load_file(report.path))
    with torch.no_grad():
        assert torch.equal(model(IMAGES), task.eval()(IMAGES))
    told = metadata(report.path)
    assert (told["target"], told["beta"], told["density"], told["format"]) == ("heads", "1.0", "0.75", "pt")
    assert told["emp_version"]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    assert report.sparsity == sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices) > 0
    assert report.tensors == len(model.state_dict())
    assert report.file_bytes == report.path.stat().st_size
    assert report.notes == ()
    assert "names: without 'model.', for the module behind it (--prefix '' keeps it)" in report_lines(report)


def save(state, path, **extra):
    torch.save({"state_dict": state, **extra}, path)
    return str(path)


@pytest.mark.parametrize(
    ("suffix", "prefix", "names"),
    [
        (".ckpt", None, {"a.weight", "b.weight"}),
        (".pt", None, {"model.a.weight", "model.b.weight"}),
        (".pt", "model", {"a.weight", "b.weight"}),
        (".pt", "model.a.", {"weight"}),
        (".ckpt", "", {"model.a.weight", "model.b.weight"}),
    ],
)
def test_prefixes(suffix, prefix, names, tmp_path):
    state = {"model._orig_mod.a.weight": torch.ones(2, 2), "model._orig_mod.b.weight": torch.ones(2, 3)}
    source = save(state, tmp_path / f"in{suffix}")
    report = export(Source(source, prefix=prefix), tmp_path / "out.safetensors")
    assert load_file(report.path).keys() == names
    assert bool(report.notes) == (len(names) < 2)


def test_names_that_share_no_first_part_stay_and_ddps_does_not(tmp_path):
    two = save({"model.weight": torch.ones(2, 2), "ema.weight": torch.ones(2, 2)}, tmp_path / "two.ckpt")
    assert load_file(export(Source(two), tmp_path / "1").path).keys() == {"model.weight", "ema.weight"}
    ddp = save({"module.weight": torch.ones(2, 2)}, tmp_path / "ddp.pt")
    assert load_file(export(Source(ddp), tmp_path / "2").path).keys() == {"weight"}
    with pytest.raises(ValueError, match=r"starts with 'net\.'; names: model"):
        export(Source(two, prefix="net"), tmp_path / "3")


@pytest.mark.parametrize(
    ("target", "scope", "noted"), [("heads", "sample", True), ("features", "tensor", True), ("heads", "global", False)]
)
def test_masks_of_the_forward_pass_are_said_to_be_missing(target, scope, noted, checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=False)
    (run,) = saved["callbacks"].values()
    run |= {"target": target}
    run["trajectory"]["rows"][-1] |= {"scope": scope}
    torch.save(saved, checkpoint)
    note = f"the run masked {target} in the forward pass; a file of weights does not hold that"
    assert export(Source(checkpoint), tmp_path / "out.safetensors").notes == (note,) * noted


def test_what_grew_back_since_the_last_refresh_is_masked(tmp_path):
    mask = torch.tensor([[True, False], [False, True]])
    run = {"target": "weights", "shapes": {"model.a.weight": [2, 2]}, "masks": {"model.a.weight": pack_bits(mask)}}
    state = {"model.a.weight": torch.tensor([[1.0, 0.5], [0.0, 2.0]]), "model.b.weight": torch.ones(2, 2)}
    source = save(state, tmp_path / "in.ckpt", callbacks={"EMPCallback": run})
    report = export(Source(source), tmp_path / "out.safetensors")
    assert load_file(report.path)["a.weight"].tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert report.notes == ("1 weights had grown back since the last refresh and are zero again",)
    assert (report.zeros, report.sparsity) == (2, 0.25)


def tiny_gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, **sizes)).eval()


def test_tied_tensors_and_views_are_written_whole(tmp_path):
    model = tiny_gpt2()
    base = torch.arange(6.0)
    state = {**model.state_dict(), "view": base[2:5], "transposed": torch.arange(6.0).view(2, 3).T}
    report = export(Source(save(state, tmp_path / "in.pt")), tmp_path / "out.safetensors")
    assert report.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert json.loads(metadata(report.path)["emp_tied"]) == report.tied
    written = load_file(report.path)
    assert written.pop("view").tolist() == [2.0, 3.0, 4.0]
    assert written.pop("transposed").tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    fresh = tiny_gpt2()
    fresh.load_state_dict(written)
    assert torch.equal(fresh.lm_head.weight, model.lm_head.weight)
    assert any("written under both names" in line for line in report_lines(report))


def test_an_existing_file_stays_unless_told(checkpoint, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    with pytest.raises(FileExistsError, match="--overwrite"):
        export(Source("nothing.pt"), out)  # before anything is read
    assert out.read_text() == "precious"
    assert export(Source(checkpoint), out, overwrite=True).tensors
    assert "head.weight" in load_file(out)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_the_file_has_the_mode_that_the_umask_gives(umask, mode, checkpoint, tmp_path):
    before = os.umask(umask)
    try:
        written = [export(Source(checkpoint), tmp_path / "masked.safetensors").path]
        written.append(export(Source(checkpoint), tmp_path / "again.safetensors", overwrite=True).path)
    finally:
        os.umask(before)
    assert [oct(path.stat().st_mode & 0o777) for path in written] == [oct(mode)] * 2


def test_a_write_that_fails_leaves_no_trace(checkpoint, tmp_path, monkeypatch):
    def half(tensors, path, meta):
        path.write_text("half")
        raise OSError(28, "No space left on device", str(path))

    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="No space"):
        export(Source(checkpoint), out, overwrite=True)
    assert out.read_text() == "precious"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("out", "message"), [("none/out.safetensors", "make it first"), ("none/out", "make it first")])
def test_places_that_cannot_be_written(out, message, tmp_path):
    with pytest.raises(OSError, match=message):
        export(Source("nothing.pt"), tmp_path / out, overwrite=True)


def test_export_shrinks_what_is_zero(checkpoint, recipe, task, tmp_path):
    report = export(Source(checkpoint, recipe), tmp_path / "small.safetensors", shrink_units=True)
    assert {layer.name: layer.removed for layer in report.shrunk.layers} == {"blocks.0.attn": 2, "blocks.0.mlp.fc1": 1}
    model = load_shrunk(fresh_vit(), report.path)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), task.eval()(IMAGES), rtol=1e-5, atol=1e-5)
    assert any("FLOPs" in line for line in report_lines(report))
    again = export(Source(str(report.path)), tmp_path / "again.safetensors")
    assert again.n == report.n


def test_a_run_that_only_observed_is_exported_dense(tmp_path):
    mask = pack_bits(torch.tensor([[True, False, True]]))
    run = {"mode": "observe", "target": "weights", "masks": {"a.weight": mask}, "shapes": {"a.weight": [1, 3]}}
    state = {"a.weight": torch.tensor([[1.0, 2.0, 3.0]])}
    source = save(state, tmp_path / "in.ckpt", callbacks={"EMPCallback": run})
    assert export(Source(source), tmp_path / "out.safetensors").zeros == 0


# ---- prune ---------------------------------------------------------------------------------------------------------


def test_patterns_go_along_the_inputs_that_the_modules_have(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    _, report = prune(Source(str(tmp_path / "gpt2")), tmp_path / "out.safetensors", {"pattern": "2:4"})
    conv1d = {name: value for name, value in load_file(report.path).items() if "c_" in name and value.dim() == 2}
    assert conv1d
    for name, weight in conv1d.items():  # (inputs, outputs)
        assert bool(((weight.unflatten(0, (-1, 4)) != 0).sum(1) == 2).all()), name
    state = {"a.weight": torch.randn(2, 4), "c.weight": torch.randn(2, 3)}
    _, report = prune(Source(save(state, tmp_path / "in.pt")), tmp_path / "two.safetensors", {"pattern": "2:4"})
    assert report.zeros == 4
    assert report.notes[0] == "left out, as their inputs are no multiple of 4: c.weight"
    assert report.notes[1].startswith("no modules in the file: each weight was taken as (outputs, inputs, ...)")


def test_weights_of_a_bare_state_dict_by_hand(tmp_path):
    # (1 + 2 + 3 + 6)^2 / (1 + 4 + 9 + 36) = 2.88: two are kept
    state = {"a.weight": torch.tensor([[1.0, -6.0]]), "b.weight": torch.tensor([[2.0], [3.0]]), "a.bias": torch.ones(1)}
    torch.save(state, tmp_path / "in.pt")
    pruner, report = prune(Source(str(tmp_path / "in.pt")), tmp_path / "out.safetensors", {})
    written = load_file(report.path)
    assert {name: value.tolist() for name, value in written.items()} == {
        "a.weight": [[0.0, -6.0]],
        "b.weight": [[0.0], [3.0]],
        "a.bias": [1.0],
    }
    assert pruner.trajectory[-1].n_eff == pytest.approx(2.88)
    assert (report.sparsity, metadata(report.path)["criterion"]) == (0.5, "magnitude")
    _, more = prune(Source(str(tmp_path / "in.pt")), tmp_path / "2.safetensors", {"density": 0.75, "exclude": ["b.*"]})
    assert more.zeros == 1


def test_embeddings_and_norms_of_a_bare_state_dict_stay(tmp_path):
    state = {name: torch.rand(2, 2) + 1 for name in ("wte.weight", "norm.weight", "a.weight", "b.weight")}
    torch.save(state, tmp_path / "in.pt")
    source = Source(str(tmp_path / "in.pt"))
    _, report = prune(source, tmp_path / "out.safetensors", {"density": 0.5})
    written = load_file(report.path)
    assert {name for name, value in written.items() if (value == 0).any()} <= {"a.weight", "b.weight"}
    assert report.zeros == 4
    _, named = prune(source, tmp_path / "named.safetensors", {"density": 0.5, "include": ["wte*"]})
    assert (load_file(named.path)["wte.weight"] == 0).sum() == named.zeros == 2


def test_a_model_and_its_state_dict_are_pruned_alike(tmp_path):
    torch.manual_seed(0)
    source = Source("timm:resnet10t")
    _, of_model = prune(source, tmp_path / "model.safetensors", {"scope": "tensor"})
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "state.pt")
    _, of_state = prune(Source(str(tmp_path / "state.pt")), tmp_path / "state.safetensors", {"scope": "tensor"})
    one, other = load_file(of_model.path), load_file(of_state.path)
    assert of_model.sparsity > 0.3
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_recipe_says_how_and_options_say_otherwise(checkpoint, recipe, tmp_path):
    pruner, report = prune(Source(checkpoint, recipe), tmp_path / "heads.safetensors", {})
    assert (pruner.config.target, pruner.config.density, pruner.density) == ("heads", 0.5, 0.5)
    assert (pruner.config.every_n_epochs, pruner.config.mode) == (None, "project")
    stripped = export(Source(checkpoint), tmp_path / "stripped.safetensors").path  # without "model.": fits as well
    same, _ = prune(Source(str(stripped), recipe), tmp_path / "same.safetensors", {})
    assert all(torch.equal(same.masks[name], mask) for name, mask in pruner.masks.items())
    masks = pruner.masks
    state = load_file(report.path)
    for block in range(2):
        columns = state[f"blocks.{block}.attn.proj.weight"].view(16, 4, 4).abs().sum((0, 2))
        assert (columns > 0).tolist() == masks[f"model.blocks.{block}.attn"].tolist()
    settings = {"target": "neurons", "criterion": "taylor", "beta": 2.0}
    pruner, _ = prune(Source(checkpoint, recipe), tmp_path / "neurons.safetensors", settings, batches=2)
    assert (pruner.config.density, pruner.config.beta) == (None, 2.0)
    assert set(pruner.masks) == {f"model.blocks.{block}.mlp.fc1" for block in range(2)}


def edit_callbacks(recipe, *settings):
    """Give the recipe one EMPCallback per mapping of settings."""
    changed = yaml.safe_load(Path(recipe).read_text())
    changed["trainer"]["callbacks"] = [{"class_path": "emp_callbacks.EMPCallback", "init_args": s} for s in settings]
    Path(recipe).write_text(yaml.safe_dump(changed))


def test_a_density_replaces_the_recipes_beta(checkpoint, recipe, tmp_path):
    edit_callbacks(recipe, {"every_n_epochs": 1, "beta": 0.5})
    out = tmp_path / "out.safetensors"
    pruner, _ = prune(Source(checkpoint, recipe), out, {"density": 0.25})
    assert pruner.density == pytest.approx(0.25, abs=1e-3)
    pruner, _ = prune(Source(checkpoint, recipe), out, {}, overwrite=True)
    assert (pruner.config.beta, pruner.config.density) == (0.5, None)


def test_a_recipe_with_two_callbacks_is_exported_but_not_pruned_once_more(recipe, task, tmp_path):
    edit_callbacks(recipe, EMP, {"every_n_epochs": 1, "include": ["*.fc1.weight"]})
    names = ("model.blocks.0.mlp.fc1.weight", "model.head.weight")
    masks = {name: torch.rand_like(task.get_parameter(name)) < 0.5 for name in names}
    run = {"target": "weights", "criterion": "magnitude"}
    states = [{**run, "masks": {name: pack_bits(mask)}} for name, mask in masks.items()]
    callbacks = {f"EMPCallback{name}": state for name, state in zip(names, states, strict=True)}
    source = save(task.state_dict(), tmp_path / "in.ckpt", callbacks=callbacks)
    report = export(Source(source, recipe), tmp_path / "out.safetensors")
    written = load_file(report.path)
    assert all(torch.equal(written[name.removeprefix("model.")] != 0, mask) for name, mask in masks.items())
    assert metadata(report.path)["criterion"] == "magnitude"
    with pytest.raises(ValueError, match=r"2 EMPCallbacks.*a recipe with one"):
        prune(Source(source, recipe), tmp_path / "pruned.safetensors", {})


def test_a_recipe_for_a_cluster_is_opened_here(checkpoint, recipe, tmp_path):
    changed = yaml.safe_load(Path(recipe).read_text())
    changed["trainer"] |= {"accelerator": "gpu", "devices": 8, "num_nodes": 2, "strategy": "fsdp"}
    Path(recipe).write_text(yaml.safe_dump(changed))
    assert export(Source(checkpoint, recipe), tmp_path / "out.safetensors").tensors


def test_a_changed_target_drops_the_recipes_criterion(checkpoint, recipe, tmp_path):
    edit_callbacks(recipe, {**EMP, "criterion": "saliency"})
    pruner, _ = prune(Source(checkpoint, recipe), tmp_path / "out.safetensors", {"target": "weights"})
    assert pruner.config.criterion_name == "magnitude"


@pytest.mark.parametrize("target", ["heads", "neurons"])
def test_pruned_and_shrunk_compute_the_same(target, checkpoint, recipe, tmp_path):
    settings = {"target": target, "density": 0.5}
    _, masked = prune(Source(checkpoint, recipe), tmp_path / "masked.safetensors", settings)
    _, small = prune(Source(checkpoint, recipe), tmp_path / "small.safetensors", settings, shrink_units=True)
    assert small.n < 0.9 * masked.n
    assert small.shrunk.flops[1] < small.shrunk.flops[0]
    large, shrunk = fresh_vit(), load_shrunk(fresh_vit(), small.path)
    large.load_state_dict(load_file(masked.path))
    with torch.no_grad():
        torch.testing.assert_close(shrunk(IMAGES), large(IMAGES), rtol=1e-5, atol=1e-5)


@pytest.fixture
def batches(monkeypatch):
    """Record what training steps see; the last ones are those of the criterion."""
    step, seen = ImageClassification.training_step, []

    def recorded(self, batch, index):
        assert not self.training
        seen.append(batch)
        return step(self, batch, index)

    monkeypatch.setattr(ImageClassification, "training_step", recorded)
    return seen


def test_gradients_come_from_batches_and_nothing_is_trained(checkpoint, recipe, task, tmp_path, batches):
    settings = {"target": "weights", "criterion": "taylor", "density": 0.5, "include": ["model.head.weight"]}
    _, report = prune(Source(checkpoint, recipe), tmp_path / "out.safetensors", settings, batches=3)
    scores = torch.zeros(10, 16)
    task.eval()
    for images, labels in batches[-3:]:
        task.zero_grad()
        nn.functional.cross_entropy(task(images), labels).backward()
        scores += (task.model.head.weight * task.model.head.weight.grad).abs().detach()
    assert [len(labels) for _, labels in batches[-3:]] == [8, 8, 8]
    before, after = task.model.state_dict(), load_file(report.path)
    pruned = after["head.weight"] == 0
    assert torch.equal(pruned, scores <= scores.flatten().kthvalue(80).values)
    assert torch.equal(after["head.weight"][~pruned], before["head.weight"][~pruned])
    assert all(torch.equal(after[name], before[name]) for name in before if name != "head.weight")


def seen_by(module, side, task, batches):
    """Return what passes a module for all batches, rows of features."""
    seen = []
    hook = module.register_forward_hook(lambda _, args, output: seen.append(args[0] if side == "input" else output))
    with torch.no_grad():
        for images, _ in batches:
            task.eval()(images)
    hook.remove()
    return torch.cat(seen).flatten(0, -2)


def test_wanda_reads_inputs(checkpoint, recipe, task, tmp_path, batches):
    settings = {"target": "weights", "criterion": "wanda", "density": 0.5, "include": ["model.head.weight"]}
    _, report = prune(Source(checkpoint, recipe), tmp_path / "out.safetensors", settings, batches=3)
    inputs = seen_by(task.model.head, "input", task, batches[-3:])
    assert inputs.shape == (24, 16)
    scores = task.model.head.weight.abs() * inputs.norm(dim=0)
    pruned = load_file(report.path)["head.weight"] == 0
    assert torch.equal(pruned, scores <= scores.flatten().kthvalue(80).values)
    magnitude = task.model.head.weight.abs()
    assert not torch.equal(pruned, magnitude <= magnitude.flatten().kthvalue(80).values)


def test_activation_reads_activations(checkpoint, recipe, task, tmp_path, batches):
    settings = {"target": "neurons", "criterion": "activation", "scope": "global", "density": 0.5}
    pruner, report = prune(Source(checkpoint, recipe), tmp_path / "out", settings, batches=2, shrink_units=True)
    layers = [block.mlp.fc1 for block in task.model.blocks]
    sizes = torch.stack([seen_by(layer, "output", task, batches[-2:]).abs().mean(0) for layer in layers])
    expected = sizes > sizes.flatten().kthvalue(64).values
    masks = torch.stack([pruner.masks[f"model.blocks.{block}.mlp.fc1"] for block in range(2)])
    assert torch.equal(masks, expected)
    shapes = [load_file(report.path)[f"blocks.{block}.mlp.fc1.weight"].shape for block in range(2)]
    assert shapes == [(int(kept.sum()), 16) for kept in expected]


def test_nodes_of_a_kan(recipe, tmp_path):
    changed = yaml.safe_load(Path(recipe).read_text())
    changed["model"]["init_args"] = {"model": "emp_kan", "model_args": {"img_size": 8, "widths": [6]}}
    Path(recipe).write_text(yaml.safe_dump(changed))
    torch.manual_seed(0)
    task = ImageClassification("emp_kan", {"img_size": 8, "widths": [6]})
    source = save(task.state_dict(), tmp_path / "kan.ckpt")
    settings = {"target": "kan_nodes", "density": 0.5}
    pruner, report = prune(Source(source, recipe), tmp_path / "out.safetensors", settings)
    first, second = task.model.kan1.spline_weight.abs(), task.model.kan2.spline_weight.abs()
    scores = torch.maximum(first.mean((1, 2)), second.mean((0, 2)))
    kept = scores > scores.kthvalue(3).values
    assert torch.equal(pruner.masks["model.kan1"], kept)
    written = load_file(report.path)
    for name in ("kan2.spline_weight", "kan2.base_weight"):
        assert torch.equal((written[name] != 0).transpose(0, 1).flatten(1).any(1), kept)
    assert torch.equal(written["kan1.spline_weight"], task.model.kan1.spline_weight)


def test_a_hugging_face_folder(tmp_path):
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "gpt2")
    source = Source(str(tmp_path / "gpt2"))
    _, report = prune(source, tmp_path / "out.safetensors", {"target": "neurons", "density": 0.5}, shrink_units=True)
    shrunk = load_shrunk(tiny_gpt2(), report.path)
    assert shrunk.transformer.h[0].mlp.c_fc.nf == 16
    assert report.shrunk.parameters == (model.num_parameters(), model.num_parameters() - 16 * (8 + 1 + 8))
    _, plain = prune(source, tmp_path / "plain.safetensors", {"density": 0.5})
    assert 0.2 < plain.sparsity < 0.6
    (tmp_path / "gpt2" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is no JSON"):
        prune(source, tmp_path / "new.safetensors", {"target": "neurons"})


def scattered(model):
    """Scale every matrix and its rows at random, so that no two layers lose as many units."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 2 * torch.rand(()) * torch.rand(len(parameter), *[1] * (parameter.dim() - 1))
    return model.eval()


def test_transformers_itself_loads_what_uniform_shrank(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    dense = scattered(LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)))
    dense.save_pretrained(tmp_path / "dense")
    settings = {"target": "neurons", "density": 0.5, "scope": "global"}
    _, masked = prune(Source(str(tmp_path / "dense")), tmp_path / "masked.safetensors", settings)
    _, report = prune(Source(str(tmp_path / "dense")), tmp_path / "small", settings, shrink_units=True, uniform=True)
    small = LlamaForCausalLM.from_pretrained(tmp_path / "small").eval()
    widths = [layer.mlp.gate_proj.out_features for layer in small.model.layers]
    assert small.config.intermediate_size == widths[0] == widths[1] < 24
    dense.load_state_dict(load_file(masked.path))
    tokens = torch.arange(14).view(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(small(tokens).logits, dense(tokens).logits, rtol=1e-5, atol=1e-5)
    told = "\n".join(report_lines(report))
    assert f"load it with transformers.LlamaForCausalLM.from_pretrained({str(tmp_path / 'small')!r})" in told
    assert f"{report.shrunk.brought_back} units that could have gone" in told
    assert report.shrunk.brought_back == 24 - 2 * (24 - widths[0]) > 0
    assert sorted(os.listdir(tmp_path)) == ["dense", "masked.safetensors", "small"]
    uneven = prune(Source(str(tmp_path / "dense")), tmp_path / "uneven", settings, shrink_units=True)[1]
    assert uneven.loaded_by == f"emp_callbacks.load_shrunk(model, {str(uneven.path)!r}), into the dense architecture"
    why = "LlamaForCausalLM.from_pretrained cannot load this: LlamaConfig can state no such sizes"
    assert [note.startswith(why) for note in (*report.notes, *uneven.notes)].count(True) == 1
    assert uneven.notes[0].startswith(why)


def test_timm_itself_builds_what_uniform_shrank(tmp_path):
    settings = {"target": "neurons", "density": 0.5}
    source = Source("timm:test_vit", input_size=(3, 160, 160))
    _, report = prune(source, tmp_path / "vit.safetensors", settings, shrink_units=True, uniform=True)
    call = report.loaded_by.split("; ")[0].removeprefix("model = ")
    assert call.startswith("timm.create_model('test_vit', mlp_ratio=")
    small = eval(call, {"timm": timm}).eval()
    small.load_state_dict(load_file(report.path))
    again = load_shrunk(timm.create_model("test_vit"), report.path).eval()
    image = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(small(image), again(image), rtol=1e-5, atol=1e-5)
    assert report.shrunk.parameters[1] == sum(p.numel() for p in small.parameters()) < report.shrunk.parameters[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": "wanda"}, "criterion 'wanda' reads inputs of data; name a recipe"),
        ({"target": "heads"}, "target 'heads' needs the model.*--config RECIPE"),
        ({"target": "features"}, "'features' is masked in the forward pass"),
        ({"target": "heads", "dynamic": True}, "'heads' with dynamic=True is masked in the forward pass"),
        ({"target": "weihgts"}, "target must be one of"),
    ],
)
def test_what_a_state_dict_cannot_do(settings, message, checkpoint, tmp_path):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        prune(Source(checkpoint), tmp_path / "out.safetensors", settings)
    assert not (tmp_path / "out.safetensors").exists()


def test_more_mistakes_are_explained(checkpoint, recipe, tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="--shrink needs the model"):
        export(Source(checkpoint), out, shrink_units=True)
    with pytest.raises(ValueError, match="--batches must be at least 1"):
        prune(Source(checkpoint, recipe), out, {"criterion": "taylor"}, batches=0)
    with pytest.raises(ValueError, match="--pretrained goes with timm:NAME"):
        export(Source(checkpoint, pretrained=True), out)
    torch.save({"other.weight": torch.ones(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"does not fit the recipe's ImageClassification: .*other\.weight"):
        prune(Source(str(tmp_path / "other.pt"), recipe), out, {})
    torch.save({"state_dict": {"model.other.weight": torch.ones(2, 2)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"ImageClassification: model\.other\.weight, "):
        export(Source(str(tmp_path / "other.ckpt"), recipe), out)
    assert not out.exists()
