"""What a recipe's trainer section asks for: how many ranks, and what each of them will hold. Nothing is built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import strategies

from emp_callbacks.pruning.traffic import Held
from emp_callbacks.study.recipe.strategies import FSDP2Strategy

__all__ = ["Strategy", "strategy_of"]

Kind = Literal["one process", "DDP", "FSDP1", "FSDP2", "ZeRO"]

_LOW = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a training is spread over processes.

    Attributes:
        kind: What holds the model.
        stage: Of ZeRO, 0 to 3; else 0.
        nodes: Machines.
        devices: Ranks of each machine.
        shards: Ranks among which what is divided is divided; 1: each holds everything.
        batches: Ranks that see batches of their own; others see those of a neighbour (tensor parallelism).
        precision: As the recipe says it, such as "bf16-mixed".
        accelerator: Whether the ranks compute on accelerators.
        offloads: Whether what the optimizer holds lies in the host's memory.
        bucketed: Whether DDP holds the gradients once more, in its buckets.
    """

    kind: Kind
    stage: int = 0
    nodes: int = 1
    devices: int = 1
    shards: int = 1
    batches: int = 1
    precision: str = "32-true"
    accelerator: bool = False
    offloads: bool = False
    bucketed: bool = False

    @property
    def ranks(self) -> int:
        """All processes."""
        return self.nodes * self.devices

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the weights that forward reads, where they stay between two steps."""
        name, _, how = self.precision.partition("-")
        low = how == "true" or self.kind == "ZeRO"
        return _LOW.get(name, torch.float32) if low else torch.float32

    @property
    def owner_dtype(self) -> torch.dtype:
        """Of what the optimizer updates, and so of scores, masks and dense values: ZeRO has masters in float32."""
        return torch.float32 if self.kind == "ZeRO" else self.weight_dtype

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer updates copies of the weights."""
        return self.kind == "ZeRO" and (self.stage > 0 or self.weight_dtype != torch.float32)

    @property
    def divides(self) -> dict[str, int]:
        """By how many ranks each kind of memory is divided: weights, gradients, optimizer (and masks with it)."""
        least = {"weights": 3, "gradients": 2, "optimizer": 1}  # ZeRO's stage from which on it is
        return {what: self.shards if self.kind != "ZeRO" or self.stage >= stage else 1 for what, stage in least.items()}

    @property
    def held(self) -> Held:
        """What a rank holds of a weight that the optimizer updates."""
        if self.divides["optimizer"] == 1:
            return "whole"
        return "slices" if self.kind == "FSDP2" else "runs"

    @property
    def told(self) -> str:
        """The strategy in words."""
        name = f"ZeRO-{self.stage}" if self.kind == "ZeRO" else self.kind
        where = f"{self.nodes} nodes of {self.devices}" if self.nodes > 1 else f"{self.devices}"
        device = "accelerator" if self.accelerator else "CPU process"
        return f"{name} on {where} x {device}, {self.precision}"


def strategy_of(trainer: Mapping[str, Any], problems: list[str]) -> Strategy:
    """Return what a parsed trainer section asks for; what is wrong with it is appended to `problems`."""
    kind, settings = _class_of(trainer.get("strategy") or "auto")
    accelerator = _on_accelerator(str(trainer.get("accelerator") or "auto"))
    common: dict[str, Any] = {
        "nodes": int(trainer.get("num_nodes") or 1),
        "devices": _devices(trainer.get("devices"), accelerator),
        "accelerator": accelerator,
        "precision": _precision(trainer.get("precision")),
    }
    ranks = common["nodes"] * common["devices"]
    if issubclass(kind, strategies.DeepSpeedStrategy):
        return _zero(settings, ranks, common, problems)
    if issubclass(kind, strategies.ModelParallelStrategy):
        if issubclass(kind, FSDP2Strategy):
            settings = {"data_parallel_size": ranks, "tensor_parallel_size": 1}
        return _fsdp2(settings, common, problems)
    if issubclass(kind, strategies.FSDPStrategy):
        how = str(settings.get("sharding_strategy") or "FULL_SHARD").rpartition(".")[2]
        shards = 1 if how == "NO_SHARD" else common["devices"] if "HYBRID" in how else ranks
        return Strategy(
            kind="FSDP1", shards=shards, batches=ranks, offloads=bool(settings.get("cpu_offload")), **common
        )
    if ranks > 1:
        return Strategy(kind="DDP", batches=ranks, bucketed=not settings.get("gradient_as_bucket_view"), **common)
    return Strategy(kind="one process", **common)


