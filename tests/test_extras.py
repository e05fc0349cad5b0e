"""Each part in a process that has what `pip install 'emp-callbacks[EXTRA]'` brings, and nothing else.

The package is unpacked from a wheel made here; the others are those of this environment, chosen by what the wheel asks
for and by what these ask for in turn.
"""

import json
import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import emp_callbacks
from emp_callbacks.extras import EXTRAS, is_installed, needs

ROOT = Path(__file__).parents[1]
OURS = "emp-callbacks"


def asked_for(name, extras):
    """Return name -> extras of every distribution that an installation of `name[extras]` brings."""
    found, waiting = {}, [(canonicalize_name(name), frozenset(extras))]
    while waiting:
        name, extras = waiting.pop()
        if extras <= found.get(name, frozenset()) and name in found:
            continue
        extras = found[name] = extras | found.get(name, frozenset())
        for line in distribution(name).requires or ():
            requirement = Requirement(line)
            environments = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            if requirement.marker is None or any(requirement.marker.evaluate(one) for one in environments):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(words, check=True, capture_output=True, timeout=120, cwd=ROOT)
    (found,) = folder.glob("*.whl")
    return found


def environment_of(extra, folder, wheel):
    """Make a folder to import from that holds nothing but an installation of the wheel, with one extra or without."""
    for name in asked_for(OURS, [extra] if extra else []):
        files = () if name == OURS else distribution(name).files
        for top in {path.parts[0] for path in files} - {"..", "__pycache__", "bin"}:
            if not (folder / top).exists():  # nvidia's packages share a folder
                (folder / top).symlink_to(distribution(name).locate_file(top))
    zipfile.ZipFile(wheel).extractall(folder)


def run(extra, code, tmp_path, wheel):
    """Run code in such an environment, in an empty folder, and return what it printed."""
    site, work = tmp_path / "site", tmp_path / "work"
    site.mkdir()
    work.mkdir()
    environment_of(extra, site, wheel)
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n" + textwrap.dedent(code)
    words = [sys.executable, "-I", "-S", "-W", "ignore", "-c", code]
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HOME": str(work), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, cwd=work, env=settings)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


MISSING = """
    def refusal(work):
        try:
            work()
        except ImportError as error:
            return str(error)
        raise AssertionError("nothing was refused")

    def refused_command(*words):
        import contextlib, io
        from emp_callbacks.cli.main import main
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            assert main(list(words)) == 2, words
        return errors.getvalue().rstrip("\\n")
"""


@pytest.mark.processes
def test_the_core_prunes_saves_inspects_and_says_what_is_missing(tmp_path, wheel):
    code = """
    import torch, emp_callbacks
    from emp_callbacks import EMPHook, EMPPruner, load_shrunk, pruned_units, shrink
    from emp_callbacks.cli.main import main
    from safetensors.torch import save_file
    for settings in ({}, {"target": "neurons", "criterion": "taylor"}, {"target": "features"}, {"criterion": "wanda"}):
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        optimizer = torch.optim.AdamW(model.parameters())
        pruner = EMPPruner(model, optimizer, every_n_steps=1, trajectory_path="rows.jsonl", **settings)
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        assert len(pruner.step()) >= 1 and pruner.audit().clean
        pruner.save("saved")
        pruner.load("saved")
        pruner.finalize()
    save_file(model.state_dict(), "weights.safetensors")
    assert main(["inspect", "weights.safetensors"]) == 0
    assert main(["prune", "weights.safetensors", "--out", "pruned.safetensors"]) == 0
    assert main(["export", "weights.safetensors", "--out", "same.safetensors"]) == 0
    assert main(["recipes"]) == 0 and main(["recipes", "quickstart"]) == 0
    assert main(["--help"]) == 0
    found = [refusal(lambda: emp_callbacks.EMPCallback), refusal(lambda: emp_callbacks.EffectiveNumber)]
    found += [refused_command("compare", "--config", "quickstart"), refused_command("fit", "--config", "quickstart")]
    found += [refused_command("compare", "--help"), refused_command("sweep-beta", "--config", "paper/fc2")]
    found += [refused_command("prune", "weights.safetensors", "--config", "quickstart", "--out", "x.safetensors")]
    found += [refused_command("inspect", "weights.safetensors", "--data", "quickstart")]
    found += [refused_command("inspect", "timm:resnet18")]
    print(*found, sep="\\n")
    """
    lines = run("", textwrap.dedent(MISSING) + textwrap.dedent(code), tmp_path, wheel)[-9:]
    assert (
        lines[0]
        == "EMPCallback needs pytorch_lightning, which is not installed: pip install 'emp-callbacks[lightning]'"
    )
    assert lines[1].startswith("EffectiveNumber needs torchmetrics,")
    for line in lines[2:8]:
        assert line.startswith("emp: a recipe or a study (emp fit,"), line
        assert line.endswith("which are not installed: pip install 'emp-callbacks[study]'"), line
    assert lines[8].endswith("timm:resnet18 needs timm, which is not installed: pip install 'emp-callbacks[study]'")


