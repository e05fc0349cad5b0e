"""How the loss of a language model on a text is counted, window by window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from emp_callbacks.folders.processors import architecture
from emp_callbacks.folders.text_calls import Text, TextCall, read_text, text_kind

__all__ = ["MASKED_SHARE", "Scored", "measure_of", "perplexity_of", "perplexity_windows"]

MASKED_SHARE = 0.15
"""Fraction of a window's tokens that is hidden from an encoder and scored (BERT, arXiv 1810.04805, section 3.1)."""

_DEFAULT_LENGTH = 2048
_NOT_SCORED = -100
_ROWS = 256  # of logits that are in float32 at a time: 256 x 150,000 words take 150 MB


@dataclass(frozen=True)
class Scored:
    """Windows of a text, and which tokens of each are scored.

    Attributes:
        inputs: As those of `Samples`.
        targets: For each window, the token that every position's logits are scored on; int64 of shape (T,), -100 where
            nothing is.
        kind: The measure: "perplexity" or "masked perplexity".
        notes: What a reader must know, a line each.
        unit: What a window is made of.
    """

    inputs: Sequence[Mapping[str, Tensor]] = field(repr=False)
    targets: Sequence[Tensor] = field(repr=False)
    kind: str
    notes: tuple[str, ...] = ()
    unit: str = "tokens"

    def loss(self, index: int, logits: Tensor) -> tuple[float, int]:
        """Return a window's summed negative log-likelihood in nats, and over how many tokens it is summed.

        Args:
            index: Of the window.
            logits: What the model answers, of shape (1, T, V), in any floating dtype. The softmax is taken in float32,
                of 256 positions at a time, and summed in float64.

        Raises:
            FloatingPointError: The loss is NaN or infinite.
            ValueError: The logits are not of the window's T positions.
        """
        targets = self.targets[index].to(logits.device)
        if logits.shape[:2] != (1, len(targets)):
            raise ValueError(
                f"window {index + 1} has {len(targets)} positions and the model answers logits of shape "
                f"{tuple(logits.shape)}; only a model that answers each position can be scored"
            )
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        places = (targets != _NOT_SCORED).nonzero()[:, 0]
        for some in torch.split(places, _ROWS):
            total += cross_entropy(logits[0, some].float(), targets[some], reduction="none").double().sum()
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"the loss on window {index + 1} of {len(self.targets)} is {total.item()}: the model's logits are no "
                "finite numbers there; try another dtype, or prune less"
            )
        return total.item(), len(places)


def perplexity_of(total_nll: float, tokens: int) -> float:
    """Return exp(mean negative log-likelihood), in 1 to infinity.

    Args:
        total_nll: Summed over all scored tokens, in nats.
        tokens: How many they are.

    Raises:
        ValueError: There are none.
    """
    if tokens < 1:
        raise ValueError("no token is scored, so there is no perplexity; give a longer text")
    return torch.tensor(total_nll / tokens, dtype=torch.float64).exp().item()


