"""Tasks of the studies as LightningModules: image classification with timm, language modelling with GPT-2."""

import difflib
import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from emp_callbacks.distillation import Distillation
from emp_callbacks.extras import needs
from emp_callbacks.study.recipe import networks  # noqa: F401  (timm then knows emp_fc2, emp_kan, ...)
from emp_callbacks.study.recipe.distilled import DistilledTask, check_teacher

Batch = tuple[Tensor, Tensor]


class ImageClassification(DistilledTask):
    """A timm model with cross entropy; logs `loss` and `accuracy` (fraction of correct images).

    Args:
        model: Name in timm, such as resnet10t.
        model_args: Further arguments of the timm model, such as {img_size: 8}.
        num_classes: Number of classes.
        in_chans: Channels of the images.
        lr: Highest learning rate; it rises linearly and then falls to 0 along a cosine.
        weight_decay: Applied to matrices and kernels, never to biases and norms.
        optimizer: adamw or sgd.
        momentum: Momentum of sgd.
        warmup_fraction: Part of the optimizer steps in which the learning rate rises, in [0, 1).
        lr_restarts: Parts of the optimizer steps, in (0, 1) and increasing, after which the learning rate rises and
            falls anew, each time over the steps up to the next one: see `warm_restarts`. None: once.
        pretrained: Load timm's weights (needs a network).
        distill: Learn from a dense model as well, see `Distillation`: {teacher: dense.ckpt, temperature: 2.0}. A
            teacher of null is the model as the fit begins, of pretrained weights. None: no.

    Raises:
        ValueError: Unknown timm name (suggests the nearest), optimizer, or a bad warmup_fraction or lr_restarts.
    """

    def __init__(
        self,
        model: str = "vit_tiny_patch16_224",
        model_args: dict[str, Any] | None = None,
        num_classes: int = 10,
        in_chans: int = 1,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        optimizer: str = "adamw",
        momentum: float = 0.9,
        warmup_fraction: float = 0.1,
        pretrained: bool = False,
        lr_restarts: list[float] | None = None,
        distill: Distillation | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["distill"])
        check_teacher(distill, pretrained)
        self.distill = distill
        _check_optimization(optimizer, warmup_fraction, lr_restarts)
        if not timm.is_model(model):
            near = difflib.get_close_matches(model, timm.list_models(), n=5, cutoff=0.4)
            raise ValueError(f"unknown timm model {model!r}; nearest names: {', '.join(near) or 'none'}")
        settings = {**(model_args or {}), "num_classes": num_classes, "in_chans": in_chans}
        self.model = timm.create_model(model, pretrained=pretrained, **settings)
        self.optimizer_name, self.momentum = optimizer, momentum
        self.lr, self.weight_decay = lr, weight_decay
        self.warmup_fraction, self.lr_restarts = warmup_fraction, lr_restarts
        # micro: the plain fraction of correct images; torchmetrics' default averages over classes.
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, in_chans, H, W)."""
        return self.logits_of(self.model, images)

    def logits_of(self, model: nn.Module, inputs: Tensor) -> Tensor:
        logits: Tensor = model(inputs)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        images, labels = batch
        logits = self(images)
        return self.training_loss(functional.cross_entropy(logits, labels), logits, images)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        self._evaluate("val", batch, self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        self._evaluate("test", batch, self.test_accuracy)

    def _evaluate(self, part: str, batch: Batch, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        loss = functional.cross_entropy(logits, labels)
        self.log(f"{part}/loss", loss, batch_size=len(labels), sync_dist=True)
        self.log(f"{part}/accuracy", accuracy, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = decay_groups(self.model, self.weight_decay)
        optimizer: torch.optim.Optimizer
        if self.optimizer_name == "sgd":
            optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        else:
            optimizer = torch.optim.AdamW(groups, lr=self.lr)
        return _with_schedule(self, optimizer, self.warmup_fraction, self.lr_restarts or ())


class LanguageModel(DistilledTask):
    """A GPT-2 with next-token cross entropy; logs `loss` (nats per token) and `perplexity`.

    Args:
        n_layer: Blocks.
        n_head: Attention heads of a block.
        n_embd: Width; a multiple of n_head.
        sequence_length: Longest input, in tokens.
        vocab_size: Size of the data's vocabulary (bytes: 256).
        dropout: Dropout of embeddings, attention and residuals.
        lr: Highest learning rate; it rises linearly and then falls to 0 along a cosine.
        weight_decay: Applied to matrices, never to biases and norms.
        warmup_fraction: Part of the optimizer steps in which the learning rate rises, in [0, 1).
        lr_restarts: Parts of the optimizer steps, in (0, 1) and increasing, after which the learning rate rises and
            falls anew, each time over the steps up to the next one: see `warm_restarts`. None: once.
        pretrained: A Hugging Face name or folder such as gpt2 (needs a network, and data made of that model's
            tokens); its sizes then replace n_layer, n_head, n_embd and dropout.
        distill: Learn from a dense model as well, see `ImageClassification`.

    Raises:
        ValueError: The vocabularies or lengths of model and data do not fit, or a bad warmup_fraction or lr_restarts.
    """

    def __init__(
        self,
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 128,
        sequence_length: int = 128,
        vocab_size: int = 256,
        dropout: float = 0.0,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_fraction: float = 0.1,
        pretrained: str | None = None,
        lr_restarts: list[float] | None = None,
        distill: Distillation | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["distill"])
        check_teacher(distill, pretrained)
        self.distill = distill
        _check_optimization("adamw", warmup_fraction, lr_restarts)
        sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_positions": sequence_length}
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        self.model = _gpt2(pretrained, {"vocab_size": vocab_size, **sizes, **dropouts})
        self.lr, self.weight_decay = lr, weight_decay
        self.warmup_fraction, self.lr_restarts = warmup_fraction, lr_restarts
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Compare the model with the data module's `vocab_size` and `sequence_length`, where it has them."""
        data = getattr(self.trainer, "datamodule", None)
        vocab_size = getattr(data, "vocab_size", self.hparams["vocab_size"])
        length = getattr(data, "sequence_length", self.hparams["sequence_length"])
        _check_fit(self.model.config, vocab_size, length)

    def configure_model(self) -> None:
        """Shard each block and then the rest where the trainer's strategy is ModelParallelStrategy (FSDP2)."""
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for block in self.model.get_submodule("transformer.h").children():
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, T, vocab_size) of tokens (B, T)."""
        return self.logits_of(self.model, tokens)

    def logits_of(self, model: nn.Module, inputs: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=inputs, use_cache=False).logits
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        return self.training_loss(*self._loss(batch), batch[0])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        self._evaluate("val", batch, self.val_perplexity)

    def test_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        self._evaluate("test", batch, self.test_perplexity)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens, targets = batch
        logits = self(tokens)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits

    def _evaluate(self, part: str, batch: Batch, perplexity: Perplexity) -> None:
        loss, logits = self._loss(batch)
        perplexity.update(logits, batch[1])
        self.log(f"{part}/loss", loss, batch_size=len(logits), sync_dist=True)
        self.log(f"{part}/perplexity", perplexity, prog_bar=True, batch_size=len(logits))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = decay_groups(self.model, self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))
        return _with_schedule(self, optimizer, self.warmup_fraction, self.lr_restarts or ())


def _gpt2(pretrained: str | None, settings: dict[str, Any]) -> nn.Module:
    needs("the GPT-2 architecture of LanguageModel", "hf", "transformers")
    from transformers import GPT2Config, GPT2LMHeadModel  # seconds to import: not for image tasks

    if pretrained is None:
        return GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, **settings))
    model = GPT2LMHeadModel.from_pretrained(pretrained)
    _check_fit(model.config, settings["vocab_size"], settings["n_positions"])
    return model


def _check_fit(config: Any, vocab_size: int, sequence_length: int) -> None:
    # A byte is a valid index of a larger vocabulary, but means another token there: only equality fits.
    if config.vocab_size != vocab_size:
        raise ValueError(
            f"the model's vocabulary has {config.vocab_size} tokens, the data's {vocab_size}: set vocab_size "
            f"to the data's (bytes: 256); a pretrained model needs text encoded with its own tokenizer"
        )
    if config.n_positions < sequence_length:
        raise ValueError(
            f"the data's sequence_length={sequence_length} is longer than the model's {config.n_positions} "
            f"positions; set both to the same length"
        )


def _check_optimization(optimizer: str, warmup_fraction: float, restarts: Sequence[float] | None) -> None:
    if optimizer not in ("adamw", "sgd"):
        raise ValueError(f"optimizer must be adamw or sgd, got {optimizer!r}")
    if not 0 <= warmup_fraction < 1:
        raise ValueError(f"warmup_fraction must lie in [0, 1), got {warmup_fraction}")
    if not all(before < after for before, after in pairwise([0, *(restarts or ()), 1])):
        raise ValueError(f"lr_restarts must be increasing parts of the training in (0, 1), got {restarts}")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: weights with decay; biases, norms and other 1-D parameters without."""
    params = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [param for param in params if param.ndim > 1], "weight_decay": weight_decay},
        {"params": [param for param in params if param.ndim <= 1], "weight_decay": 0.0},
    ]


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Return the factor on the learning rate, in [0, 1]: linear for `warmup` steps, then a cosine to `total`.

    Example:
        >>> [round(warmup_cosine(step, total=6, warmup=2), 2) for step in range(7)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def warm_restarts(step: int, starts: Sequence[int], total: int, warmup_fraction: float) -> float:
    """Return the factor on the learning rate, in [0, 1], of a schedule that begins anew at each of `starts`.

    Each segment, up to the next start or to `total`, is a `warmup_cosine` over its own length: SGDR (Loshchilov and
    Hutter, arXiv:1608.03983, eq. 5 with a lowest rate of 0), with a warm-up in front of each cosine. With a restart
    where the network is pruned, what follows is trained from the highest rate down to 0: the idea of learning-rate
    rewinding (Renda et al., arXiv:2003.02389), which goes back to an earlier point of one schedule instead.

    Args:
        step: Optimizer steps done, >= 0.
        starts: First step of each segment, increasing; starts[0] is 0.
        total: Steps of the training, more than starts[-1].
        warmup_fraction: Part of each segment in which the rate rises, in [0, 1).

    Example:
        >>> [round(warm_restarts(step, [0, 4], total=6, warmup_fraction=0.0), 2) for step in range(7)]
        [1.0, 0.85, 0.5, 0.15, 1.0, 0.5, 0.0]
    """
    segment = bisect_right(starts, step)
    start, end = starts[segment - 1], [*starts, total][segment]
    return warmup_cosine(step - start, end - start, int(warmup_fraction * (end - start)))


def _with_schedule(
    task: pl.LightningModule, optimizer: torch.optim.Optimizer, warmup_fraction: float, restarts: Sequence[float]
) -> OptimizerLRScheduler:
    if task.trainer.estimated_stepping_batches == math.inf:
        raise ValueError("the cosine schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    total = int(task.trainer.estimated_stepping_batches)
    starts = [0, *(round(restart * total) for restart in restarts)]
    if not all(before < after for before, after in pairwise([*starts, total])):
        raise ValueError(
            f"lr_restarts {list(restarts)} are the optimizer steps {starts[1:]} of {total}: each must lie in the "
            "training and differ from the others; move them apart, or train for more steps"
        )
    factor = partial(warm_restarts, starts=starts, total=total, warmup_fraction=warmup_fraction)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
