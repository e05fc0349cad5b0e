import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from emp_callbacks.study.recipe.text_datasets import PackedWindows, TextDatasetData
from tests.study.recipe.test_token_files import Noted
from tests.study.recipe.token_makers import byte_level

LENGTH = 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files of documents with a number each, and one to validate on, in both formats."""
    home = tmp_path_factory.mktemp("data")
    numbers = iter(range(100, 160))
    parts = {f"train-{shard:05}-of-00003": [*map(str, itertools.islice(numbers, 20))] for shard in range(3)}
    for name, texts in {**parts, "validation": ["900", "", "901", "902"]}.items():
        for ending in ("parquet", "jsonl"):
            (home / ending).mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), home / "parquet" / f"{name}.parquet")
        (home / "jsonl" / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return home / "jsonl"


def data(folder, tokenizer, **settings):
    made = {"batches_per_epoch": 4, "sequence_length": LENGTH, "batch_size": 2, "seed": 3, "num_workers": 0, **settings}
    found = TextDatasetData(str(folder), tokenizer, **made)
    found.setup("fit")
    return found


def documents_of(text, count):
    """Return the numbers of the first documents that end in a stream of characters."""
    return [int(number) for number in text.split("|")[:count]]


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text):
        return [ord(letter) for letter in text]


def read(documents, workers, windows):
    """Return the characters that each worker hands out, of so many windows."""
    stream = PackedWindows(documents, Letters(), "text", LENGTH, ord("|"))
    loader = DataLoader(stream, batch_size=1, num_workers=workers)
    streams = ["" for _ in range(max(workers, 1))]
    for i, window in enumerate(itertools.islice(loader, windows)):
        streams[i % len(streams)] += "".join(map(chr, window[0, :-1]))
    return streams


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (3, 0), pytest.param(1, 3, marks=pytest.mark.processes)])
def test_each_document_is_read_once_over_all_ranks_and_workers(ranks, workers, folder, tokenizer):
    readers, seen = ranks * max(workers, 1), []
    share = 60 // readers
    for rank in range(ranks):
        # Of three files, three ranks or workers have one each; two ranks take every second document.
        part = data(folder, tokenizer, shuffle_buffer=7)._documents(num_replicas=ranks, rank=rank)
        for stream in read(part, workers, (4 * share // LENGTH + 1) * max(workers, 1)):
            seen += documents_of(stream, share)
    assert sorted(seen) == list(range(100, 160))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_windows_are_packed_and_targets_are_one_token_ahead(ending, folder, tokenizer):
    made = data(folder.with_name(ending), tokenizer, shuffle_buffer=0)
    batches = list(made.train_dataloader())
    assert [inputs.shape for inputs, _ in batches] == [(2, LENGTH)] * 4
    inputs, targets = (torch.cat(both).flatten() for both in zip(*batches, strict=True))
    expected = [
        token for number in range(100, 120) for token in [*made.tokenizer(str(number)), made.tokenizer.end_of_text]
    ]
    assert inputs.tolist() == expected[:40]
    assert targets.tolist() == expected[1:41]


def test_the_order_is_that_of_the_seed_and_of_the_pass(folder, tokenizer):
    def first(**settings):
        return torch.cat([inputs for inputs, _ in data(folder, tokenizer, **settings).train_dataloader()]).tolist()

    assert first() == first()
    assert first() != first(seed=4)
    passes = first(batches_per_epoch=24)  # 60 documents have 240 tokens
    assert len(passes) == 48
    assert passes[:24] != passes[24:]


def test_copied_data_is_read_as_streamed_data_is(folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    made = data(folder, tokenizer, shuffle_buffer=0, streaming=False)
    streamed = data(folder, tokenizer, shuffle_buffer=0)
    for (inputs, _), (others, _) in zip(made.train_dataloader(), streamed.train_dataloader(), strict=True):
        assert torch.equal(inputs, others)


def test_validation_is_the_first_windows_of_its_split(folder, tokenizer):
    made = data(folder, tokenizer, eval_windows=2)
    ((inputs, targets),) = made.val_dataloader()
    expected = [token for n in (900, 901, 902) for token in [*made.tokenizer(str(n)), made.tokenizer.end_of_text]]
    assert inputs.flatten().tolist() == expected[:10]
    assert targets.flatten().tolist() == expected[1:11]
    assert made.vocab_size == made.tokenizer.vocab_size


# ---- resuming -----------------------------------------------------------------------------------------------------


def fit(made, path, ckpt=None):
    task = Noted()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saved = ModelCheckpoint(path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(max_epochs=3, callbacks=[saved], default_root_dir=path, limit_val_batches=0, **quiet)
    trainer.fit(task, datamodule=made, ckpt_path=ckpt)
    return task.batches


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.processes)])
def test_a_fit_goes_on_with_the_batch_that_is_due(workers, folder, tokenizer, tmp_path):
    whole = fit(data(folder, tokenizer, num_workers=workers), tmp_path)
    assert len(whole) == 12
    for step in (6, 8):  # in an epoch, at the end of one
        rest = fit(
            data(folder, tokenizer, num_workers=workers), tmp_path / str(step), ckpt=tmp_path / f"step={step}.ckpt"
        )
        assert rest == whole[step:]


def test_another_split_of_the_documents_is_said(folder, tokenizer, tmp_path):
    fit(data(folder, tokenizer), tmp_path)
    with pytest.warns(UserWarning, match="resumed after 6 batches with batch_size 2 -> 3: the documents are shared"):
        fit(data(folder, tokenizer, batch_size=3), tmp_path / "b", ckpt=tmp_path / "step=6.ckpt")


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_split": "dev"}, "the split 'dev' of the data set .* cannot be opened"),
        ({"text_column": "content"}, "has no column 'content' of text; its columns: text"),
        ({"sequence_length": 50}, "has 12 tokens, fewer than a window of sequence_length=50 and its targets"),
        ({"batches_per_epoch": 0}, "batches_per_epoch must be an integer >= 1"),
        ({"path": "nowhere/at-all"}, "the data set 'nowhere/at-all' cannot be opened"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(settings, message, folder, tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message) as raised:
        data(settings.pop("path", folder), tokenizer, **settings)
    assert "\n" not in str(raised.value)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(folder, tokenizer):
    with pytest.raises(ValueError, match="vocab_size=300 is less than the 400 of the tokenizer"):
        _ = data(folder, tokenizer, vocab_size=300).vocab_size
    assert data(folder, tokenizer, vocab_size=512).vocab_size == 512


def test_a_part_without_text_is_no_endless_loop(tmp_path, tokenizer):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    (tmp_path / "validation.jsonl").write_text(json.dumps({"text": "some text to look at"}) + "\n")
    with pytest.raises(ValueError, match="finds no text in its part"):
        next(iter(data(tmp_path, tokenizer).train_dataloader()))
