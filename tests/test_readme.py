"""What the README shows is run."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def block(name: str) -> str:
    (found,) = [text for text in BLOCKS if name in text]
    return found


def test_plain_loop():
    names = {}
    exec(block("EMPPruner(model"), names)
    assert [event.step for event in names["pruner"].trajectory] == [100, 200, 300]
    assert int((names["model"].weight == 0).sum()) > 0


def test_more_than_weights(capsys):
    names = {}
    exec(block('target="heads"'), names)
    assert [event.step for event in names["pruner"].trajectory] == [4, 8]
    assert "blocks.0.attn" in capsys.readouterr().out


def test_the_table_of_targets_names_every_pair():
    from emp_callbacks.criteria import DEFAULT_CRITERIA, fitting_criteria

    rows = {row[0]: row[1] for row in re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", README, flags=re.MULTILINE)}
    for target, default in DEFAULT_CRITERIA.items():
        named = re.findall(r"`(\w+)`", rows[target])
        assert named[0] == default
        assert set(named) == set(fitting_criteria(target)), target


def test_rule_alone():
    names = {}
    exec(block("effective_number(scores)"), names)
    assert names["n_eff"] == pytest.approx(10 / 3)
    assert names["keep"] == 3
    assert names["mask"].tolist() == [True, True, True, False]


def test_lightning(tmp_path, monkeypatch, capsys):
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(torch.randn(8, 4), 4)

    monkeypatch.chdir(tmp_path)
    exec(block("EMPCallback(every_n_epochs=1)"), {"model": Model(), "data": Data()})
    assert "net.weight" in capsys.readouterr().out


def test_the_install_commands_stand_within_the_first_twenty_lines():
    top = "\n".join(README.splitlines()[:20])
    assert "make quickstart" in top
    assert "make test" in top


def test_every_picture_and_recipe_that_it_names_exists():
    root = Path(__file__).parents[1]
    named = re.findall(r"\]\(([\w./]+)\)", README) + re.findall(r"recipes/\w+\.yaml", README)
    for path in named:
        assert (root / path).exists(), path
    assert len(named) > 5