@pytest.mark.processes
def test_lightning_is_enough_for_the_callback_and_the_metric(tmp_path, wheel):
    code = """
    import torch, pytorch_lightning as pl
    from emp_callbacks import EffectiveNumber, EMPCallback
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(8, 2)
        def training_step(self, batch, _):
            return self.net(batch).square().mean()
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())
    callback = EMPCallback(every_n_epochs=1)
    quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback], **quiet)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(8, 8), 4))
    metric = EffectiveNumber()
    metric.update(torch.ones(3))
    print(len(callback.trajectory), float(metric.compute()))
    print([name for name in ("timm", "transformers", "scipy", "matplotlib", "jsonargparse") if name in sys.modules])
    """
    assert run("lightning", code, tmp_path, wheel)[-2:] == ["2 3.0", "[]"]


@pytest.mark.processes
def test_study_is_enough_for_recipes_and_reports(tmp_path, wheel):
    code = """
    import importlib, pkgutil, emp_callbacks
    from emp_callbacks.cli.main import main
    for module in pkgutil.walk_packages(emp_callbacks.__path__, "emp_callbacks."):
        if "huggingface" not in module.name:  # of the extra [hf]
            importlib.import_module(module.name)
    quick = ["--trainer.max_epochs", "1", "--study.seeds", "[0]", "--study.arms", "[dense, one_shot]"]
    assert main(["compare", "--config", "quickstart", *quick]) == 0
    assert main(["report", "runs/quickstart"]) == 0
    from emp_callbacks.study.recipe.tasks import LanguageModel
    print(refused_command("fit", "--config", "gpt_stdlib", "--trainer.max_steps", "1", "--data.max_bytes", "60000"))
    """
    lines = run("study", textwrap.dedent(MISSING) + textwrap.dedent(code), tmp_path, wheel)
    folder = tmp_path / "work" / "runs" / "quickstart"
    assert (folder / "report.html").is_file()
    assert json.loads((folder / "results.json").read_text())["study"]["recipe"] == "quickstart"  # not a path in a venv
    assert lines[-1].endswith("needs transformers, which is not installed: pip install 'emp-callbacks[hf]'")


@pytest.mark.processes
def test_hf_is_enough_for_a_folder_of_transformers(tmp_path, wheel):
    code = """
    import transformers
    from emp_callbacks.finished.finished_model import open_model
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8)
    transformers.GPT2Model(config).save_pretrained("folder")
    print(type(open_model("folder", needs_modules=True).module).__name__)
    from emp_callbacks import EMPTrainerCallback
    from transformers import Trainer, TrainingArguments
    model = transformers.GPT2LMHeadModel(config)
    data = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8
    trainer = Trainer(model, TrainingArguments("out", max_steps=2, report_to=[], use_cpu=True), train_dataset=data)
    emp = EMPTrainerCallback.attach(trainer, every_n_steps=1, summary=False)
    trainer.train()
    print(len(emp.trajectory))
    """
    lines = run("hf", code, tmp_path, wheel)
    assert "GPT2Model" in lines
    assert lines[-1] == "2"


@pytest.mark.processes
@pytest.mark.skipif(not is_installed("deepspeed"), reason="DeepSpeed is not installed")
def test_deepspeed_is_enough_to_import_it_beside_the_hook(tmp_path, wheel):
    code = "import deepspeed; from emp_callbacks import EMPHook; print(EMPHook.__name__)"
    assert run("deepspeed", code, tmp_path, wheel)[-1] == "EMPHook"


# ---- what ships -----------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_the_wheel_holds_the_package_the_recipes_and_one_version(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    wanted = {name for name in tracked if name.startswith("emp_callbacks/")}
    wanted |= {f"emp_callbacks/{name}" for name in tracked if name.startswith("recipes/")}
    assert wanted == {name for name in names if name.startswith("emp_callbacks/")}
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert f"\nVersion: {emp_callbacks.__version__}\n" in text
    head, _, page = text.partition("\n\n")
    assert not re.findall(r"\]\((?!https?://|#)", page), "relative links and pictures are broken on a package index"
    assert "Project-URL: " in head


@pytest.mark.processes
def test_the_source_distribution_holds_what_its_tests_need(tmp_path):
    words = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(words, check=True, capture_output=True, timeout=120, cwd=ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    assert set(tracked) - held == set()


# ---- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_table_names_what_pyproject_asks_for(extra):
    if missing := [package for package in EXTRAS[extra] if not is_installed(package)]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    declared = {Requirement(line) for line in distribution(OURS).requires or ()}
    names = {r.name for r in declared if r.marker is not None and r.marker.evaluate({"extra": extra})} - {OURS}
    if within := {"study": "lightning", "text": "hf"}.get(extra):
        names |= {r.name for r in declared if r.marker is not None and r.marker.evaluate({"extra": within})}
    # not packages_distributions(), which misses some on Python 3.10
    brings = {name: {file.parts[0] for file in distribution(name).files or ()} for name in names}
    named = {name for package in EXTRAS[extra] for name, parts in brings.items() if package.partition(".")[0] in parts}
    assert named == names
    assert len(EXTRAS[extra]) == len(names)


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "some_framework" / "core").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("some_framework")
    assert not is_installed("some_framework.core")
    assert not is_installed("no_such_framework.core")
    assert is_installed("torch.nn")
    with pytest.raises(ImportError, match=r"^it needs some_framework, no_such, which are not installed: pip install"):
        needs("it", "hf", "some_framework", "numpy", "no_such")
