"""Tasks of recipes as LightningModules: image classification with timm, language modelling with transformers."""

import difflib
from functools import partial
from typing import Any

import timm
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from emp_callbacks.distillation import Distillation
from emp_callbacks.extras import needs
from emp_callbacks.study.recipe import networks  # noqa: F401  (timm then knows emp_fc2, emp_kan, ...)
from emp_callbacks.study.recipe.distilled import DistilledTask, check_teacher
from emp_callbacks.study.recipe.optimization import check_optimization, decay_groups, with_schedule

Batch = tuple[Tensor, Tensor]

_VOCABULARY_MULTIPLE = 64


class ImageClassification(DistilledTask):
    """A timm model with cross entropy; logs `loss` and `accuracy` (fraction of correct images).

    Targets are classes (B,), or in training also probabilities (B, num_classes), as mixup makes them.

    Args:
        model: Name in timm, such as resnet10t.
        model_args: Further arguments of the timm model, such as {img_size: 8}.
        num_classes: Number of classes.
        in_chans: Channels of the images.
        lr: Highest learning rate; it rises linearly and then falls along a cosine.
        weight_decay: Applied to matrices and kernels, never to biases and norms.
        optimizer: adamw or sgd.
        momentum: Momentum of sgd.
        warmup_fraction: Part of the optimizer steps in which the learning rate rises, in [0, 1).
        lr_restarts: Parts of the optimizer steps, in (0, 1) and increasing, after which the learning rate rises and
            falls anew, each time over the steps up to the next one: see `warm_restarts`. None: once.
        final_lr_fraction: The learning rate falls to this part of lr, in [0, 1).
        pretrained: Load timm's weights (needs a network).
        label_smoothing: Part of each training target, in [0, 1), that is spread over all classes.
        distill: Learn from a dense model as well, see `Distillation`: {teacher: dense.ckpt, temperature: 2.0}. A
            teacher of null is the model as the fit begins, of pretrained weights. None: no.

    Raises:
        ValueError: Unknown timm name (suggests the nearest), optimizer, or a bad warmup_fraction,
            lr_restarts or final_lr_fraction.
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
        label_smoothing: float = 0.0,
        lr_restarts: list[float] | None = None,
        final_lr_fraction: float = 0.0,
        distill: Distillation | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["distill"])
        check_teacher(distill, pretrained)
        self.distill = distill
        check_optimization(optimizer, warmup_fraction, lr_restarts, final_lr_fraction)
        if not timm.is_model(model):
            near = difflib.get_close_matches(model, timm.list_models(), n=5, cutoff=0.4)
            raise ValueError(f"unknown timm model {model!r}; nearest names: {', '.join(near) or 'none'}")
        settings = {**(model_args or {}), "num_classes": num_classes, "in_chans": in_chans}
        self.model = timm.create_model(model, pretrained=pretrained, **settings)
        self.optimizer_name, self.momentum, self.label_smoothing = optimizer, momentum, label_smoothing
        self.lr, self.weight_decay = lr, weight_decay
        self.warmup_fraction, self.lr_restarts = warmup_fraction, lr_restarts
        self.final_lr_fraction = final_lr_fraction
        # micro: the plain fraction of correct images; torchmetrics' default averages over classes.
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, in_chans, H, W)."""
        return self.logits_of(self.model, images)

    def logits_of(self, model: nn.Module, inputs: Tensor) -> Tensor:
        logits: Tensor = model(inputs)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        images, labels = batch
        logits = self(images)
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return self.training_loss(loss, logits, images)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        self._evaluate("val", batch, self.val_loss, self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        self._evaluate("test", batch, self.test_loss, self.test_accuracy)

    def _evaluate(self, part: str, batch: Batch, mean_loss: MeanMetric, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        # Lightning's own mean over ranks is inexact where one of them has fewer images.
        mean_loss.update(functional.cross_entropy(logits, labels), weight=len(labels))
        self.log(f"{part}/loss", mean_loss, batch_size=len(labels))
        self.log(f"{part}/accuracy", accuracy, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = decay_groups(self.model, self.weight_decay)
        optimizer: torch.optim.Optimizer
        if self.optimizer_name == "sgd":
            optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        else:
            optimizer = torch.optim.AdamW(groups, lr=self.lr)
        return with_schedule(self, optimizer, self.warmup_fraction, self.lr_restarts or (), self.final_lr_fraction)


class LanguageModel(DistilledTask):
    """A causal Transformer with next-token cross entropy; logs `loss` (nats per token) and `perplexity`.

    Args:
        n_layer: Blocks.
        n_head: Attention heads of a block.
        n_embd: Width; a multiple of n_head.
        sequence_length: Longest input, in tokens.
        vocab_size: Size of the data's vocabulary (bytes: 256), or that rounded up to a multiple of 64.
        architecture: transformers' name of the architecture, such as gpt2 or llama.
        model_args: Further settings of the architecture's configuration, such as {num_key_value_heads: 4}.
        dropout: Dropout of embeddings, attention and residuals of GPT-2.
        gradient_checkpointing: Compute each block's activations again in backward instead of keeping them.
        lr: Highest learning rate; it rises linearly and then falls along a cosine.
        weight_decay: Applied to matrices, never to biases and norms.
        warmup_fraction: Part of the optimizer steps in which the learning rate rises, in [0, 1).
        lr_restarts: Parts of the optimizer steps, in (0, 1) and increasing, after which the learning rate rises and
            falls anew, each time over the steps up to the next one: see `warm_restarts`. None: once.
        final_lr_fraction: The learning rate falls to this part of lr, in [0, 1).
        pretrained: A Hugging Face name or folder such as gpt2 (needs a network, and data made of that model's
            tokens); its sizes then replace those given here.
        distill: Learn from a dense model as well, see `ImageClassification`.

    Raises:
        ValueError: The architecture is unknown, vocabularies or lengths of model and data do not fit, or a bad
            warmup_fraction, lr_restarts or final_lr_fraction.
    """

    def __init__(
        self,
        n_layer: int = 4,
        n_head: int = 4,
        n_embd: int = 128,
        sequence_length: int = 128,
        vocab_size: int = 256,
        dropout: float = 0.0,
        architecture: str = "gpt2",
        model_args: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_fraction: float = 0.1,
        pretrained: str | None = None,
        lr_restarts: list[float] | None = None,
        final_lr_fraction: float = 0.0,
        distill: Distillation | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["distill"])
        check_teacher(distill, pretrained)
        self.distill = distill
        check_optimization("adamw", warmup_fraction, lr_restarts, final_lr_fraction)
        sizes = {
            "vocab_size": vocab_size,
            "num_hidden_layers": n_layer,
            "num_attention_heads": n_head,
            "hidden_size": n_embd,
            "max_position_embeddings": sequence_length,
        }
        further = {**_dropouts(architecture, dropout), **(model_args or {})}
        network = _network(pretrained, architecture, {**sizes, **further})
        if gradient_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = network
        self.lr, self.weight_decay = lr, weight_decay
        self.warmup_fraction, self.lr_restarts = warmup_fraction, lr_restarts
        self.final_lr_fraction = final_lr_fraction
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Compare the model with the data module's `vocab_size` and `sequence_length`, where it has them."""
        data = getattr(self.trainer, "datamodule", None)
        vocab_size = getattr(data, "vocab_size", self.hparams["vocab_size"])
        length = getattr(data, "sequence_length", self.hparams["sequence_length"])
        _check_fit(self.model.config, vocab_size, length, padded=not self.hparams["pretrained"])

    def configure_model(self) -> None:
        """Shard each block and then the rest where the trainer's strategy is ModelParallelStrategy (FSDP2)."""
        if self.device_mesh is None:
            return
        shard = partial(
            fully_shard, mesh=self.device_mesh["data_parallel"], mp_policy=_sharding_policy(self.trainer.precision)
        )
        blocks: Any = self.model._no_split_modules  # names of classes
        for module in self.model.modules():
            if type(module).__name__ in blocks:
                shard(module)
        shard(self.model)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, T, vocab_size) of tokens (B, T)."""
        return self.logits_of(self.model, tokens)

    def logits_of(self, model: nn.Module, inputs: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=inputs, use_cache=False).logits
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        return self.training_loss(*self._loss(batch), batch[0])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        self._evaluate("val", batch, self.val_loss, self.val_perplexity)

    def test_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        self._evaluate("test", batch, self.test_loss, self.test_perplexity)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens, targets = batch
        logits = self(tokens)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits

    def _evaluate(self, part: str, batch: Batch, mean_loss: MeanMetric, perplexity: Perplexity) -> None:
        loss, logits = self._loss(batch)
        perplexity.update(logits.float(), batch[1])  # a probability of bfloat16 has three digits
        mean_loss.update(loss, weight=len(logits))
        self.log(f"{part}/loss", mean_loss, batch_size=len(logits))
        self.log(f"{part}/perplexity", perplexity, prog_bar=True, batch_size=len(logits))

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return an optimizer of the model, at its highest learning rate."""
        groups = decay_groups(self.model, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return with_schedule(
            self, self.make_optimizer(), self.warmup_fraction, self.lr_restarts or (), self.final_lr_fraction
        )


def _network(pretrained: str | None, architecture: str, settings: dict[str, Any]) -> Any:
    needs("the Transformers of LanguageModel", "hf", "transformers")
    from transformers import AutoConfig, AutoModelForCausalLM  # seconds to import: not for image tasks
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if pretrained is not None:
        model: Any = AutoModelForCausalLM.from_pretrained(pretrained)
        model.float()  # a folder may hold bfloat16
        _check_fit(model.config, settings["vocab_size"], settings["max_position_embeddings"], padded=False)
        return model
    if architecture not in CONFIG_MAPPING:
        near = difflib.get_close_matches(architecture, CONFIG_MAPPING.keys(), n=5, cutoff=0.4)
        raise ValueError(f"unknown architecture {architecture!r}; nearest names: {', '.join(near) or 'none'}")
    config = AutoConfig.for_model(architecture, bos_token_id=None, eos_token_id=None, **settings)
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def _dropouts(architecture: str, dropout: float) -> dict[str, float]:
    if architecture == "gpt2":
        return dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    if dropout:
        raise ValueError(f"dropout={dropout} is of gpt2: give {architecture}'s own names in model_args, and dropout 0")
    return {}


def _check_fit(config: Any, vocab_size: int, sequence_length: int, *, padded: bool) -> None:
    # A byte is a valid index of a larger vocabulary, but means another token there: only equality fits. A vocabulary
    # that was rounded up for the sake of matrix units has entries that no text holds, and is the same otherwise.
    fitting = {vocab_size, -(-vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE if padded else vocab_size}
    if config.vocab_size not in fitting:
        raise ValueError(
            f"the model's vocabulary has {config.vocab_size} tokens, the data's {vocab_size}: set vocab_size "
            f"to the data's (bytes: 256); a pretrained model needs text encoded with its own tokenizer"
        )
    if config.max_position_embeddings < sequence_length:
        raise ValueError(
            f"the data's sequence_length={sequence_length} is longer than the model's {config.max_position_embeddings} "
            f"positions; set both to the same length"
        )


def _sharding_policy(precision: str | int | None) -> MixedPrecisionPolicy:
    """Return in which precision FSDP2 gathers weights: half of the bytes where the forward pass is in bfloat16."""
    if precision == "bf16-mixed":
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()
