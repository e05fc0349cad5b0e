"""Write a Hugging Face Llama folder of random weights, one shard at a time: something large to measure on.

    python benchmarks/make_llama_folder.py --layers 24 --hidden 2048 --out runs/llama   # 1.2 billion weights, 2.4 GB
    python benchmarks/make_llama_folder.py --layers 28 --hidden 3072 --out runs/llama   # 3.0 billion weights, 6 GB

Weights are Gaussian with a standard deviation of 0.02, as Llama's are at the start, and norms are 1. The tokenizer is
ByT5's: it has no files to get. A shard lies in memory while it is written, safetensors' own copy of it beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import ByT5Tokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

STD = 0.02


def main(words: Sequence[str] | None = None) -> None:
    options = parsed(words)
    written = write_folder(
        options.out,
        llama_config(
            options.layers, options.hidden, options.vocabulary, getattr(torch, options.dtype), tied=options.tied
        ),
        shard_bytes=options.shard_mb * 10**6,
        seed=options.seed,
    )
    print(json.dumps({"folder": str(options.out), **written}))


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, required=True, help="blocks")
    parser.add_argument("--hidden", type=int, required=True, help="width, a multiple of 64")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet, or is empty")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--shard-mb", type=int, default=500, help="megabytes of a shard at most (500)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="rows of the embedding, >= 384 (32000)")
    parser.add_argument("--tied", action="store_true", help="the head is the embedding")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words)
    if options.hidden % 64 or options.hidden < 64:
        parser.error(f"--hidden {options.hidden} is no multiple of 64, the size of a head")
    if options.vocabulary < 384:
        parser.error(f"--vocabulary {options.vocabulary} is less than the 384 entries of ByT5's tokenizer")
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty; name another folder")
    return options


def llama_config(
    layers: int, hidden: int, vocabulary: int = 32000, dtype: torch.dtype = torch.bfloat16, *, tied: bool = False
) -> LlamaConfig:
    """Return a configuration with heads of 128 (64 below a width of 2048), four queries to a key, and an MLP of 2.7."""
    heads = hidden // (128 if hidden >= 2048 and hidden % 128 == 0 else 64)
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=64 * round(2.7 * hidden / 64),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 if heads % 4 == 0 else heads,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        torch_dtype=dtype,
    )


def write_folder(folder: Path, config: LlamaConfig, *, shard_bytes: int, seed: int = 0) -> dict[str, int]:
    """Write a folder and return its numbers: weights, bytes of all tensors, bytes of one block, shards."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = config.dtype if hasattr(config, "dtype") else config.torch_dtype  # before and since transformers 4.56
    config.save_pretrained(folder)
    GenerationConfig(max_new_tokens=32, pad_token_id=0, bos_token_id=1, eos_token_id=1).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    shapes = {name: weight for name, weight in model.state_dict().items() if not is_tied(name, config)}
    shards = list(shard_names(shapes, shard_bytes))
    generator = torch.Generator().manual_seed(seed)
    placed: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {name: random_weight(shapes[name], generator) for name in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
        placed.update(dict.fromkeys(names, file))
    size = sum(bytes_of(weight) for weight in shapes.values())
    if len(shards) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": size}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return {
        "parameters": sum(weight.numel() for weight in shapes.values()),
        "bytes": size,
        "block_bytes": sum(bytes_of(weight) for name, weight in shapes.items() if ".layers.0." in name),
        "shards": len(shards),
    }


def is_tied(name: str, config: LlamaConfig) -> bool:
    return bool(config.tie_word_embeddings) and name == "lm_head.weight"


def shard_names(shapes: dict[str, Tensor], most: int) -> Iterator[list[str]]:
    """Yield the names of each shard, in the model's order; a tensor above the limit gets a shard of its own."""
    names: list[str] = []
    size = 0
    for name, weight in shapes.items():
        if names and size + bytes_of(weight) > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_of(weight)
    yield names


def random_weight(shape: Tensor, generator: torch.Generator) -> Tensor:
    weight = torch.empty(shape.shape, dtype=shape.dtype)
    return weight.fill_(1) if weight.ndim == 1 else weight.normal_(0, STD, generator=generator)


def bytes_of(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()


if __name__ == "__main__":
    main()