def perplexity_windows(
    folder: Path,
    config: Any,
    text: Path | Sequence[Path],
    *,
    length: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    held_out_tail: float = 0.0,
    seed: int = 0,
    tokenizer: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> Scored:
    """Return the windows of a text on which a language model is scored, each token at most once.

    A causal model: whole windows behind each other, all of each scored but its first token, and what is left at the end
    not scored, as GPTQ, Wanda and the EMP paper do. With a smaller `stride` windows overlap, only the last `stride`
    tokens of each are scored (of the first window all but the first token), and the text's end is scored too
    (https://huggingface.co/docs/transformers/perplexity). An encoder-decoder is scored on the second half of each
    window, given the first, and without what the tokenizer puts around it. An encoder with a masked head is scored on
    15 % of each window's tokens, drawn once from `seed` and all replaced by the mask token: a "masked perplexity",
    comparable only to itself.

    Args:
        folder: With the tokenizer's files.
        config: The model's, a transformers config.
        text: One file or several; `read_text` says how they are read.
        length: Tokens in a window, as in `text_samples`. Default: what the model takes, at most 2,048.
        stride: Tokens from the beginning of one window to that of the next. Default: no overlap.
        limit: Windows at most.
        held_out_tail: Score that fraction of the tokens only, at the end of the text; 0 stands for all of it.
        seed: Of the places of masks.
        tokenizer: Another folder to take the tokenizer from.
        progress: Called with the fraction of the text that is tokenised.

    Raises:
        ImportError: transformers is not installed.
        OSError: A file is missing.
        ValueError: The model has no head that says the next or the hidden token, a setting does not fit, or see
            `read_text`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 window, got {limit}")
    kind = measure_of(config)
    read = read_text(folder, config, text, tokenizer=tokenizer, progress=progress)
    if length is None:
        length = min(read.limit or _DEFAULT_LENGTH, _DEFAULT_LENGTH)
    length, notes = read.fitting(length)
    before, tail = read.cut(held_out_tail)
    ids = tail if held_out_tail else before
    room = read.call.room(length)
    if len(ids) < room:
        notes += (f"one window of all {len(ids)} tokens of the text instead of windows of {room}",)
    spans = _spans(len(ids), room, _checked_stride(stride, room, read))
    if limit is not None and limit < len(spans):
        notes += (f"the first {limit} of {len(spans)} windows",)
        spans = spans[:limit]
    elif rest := len(ids) - spans[-1][1]:
        notes += (f"the last {rest} tokens are less than a window and not scored",)
    windows = _windows(read, ids, spans, torch.Generator().manual_seed(seed))
    return Scored([inputs for inputs, _ in windows], [targets for _, targets in windows], kind, read.notes + notes)


def measure_of(config: Any) -> str:
    """Return what a model's losses on a text add up to.

    Raises:
        ValueError: It says no tokens.
    """
    from transformers.models.auto import modeling_auto as known

    name, kind = architecture(config), text_kind(config)
    if kind == "encoder" and name.endswith("ForMaskedLM"):
        return "masked perplexity"
    heads = {
        "causal": {*known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
        | {*known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()},
        "encoder": set(),
        "encoder-decoder": {*known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()},
    }[kind]
    # XLNet sees what it should say, unless it is called with a permutation.
    if name not in heads or config.model_type == "xlnet":
        raise ValueError(
            f"a {name} has no head that says the next token or a hidden one, so it has no perplexity; give a folder of "
            "a causal, encoder-decoder or masked language model"
        )
    return "perplexity"


def _checked_stride(stride: int | None, room: int, read: Text) -> int:
    if stride is None:
        return room
    if read.call.kind != "causal":
        raise ValueError(f"stride={stride} is for causal models, whose windows can overlap; leave it out")
    if not 1 <= stride <= room:
        raise ValueError(
            f"stride must be 1 to {room}, the length of a window, so that no token is missed; got {stride}"
        )
    return stride


def _spans(count: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Return where windows begin and end: whole ones behind each other, or overlapping ones up to the end.

    A text that is shorter than a window is one.

    Raises:
        ValueError: The text is too short to score a token.
    """
    if count < 2:
        raise ValueError(f"the text has {count} tokens to score, and one needs another before it; give a longer text")
    last = max(count - room, 0) + (1 if stride == room else stride)
    return [(begin, min(begin + room, count)) for begin in range(0, last, stride)]


def _windows(
    read: Text, ids: Tensor, spans: Sequence[tuple[int, int]], draws: torch.Generator
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Return each window's keyword arguments, and the token that each position is scored on."""
    if read.call.kind == "encoder":
        return [_masked(read.call, ids[begin:end], draws) for begin, end in spans]
    if read.call.kind == "encoder-decoder":
        return [_taught(read.call, ids[begin:end]) for begin, end in spans]
    windows, scored = [], len(read.call.prefix)
    for begin, end in spans:
        # The logits of a position are of the token behind it.
        targets = ids.new_full((end - begin,), _NOT_SCORED)
        known = max(scored, begin + 1)
        targets[known - begin - 1 : -1] = ids[known:end]
        windows.append((read.call(ids[begin:end]), targets))
        scored = end
    return windows


def _masked(call: TextCall, ids: Tensor, draws: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    if call.mask is None:
        raise ValueError(
            "the tokenizer has no mask token to hide others with; give the model's own: --tokenizer FOLDER"
        )
    hidden = torch.randperm(len(ids), generator=draws)[: max(1, round(MASKED_SHARE * len(ids)))]
    targets = ids.new_full((len(call.prefix) + len(ids) + len(call.suffix),), _NOT_SCORED)
    targets[len(call.prefix) + hidden] = ids[hidden]
    return call(ids.index_fill(0, hidden, call.mask)), targets


def _taught(call: TextCall, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    _, taught = call.halves(ids)
    return call(ids), torch.cat([ids.new_full((len(call.prefix),), _NOT_SCORED), taught])
