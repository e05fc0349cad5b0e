"""A folder is pruned as a plain computation in memory prunes its model, and is written whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.multiprocessing import ProcessExitedException

from emp_callbacks.checkpoint.folder_files import FolderFiles
from emp_callbacks.config import EMPConfig
from emp_callbacks.folders.output import RECORD, FolderOutput
from emp_callbacks.folders.pruning import prune_folder
from tests.distributed.ranks import spawn
from tests.folders.kinds import KINDS, called, made, samples

BETA = 0.9


def pruned(folder, out, *, inputs=None, order="sequential", dtype=torch.float64, **settings):
    settings.setdefault("scope", "row")
    shown = None if inputs is None else SimpleNamespace(inputs=inputs, notes=())
    return prune_folder(folder, out, EMPConfig().once(**settings), samples=shown, order=order, dtype=dtype)


def reloaded(kind, out):
    """Return the written model, after seeing that it lacks nothing."""
    model, found = getattr(transformers, KINDS[kind][0]).from_pretrained(out, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return model.eval()


# ---- by hand -------------------------------------------------------------------------------------------------------


def kept_of_a_row(scores):
    count = max(1, int(BETA * scores.sum() ** 2 / (scores**2).sum()))
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[:count]] = True
    return mask


def linear_layers(model):
    """Return the layers of the blocks that have weights to prune, in the order in which the model calls them."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    tied = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module is not head and id(module.weight) not in tied
    }


def norms_of(model, names, inputs):
    """Return the norm of each input of some layers over all samples, by hooks on the whole model."""
    squares = {}

    def add(name):
        def hook(module, args):
            rows = args[0].detach().double().reshape(-1, args[0].shape[-1])
            squares[name] = squares.get(name, 0) + rows.square().sum(0)

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(add(name)) for name in names]
    for one in inputs:
        called(model, one)
    for handle in handles:
        handle.remove()
    return {name: value.sqrt() for name, value in squares.items()}


def prune_by_hand(model, blocks, inputs, order, criterion):
    """Prune the layers of some blocks in place, in float64."""
    layers = linear_layers(model)
    dense = norms_of(model, layers, inputs) if criterion == "wanda" else None
    for block in blocks:
        own = {name: module for name, module in layers.items() if f"{name}.".startswith(f"{block}.")}
        if criterion == "wanda":
            norms = norms_of(model, own, inputs) if order == "sequential" else dense
        for name, module in own.items():
            by_outputs = isinstance(module, nn.Linear)
            rows = (module.weight if by_outputs else module.weight.T).detach().abs()
            scores = rows * norms[name] if criterion == "wanda" else rows
            mask = torch.stack([kept_of_a_row(row) for row in scores])
            module.weight.data *= mask if by_outputs else mask.T