def _class_of(given: Any) -> tuple[type, dict[str, Any]]:
    """Return the class of a strategy, and its settings; of what the recipe leaves to Lightning, one that holds all."""
    if isinstance(given, str):
        known = dict(strategies.StrategyRegistry).get(given, {})  # the registry's own `get` would make one
        return known.get("strategy", strategies.SingleDeviceStrategy), dict(known.get("init_params", {}))
    module, _, name = str(given["class_path"]).rpartition(".")
    settings = {**(given.get("init_args") or {}), **(given.get("dict_kwargs") or {})}
    return getattr(import_module(module), name), settings


def _zero(settings: Mapping[str, Any], ranks: int, common: Mapping[str, Any], problems: list[str]) -> Strategy:
    given = settings.get("config")
    if isinstance(given, str):
        given = _read_json(Path(given), problems)
    stage, offloads = int(settings.get("stage", 2)), bool(settings.get("offload_optimizer"))
    if isinstance(given, Mapping):  # DeepSpeed's own configuration replaces Lightning's settings
        zero = given.get("zero_optimization") or {}
        stage = int(zero.get("stage", 0))
        offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    shards = ranks if stage else 1
    return Strategy(kind="ZeRO", stage=stage, shards=shards, batches=ranks, offloads=offloads, **common)


def _read_json(file: Path, problems: list[str]) -> Any:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        problems.append(f"DeepSpeed's configuration {file}: {error.strerror}")
    except ValueError as error:
        problems.append(f"DeepSpeed's configuration {file} is no JSON: {error}")
    return None


def _fsdp2(settings: Mapping[str, Any], common: Mapping[str, Any], problems: list[str]) -> Strategy:
    nodes, devices = common["nodes"], common["devices"]
    asked = {"data": settings.get("data_parallel_size", "auto"), "tensor": settings.get("tensor_parallel_size", "auto")}
    data = nodes if asked["data"] == "auto" else int(asked["data"])
    tensor = devices if asked["tensor"] == "auto" else int(asked["tensor"])
    if data * tensor != nodes * devices:
        problems.append(
            f"ModelParallelStrategy: data_parallel_size {data} x tensor_parallel_size {tensor} is not the number of "
            f"ranks, {nodes * devices}: change one of them, trainer.devices or trainer.num_nodes"
        )
    if tensor > 1 and "auto" in asked.values():
        problems.append(
            f"ModelParallelStrategy: tensor_parallel_size is {tensor} by default, all ranks of a node, so that only "
            f"{data} of {nodes * devices} ranks would see batches of their own: give both sizes for a model that is "
            f"tensor parallel, else use {FSDP2Strategy.__module__}.{FSDP2Strategy.__name__}"
        )
    return Strategy(kind="FSDP2", shards=data, batches=data, **common)


def _devices(given: Any, accelerator: bool) -> int:
    """Return the ranks of a node; "auto" and -1 are those that are here."""
    if given in (None, "auto", -1, "-1"):
        return max(1, torch.cuda.device_count()) if accelerator else 1
    if isinstance(given, str) and "," in given:
        return len([part for part in given.split(",") if part])
    if isinstance(given, (list, tuple)):
        return len(given)
    try:
        return int(given)
    except ValueError:
        raise ValueError(f"trainer.devices must be a number, a list of devices, auto or -1, got {given!r}") from None


def _on_accelerator(named: str) -> bool:
    return named != "cpu" and (named != "auto" or torch.cuda.is_available())


def _precision(given: Any) -> str:
    plain = {"None": "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}
    return plain.get(str(given), str(given))
