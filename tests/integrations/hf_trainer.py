"""A tiny GPT-2, its data and a `transformers.Trainer` around them, for tests of EMPTrainerCallback."""

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from emp_callbacks import EMPTrainerCallback


class Tokens(Dataset):
    def __init__(self, samples=24, seed=0):
        self.tokens = torch.randint(0, 32, (samples, 12), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i], "attention_mask": torch.ones(12).long()}


class Stream(IterableDataset):
    def __iter__(self):
        yield from (Tokens()[i] for i in range(24))


def gpt2(dropout=0.1):
    torch.manual_seed(0)
    rates = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, **rates))


def trainer(folder, *, model=None, data=None, kind=Trainer, callbacks=(), **arguments):
    """A Trainer of 12 steps in 2 epochs, which evaluates and saves at steps 3, 6, 9, 12."""
    arguments = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, "logging_steps": 2,
        "save_steps": 3, "eval_steps": 3, "eval_strategy": "steps", "report_to": [], "use_cpu": True, "seed": 1,
        "disable_tqdm": True,
    } | arguments  # fmt: skip
    return kind(
        model=gpt2() if model is None else model,
        args=TrainingArguments(str(folder), **arguments),
        train_dataset=Tokens() if data is None else data,
        eval_dataset=Tokens(8, seed=1),
        callbacks=list(callbacks),
    )


def attach(trainer, **settings):
    return EMPTrainerCallback.attach(trainer, **{"every_n_steps": 3, "summary": False} | settings)
