"""A trained language model with everything that all arms of a study share: scores, batches, texts, the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from emp_callbacks.config import EMPConfig
from emp_callbacks.cost.training_loss import training_loss
from emp_callbacks.study.once.dense_models import DenseModel
from emp_callbacks.study.recipe.optimization import warmup_cosine
from emp_callbacks.targets.heads import attention_heads

__all__ = ["Bench", "Heads", "bench_of"]

Heads = Mapping[str, Tensor]
"""Attention -> a number for each of its heads, shape (heads,)."""

_TOGETHER = 4  # batches that are evaluated at once: fewer calls, and the same mean


class Bench:
    """What all arms of one model share.

    Args:
        dense: The trained model.
        settings: Of the study.
        batches: Those that follow the model's own training, for all arms alike.
        step_context: Around each training step, such as autocast.
    """

    def __init__(
        self,
        dense: DenseModel,
        settings: Mapping[str, Any],
        batches: Sequence[Any],
        step_context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.dense, self.settings, self.batches = dense, settings, batches
        self._step_context = step_context
        self.module: Any = dense.training.model
        self.heads = {target.name: target.units for target in attention_heads(self.module)}
        self.n = sum(self.heads.values())
        trainer = dense.training.trainer
        data = dense.training.data
        self.texts = {
            "val": self._text(data.val_dataloader(), trainer.limit_val_batches),
            "test": self._text(data.test_dataloader(), trainer.limit_test_batches),
        }
        pruner = dense.pruner(_emp_taylor(settings["evidence_batches"]))
        self.scores: Heads = {name: values.double().cpu() for name, values in pruner.scores().items()}
        (event,) = pruner.refresh()
        pruner.finalize()
        self.n_eff, self.emp_keep = event.n_eff, event.keep

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return a number per head, shape (n,), by attention."""
        return dict(zip(self.heads, torch.split(flat, list(self.heads.values())), strict=True))

    def flat(self, heads: Heads) -> Tensor:
        """Return the numbers of all heads in the model's order, shape (n,), float64; 0 where an attention has none."""
        return torch.cat([
            heads[name].detach().double().cpu() if name in heads else torch.zeros(count).double()
            for name, count in self.heads.items()
        ])  # fmt: skip

    def highest(self, scores: Heads, keep: int) -> dict[str, Tensor]:
        """Return the mask of the `keep` highest scores of all heads, bool, by attention."""
        mask = torch.zeros(self.n, dtype=torch.bool)
        mask[self.flat(scores).topk(keep).indices] = True
        return self.split(mask)

    def reset(self) -> None:
        """Let the model be the trained one again, on its way to be trained on."""
        self.module.load_state_dict(self.dense.weights)
        torch.manual_seed(self.dense.seed)
        self.module.train()

    def optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of every arm: that of the recipe."""
        made: torch.optim.Optimizer = self.module.make_optimizer()
        return made

    def train(self, optimizer: torch.optim.Optimizer, after_step: Callable[[int], None]) -> None:
        """Train on all batches; `after_step` is called with the number of steps done after each."""
        highest, steps = self.module.lr * self.settings["lr_share"], len(self.batches)
        clip = self.dense.training.trainer.gradient_clip_val
        for index, batch in enumerate(self.batches):
            for group in optimizer.param_groups:
                group["lr"] = highest * warmup_cosine(index, steps, steps // 20)
            with self._step_context():
                loss = training_loss(self.module, batch, index)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if clip:
                torch.nn.utils.clip_grad_norm_(self.module.parameters(), clip)
            optimizer.step()
            after_step(index + 1)

    def loss(self, part: str, most: int | None = None) -> float:
        """Return the mean next-token loss of the model as it is, in nats per token, of "val" or "test".

        Args:
            part: Which text.
            most: Read only so many batches of it.
        """
        text = self.texts[part] if most is None else self.texts[part][: -(-most // _TOGETHER)]
        return float(torch.cat([nll.flatten() for nll in self.token_losses(text)]).mean())

    def token_losses(self, text: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """Yield the loss of every token, in nats, shape (B, T), float64, of each batch of a text."""
        was, _ = self.module.training, self.module.eval()
        with torch.no_grad():
            for tokens, targets in text:
                with self._step_context():
                    logits = self.module(tokens)
                nll = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
                yield nll.double().view(targets.shape)
        self.module.train(was)

    def _text(self, loader: DataLoader[Any], limit: float) -> list[tuple[Tensor, Tensor]]:
        """Return the batches of a loader that the trainer would evaluate, some of them together."""
        count = limit if isinstance(limit, int) else int(len(loader) * limit)
        device = self.module.device
        found = [tuple(part.to(device) for part in batch) for batch in islice(loader, count)]
        together = [found[start : start + _TOGETHER] for start in range(0, len(found), _TOGETHER)]
        return [(torch.cat([b[0] for b in some]), torch.cat([b[1] for b in some])) for some in together]


def _emp_taylor(batches: int) -> EMPConfig:
    return EMPConfig(
        target="heads", criterion="taylor", scope="global", evidence_steps=batches, min_units=0, observe_only=True
    )


@contextmanager
def bench_of(dense: DenseModel, settings: Mapping[str, Any]) -> Iterator[Bench]:
    """Lend what all arms of a model share, on the batches that follow those of its own training.

    Raises:
        ValueError: One epoch has too few batches for both trainings.
    """
    before, steps = dense.training.trainer.max_steps, settings["steps"]
    with dense.training.batches(before + steps) as (lent, step_context):
        batches = list(islice(lent, before, None))
        if len(batches) < steps:
            raise ValueError(
                f"the text has {before + len(batches)} training batches, and the model takes {before} and each arm "
                f"{steps} that follow: use more text (data.max_bytes, data.file), or shorter trainings"
            )
        yield Bench(dense, settings, batches, step_context)