BLOCKS = {
    "llama": [f"model.layers.{i}" for i in range(3)],
    "tied_llama": [f"model.layers.{i}" for i in range(3)],
    "gpt2": [f"transformer.h.{i}" for i in range(3)],
    "bert": [*(f"bert.encoder.layer.{i}" for i in range(3)), "cls.predictions.transform.dense"],
    "t5": [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)],
    "whisper": [f"model.{side}.layers.{i}" for side in ("encoder", "decoder") for i in range(2)],
    "vit": [*(f"vit.layers.{i}" for i in range(3)), "classifier"],
}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(
    ("criterion", "order"), [("magnitude", "sequential"), ("wanda", "sequential"), ("wanda", "dense")]
)
def test_masks_are_those_of_a_plain_computation(kind, criterion, order, tmp_path):
    model = made(kind, tmp_path / "dense").double()
    inputs = samples(kind)
    if not hasattr(model, "vit") and KINDS[kind][3] == "image":
        pytest.skip("this version of transformers names the blocks in another way")
    names = BLOCKS[kind] if any(name == BLOCKS[kind][0] for name, _ in model.named_modules()) else None
    if names is None:
        pytest.skip("this version of transformers names the blocks in another way")
    prune_by_hand(model, names, inputs, order, criterion)
    include = [f"{name}.weight" for name in linear_layers(model)]
    told = pruned(
        tmp_path / "dense",
        tmp_path / "out",
        inputs=inputs,
        order=order,
        criterion=criterion,
        beta=BETA,
        include=include,
    )
    written = reloaded(kind, tmp_path / "out").double()
    for (name, expected), (other, found) in zip(model.named_parameters(), written.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(expected, found), name
    kept = sum(int((module.weight != 0).sum()) for module in linear_layers(model).values())
    assert kept == sum(row.keep for row in told.rows)
    assert {row.name for row in told.rows} == {*include}


def test_the_order_of_calibration_matters(tmp_path):
    made("llama", tmp_path / "dense")
    for order in ("sequential", "dense"):
        pruned(tmp_path / "dense", tmp_path / f"out-{order}", inputs=samples("llama"), order=order, criterion="wanda")
    first, second = (FolderFiles(tmp_path / f"out-{order}") for order in ("sequential", "dense"))
    name = "model.layers.{}.mlp.down_proj.weight"
    assert torch.equal(first.read(name.format(0)), second.read(name.format(0)))
    assert not torch.equal(first.read(name.format(2)), second.read(name.format(2)))


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "bart"])
def test_other_scopes_are_those_of_the_model_in_memory(scope, kind, tmp_path):
    from emp_callbacks import EMPPruner

    model = made(kind, tmp_path / "dense")
    told = pruned(tmp_path / "dense", tmp_path / "out", scope=scope, criterion="magnitude", beta=BETA)
    pruner = EMPPruner(model, scope=scope, beta=BETA, include=[row.name for row in told.rows])
    events = pruner.refresh()
    pruner.finalize()
    written = dict(reloaded(kind, tmp_path / "out").named_parameters())
    assert all(torch.equal(value, written[name]) for name, value in model.named_parameters())
    of_layers = {layer.name: layer for event in events for layer in event.layers}
    for row in told.rows:
        layer = of_layers[row.name]
        assert (row.n, row.keep) == (layer.n, layer.keep)
        assert row.n_eff == pytest.approx(layer.n_eff)
        assert row.preserved_mass == pytest.approx(layer.preserved_mass)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({"density": 0.5}, 0.5), ({"pattern": "2:4"}, 0.5), ({"density": 0.25, "min_density": 0.0}, 0.25)],
)
def test_fixed_ratios_and_patterns(settings, kept, tmp_path):
    made("llama", tmp_path / "dense")
    scope = {"scope": None} if "pattern" in settings else {}
    told = pruned(tmp_path / "dense", tmp_path / "out", criterion="wanda", inputs=samples("llama"), **settings, **scope)
    assert told.density == pytest.approx(kept, abs=0.01)


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_what_is_not_pruned_is_the_same_to_the_bit(tmp_path):
    made("tied_llama", tmp_path / "dense", torch.bfloat16)
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    (tmp_path / "dense" / "tf_model.h5").write_text("the dense weights")
    (tmp_path / "dense" / ".cache").mkdir()
    told = pruned(tmp_path / "dense", tmp_path / "out", criterion="magnitude", include=["*.mlp.*"])
    before, after = FolderFiles(tmp_path / "dense"), FolderFiles(tmp_path / "out")
    assert before.infos == after.infos
    for name in before.names:
        value, found = before.read(name), after.read(name)
        if ".mlp." not in name:
            assert torch.equal(value, found)
        else:
            kept = found != 0
            assert torch.equal(value[kept], found[kept])
            assert int(kept.sum()) == next(row.keep for row in told.rows if row.name == name)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", RECORD}
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["density"] == told.density
    assert len(record["rows"]) == 9
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", torch_dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_in_pytorchs_format_become_safetensors(sharded, tmp_path):
    model = made("gpt2", tmp_path / "safe")
    shutil.copytree(tmp_path / "safe", tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").unlink()
    state = model.state_dict()
    parts = [list(state)[:20], list(state)[20:]] if sharded else [list(state)]
    files = [f"pytorch_model-{i + 1:05d}-of-{len(parts):05d}.bin" for i in range(len(parts))] if sharded else []
    for file, part in zip(files or ["pytorch_model.bin"], parts, strict=True):
        torch.save({name: state[name] for name in part}, tmp_path / "dense" / file)
    if sharded:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (tmp_path / "dense" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    inputs = samples("gpt2")
    for name in ("safe", "dense"):
        pruned(tmp_path / name, tmp_path / f"{name}-out", criterion="wanda", inputs=inputs)
    assert not list((tmp_path / "dense-out").glob("*.bin*"))
    one, other = (reloaded("gpt2", tmp_path / f"{name}-out") for name in ("safe", "dense"))
    assert torch.equal(called(one, inputs[0]), called(other, inputs[0]))


def test_a_base_models_folder_whose_names_lack_the_prefix(tmp_path):
    model = made("gpt2", tmp_path / "with")
    model.transformer.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    assert not any(name.startswith("transformer.") for name in FolderFiles(tmp_path / "dense").names)
    for name in ("with", "dense"):
        pruned(tmp_path / name, tmp_path / f"{name}-out", criterion="wanda", inputs=samples("gpt2"))
    one, other = (reloaded("gpt2", tmp_path / f"{name}-out") for name in ("with", "dense"))
    assert torch.equal(called(one, samples("gpt2")[0]), called(other, samples("gpt2")[0]))


def test_experts_are_written_under_the_names_of_their_files(tmp_path):
    made("mixtral", tmp_path / "dense")
    told = pruned(tmp_path / "dense", tmp_path / "out", criterion="wanda", inputs=samples("mixtral", 8), dtype=None)
    before, after = FolderFiles(tmp_path / "dense"), FolderFiles(tmp_path / "out")
    assert before.infos == after.infos
    assert not any("gate." in row.name for row in told.rows)
    assert any("experts" in row.name for row in told.rows)
    zeros = sum(int((after.read(name) == 0).sum()) - int((before.read(name) == 0).sum()) for name in before.names)
    assert zeros == sum(row.n - row.keep for row in told.rows)


# ---- kills ---------------------------------------------------------------------------------------------------------


def prune_until(rank, world_size, folder, at, where, out, criterion, order):
    """Prune, and be killed as the output's method `where` is called for the time `at`."""
    method, calls = getattr(FolderOutput, where), []

    def until(self, *args):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *args)

    setattr(FolderOutput, where, until)
    pruned(Path(folder), Path(out), criterion=criterion, order=order, inputs=samples("llama"))


def killed(at, where, folder, out, criterion, order):
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        spawn(prune_until, 1, folder, at, where, str(out), criterion, order)
    assert not out.exists()


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "where", "criterion", "order"),
    [
        (2, "note", "wanda", "sequential"),
        (3, "note", "wanda", "dense"),
        (4, "write", "magnitude", "sequential"),
        (1, "finish", "wanda", "sequential"),
    ],
)
def test_after_a_kill_the_same_call_goes_on(at, where, criterion, order, tmp_path, monkeypatch):
    from emp_callbacks.folders import pruning

    made("llama", tmp_path / "dense")
    settings = {"criterion": criterion, "order": order, "inputs": samples("llama")}
    pruned(tmp_path / "dense", tmp_path / "whole", **settings)
    out = tmp_path / "out"
    killed(at, where, tmp_path / "dense", out, criterion, order)
    chosen = []
    refresh = pruning._refresh
    monkeypatch.setattr(pruning, "_refresh", lambda *args: (chosen.append(args[2].name), refresh(*args)))
    told = pruned(tmp_path / "dense", out, **settings)
    finished = {"note": at - 1, "write": (at - 1) // 7, "finish": 3}[where]
    assert chosen == [f"model.layers.{i}" for i in range(finished, 3)]
    assert len(told.rows) == 21
    assert (f"went on behind {finished} blocks" in " ".join(told.notes)) == (finished > 0)
    whole, found = FolderFiles(tmp_path / "whole"), FolderFiles(out)
    assert all(torch.equal(whole.read(name), found.read(name)) for name in whole.names)
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


@pytest.mark.processes
@pytest.mark.slow
def test_half_a_folder_of_another_command_is_refused(tmp_path):
    made("llama", tmp_path / "dense")
    killed(2, "note", tmp_path / "dense", tmp_path / "out", "wanda", "sequential")
    with pytest.raises(FileExistsError, match=r"half written by another command \(other order\)"):
        pruned(tmp_path / "dense", tmp_path / "out", criterion="wanda", order="dense", inputs=samples("llama"))


def prune_a_part(rank, world_size, folder, out, scope):
    config = EMPConfig().once(criterion="magnitude", scope=scope)
    told = prune_folder(Path(folder), Path(out), config, rank=rank, world_size=world_size)
    assert (told is None) == (rank != 0)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("scope", ["row", "global"])
def test_blocks_are_spread_over_processes(scope, tmp_path):
    made("llama", tmp_path / "dense", num_hidden_layers=5)
    one = prune_folder(tmp_path / "dense", tmp_path / "one", EMPConfig().once(criterion="magnitude", scope=scope))
    spawn(prune_a_part, 3, tmp_path / "dense", str(tmp_path / "three"), scope)
    whole, found = FolderFiles(tmp_path / "one"), FolderFiles(tmp_path / "three")
    assert all(torch.equal(whole.read(name), found.read(name)) for name in whole.names)
    record = json.loads((tmp_path / "three" / RECORD).read_text())
    assert [row["keep"] for row in record["rows"]] == [row.keep for row in one.rows]


# ---- what cannot be done -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"criterion": "taylor"}, "reads gradients"),
        ({"criterion": "wanda"}, "--text FILE"),
        ({"criterion": "wanda", "scope": "global", "inputs": samples("llama")}, "--scope row"),
        ({"criterion": "magnitude", "include": ["lm_hed.weight"]}, "lm_hed"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(settings, says, tmp_path):
    made("llama", tmp_path / "dense")
    with pytest.raises(ValueError, match=says):
        pruned(tmp_path / "dense", tmp_path / "out", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_what_is_there_makes_way_only_where_that_is_asked_for(tmp_path):
    made("llama", tmp_path / "dense")
    out = tmp_path / "out"
    out.mkdir()
    pruned(tmp_path / "dense", out, criterion="magnitude")
    with pytest.raises(FileExistsError, match=r"--overwrite to move it to .*out\.old-1"):
        pruned(tmp_path / "dense", out, criterion="magnitude")
    config = EMPConfig().once(criterion="magnitude", scope="row", density=0.1)
    told = prune_folder(tmp_path / "dense", out, config, overwrite=True)
    assert told.density < 0.15
    before, after = (json.loads((tmp_path / name / RECORD).read_text()) for name in ("out.old-1", "out"))
    assert before["density"] > 0.5
    assert after["density"] == told.density


def test_weights_that_are_not_finite_stop_before_the_folder_is_there(tmp_path):
    model = made("llama", tmp_path / "dense")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "dense")
    for scope in ("row", "global"):
        with pytest.raises(FloatingPointError, match=r"mlp\.up_proj"):
            pruned(tmp_path / "dense", tmp_path / scope, criterion="magnitude", scope=scope)
        assert not (tmp_path / scope).exists()


def test_what_the_model_does_not_call_is_told_of(tmp_path, monkeypatch):
    made("llama", tmp_path / "dense")
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaModel.forward

    def without_the_last(self, *args, **settings):
        layers, self.layers = self.layers, self.layers[:-1]
        try:
            return forward(self, *args, **settings)
        finally:
            self.layers = layers

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", without_the_last)
    inputs = samples("llama")
    told = pruned(tmp_path / "dense", tmp_path / "out", criterion="wanda", inputs=inputs, include=["*.mlp.*"])
    assert {row.name.split(".")[2] for row in told.rows} == {"0", "1"}
    assert any("model.layers.2.mlp.down_proj.weight" in note and "does not call" in note for note in told.notes)
    with pytest.raises(ValueError, match="calls nothing that is to be pruned"):
        pruned(
            tmp_path / "dense", tmp_path / "none", criterion="wanda", inputs=inputs, include=["model.layers.2.mlp.*"]
        )
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "out"}


def test_the_head_is_left_out_unless_it_is_named(tmp_path):
    made("llama", tmp_path / "dense")
    told = pruned(tmp_path / "dense", tmp_path / "out", criterion="magnitude")
    assert "lm_head.weight" not in {row.name for row in told.rows}
    assert any("lm_head.weight" in note for note in told.notes)
    named = pruned(
        tmp_path / "dense", tmp_path / "head", criterion="wanda", include=["lm_head.weight"], inputs=samples("llama")
    )
    assert [row.name for row in named.rows] == ["lm_head.weight"]


# ---- memory --------------------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from types import SimpleNamespace
from emp_callbacks.cli.freed_memory import give_freed_memory_back
from emp_callbacks.config import EMPConfig
from emp_callbacks.folders.pruning import prune_folder
from tests.folders.kinds import samples

give_freed_memory_back()  # as the command does

def peak():  # of this program alone: what getrusage says is not less than what the one that started it had
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def pruned(layers):
    config = EMPConfig().once(criterion=sys.argv[3], scope=sys.argv[4])
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    shown = SimpleNamespace(inputs=samples("llama", 2), notes=())
    prune_folder(folder / str(layers), out / str(layers), config, samples=shown)
    return peak()

small = pruned(2)
print(pruned(22) - small)
"""


@pytest.fixture(scope="module")
def two_and_twenty_two_blocks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    width = {"hidden_size": 512, "intermediate_size": 1024}
    for layers in (2, 22):
        made("llama", folder / str(layers), torch.bfloat16, num_hidden_layers=layers, **width)
    return folder


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize(("criterion", "scope"), [("magnitude", "global"), ("wanda", "row")])
def test_the_peak_does_not_grow_with_the_number_of_blocks(criterion, scope, two_and_twenty_two_blocks, tmp_path):
    folder = two_and_twenty_two_blocks
    block = (folder / "22" / "model.safetensors").stat().st_size / 22
    assert block > 4e6
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(tmp_path), criterion, scope],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    grown = int(done.stdout.split()[-1])
    assert grown < 8 * block, f"{grown:,} bytes"
