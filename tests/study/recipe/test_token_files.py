import hashlib
import itertools
import json
import pickle

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from emp_callbacks.study.recipe.text_tokenizer import TextTokenizer
from emp_callbacks.study.recipe.token_files import TokenFile, TokenFileData
from emp_callbacks.study.text_sources import TextFile
from emp_callbacks.study.tokenizing import tokenize
from tests.study.recipe.token_makers import TEXT, byte_level


def nanogpt(path, tokens, dtype=np.uint16):
    """Write tokens as nanoGPT's prepare.py does."""
    np.array(tokens, dtype=dtype).tofile(path)
    return path


@pytest.fixture
def folder(tmp_path):
    nanogpt(tmp_path / "train.bin", range(101))
    nanogpt(tmp_path / "val.bin", range(100, 131))
    return tmp_path


def ready(folder, **settings):
    data = TokenFileData(
        str(folder), **{"sequence_length": 10, "batch_size": 2, "vocab_size": 200, "num_workers": 0, **settings}
    )
    data.setup("fit")
    return data


def test_windows_follow_each_other_and_targets_are_one_token_ahead(folder):
    file = TokenFile(folder / "train.bin", 10, vocab_size=101)
    inputs, targets = file.__getitems__([9, 0])
    assert len(file) == 10
    assert inputs.tolist() == [list(range(90, 100)), list(range(10))]
    assert torch.equal(targets, inputs + 1)
    assert inputs.dtype == torch.int64
    assert file[9][0].tolist() == inputs[0].tolist()


def test_nothing_is_in_memory_and_a_worker_gets_no_tokens(tmp_path):
    file = TokenFile(nanogpt(tmp_path / "a.bin", np.arange(1 << 20) % 7), 10, vocab_size=7)
    assert isinstance(file.tokens, np.memmap)
    assert len(pickle.dumps(file)) < 2000
    assert torch.equal(pickle.loads(pickle.dumps(file))[3][0], file[3][0])


def test_what_emp_tokenize_wrote_is_read_without_another_word(tmp_path):
    byte_level().save_pretrained(tmp_path / "tokenizer")
    tokenizer = TextTokenizer(str(tmp_path / "tokenizer"))
    (tmp_path / "a.txt").write_text(TEXT[:2000])
    for part in ("train", "val"):
        tokenize([TextFile(str(tmp_path / "a.txt"), 2000)], {part: tmp_path / f"{part}.bin"}, tokenizer)
    data = ready(tmp_path, vocab_size=None)
    inputs, targets = next(iter(data.val_dataloader()))
    expected = tokenizer(TEXT[:2000])
    assert inputs.flatten().tolist() == expected[:20]
    assert targets[1, -1] == expected[20]
    assert data.vocab_size == tokenizer.vocab_size
    assert ready(tmp_path, vocab_size=512).vocab_size == 512
    assert data.content_digest["train"] == hashlib.sha256((tmp_path / "train.bin").read_bytes()).hexdigest()


def test_the_digest_is_that_of_the_file(folder):
    digest = hashlib.sha256((folder / "train.bin").read_bytes()).hexdigest()
    assert ready(folder).content_digest["train"] == digest


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_epoch_has_each_window_once_over_all_ranks_in_another_order(ranks, folder, monkeypatch):
    orders = []
    for epoch in range(2):
        seen = []
        for rank in range(ranks):
            data = ready(folder, batch_size=1, num_workers=0, seed=3)
            loader = data.train_dataloader()
            loader.sampler.num_replicas, loader.sampler.rank = ranks, rank
            loader.sampler.total_size = 10
            loader.sampler.set_epoch(epoch)
            seen += [int(inputs[0, 0]) for inputs, _ in loader]
        orders.append(seen)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(0, 100, 10))
    assert orders[0] != orders[1]


class Noted(pl.LightningModule):
    """Notes the first token of each window that it trains on."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen, self.batches = nn.Parameter(torch.ones(1)), [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0][:, 0].tolist())
        self.batches.append(batch[0].tolist())
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, path, ckpt=None):
    task = Noted()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saved = ModelCheckpoint(path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    trainer = pl.Trainer(max_steps=12, callbacks=[saved], default_root_dir=path, **quiet)
    trainer.fit(task, datamodule=data, ckpt_path=ckpt)
    return task.seen


def test_a_fit_resumes_in_the_middle_of_an_epoch(folder):
    def data():
        return TokenFileData(str(folder), sequence_length=10, batch_size=2, vocab_size=200, num_workers=0, seed=1)

    whole = fit(data(), folder)
    assert len(whole) == 12
    assert fit(data(), folder, ckpt=folder / "step=7.ckpt") == whole[7:]
    assert sorted(itertools.chain(*whole[:5])) == list(range(0, 100, 10))


# ---- refusals -----------------------------------------------------------------------------------------------------


def sidecar(path, **changes):
    told = {"format": 1, "dtype": "uint16", "vocab_size": 200, "tokens": 101, "sha256": "0", **changes}
    (path / "train.bin.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (lambda home: (home / "train.bin").unlink(), {}, r"no file of tokens .*train.bin; write it: emp tokenize"),
        (lambda home: (home / "val.bin").unlink(), {}, r"no file of tokens .*val.bin; write it: emp tokenize"),
        (lambda home: None, {"vocab_size": None}, r"the vocabulary of .*train.bin is not known.*set vocab_size"),
        (lambda home: None, {"vocab_size": 90}, "train.bin holds token 100, and the vocabulary has 90"),
        (lambda home: None, {"sequence_length": 31}, "val.bin holds 31 tokens, and a window with its targets takes 32"),
        (lambda home: (home / "train.bin").write_bytes(b"abc"), {}, "has 3 bytes, which are no tokens of 2 bytes"),
        (lambda home: nanogpt(home / "train.bin", range(99), np.uint32), {}, "every second token .* is 0"),
        (lambda home: sidecar(home, tokens=100), {}, "holds 101 tokens, and train.bin.json says 100; copy both again"),
        (lambda home: sidecar(home, vocab_size=201), {}, "vocab_size=200 is less than the 201 of"),
        (lambda home: sidecar(home, dtype="uint32"), {}, "is of format 1 with uint32 tokens"),
        (lambda home: sidecar(home, tokens=None), {}, "does not say what train.bin holds"),
        (lambda home: (home / "train.bin.json").write_text("{"), {}, "does not say what train.bin holds"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(damage, settings, message, folder):
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        ready(folder, **settings)
    assert "\n" not in str(raised.value)


def test_a_token_that_the_vocabulary_lacks_is_found_where_it_is_read(tmp_path):
    tokens = np.zeros(20_000, np.uint16)
    tokens[10_000] = 300
    file = TokenFile(nanogpt(tmp_path / "a.bin", tokens + 1), 10, vocab_size=200)
    assert file[0][0].tolist() == [1] * 10
    with pytest.raises(ValueError, match=r"a.bin holds token 301, and the vocabulary has 200"):
        file[1000]


def test_testing_without_a_file_says_how_to_get_one(folder):
    with pytest.raises(FileNotFoundError, match=r"test.bin to test on; write it: emp tokenize"):
        ready(folder).test_dataloader()


def test_the_digest_is_known_after_setup(folder):
    with pytest.raises(RuntimeError, match="call setup"):
        _ = TokenFileData(str(folder), vocab_size=200).content_digest
