"""Lightning's sharding strategies as recipes need them: over all processes of a job, and on CPUs as well as on GPUs."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import DeepSpeedStrategy, ModelParallelStrategy

__all__ = ["FSDP2Strategy", "ZeRODeepSpeedStrategy"]


class FSDP2Strategy(ModelParallelStrategy):
    """ModelParallelStrategy whose model is sharded over all processes, whatever their number.

    Lightning's own, left at its defaults, takes the processes of a node for tensor-parallel ones: a model that only
    shards is then whole on each of them, and all of a node train on the same batches.

    Args:
        settings: As in ModelParallelStrategy, but for the two sizes.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, **settings: Any) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **settings,
        )

    def setup_environment(self) -> None:
        """Shard over all processes, whose number is known by now."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


class ZeRODeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeedStrategy that also runs on CPU processes, so that a recipe can be tried before a GPU is at hand.

    Lightning's own refuses CPUs; DeepSpeed itself does not (DS_ACCELERATOR=cpu, collectives of gloo).

    Args:
        settings: As in DeepSpeedStrategy.
    """

    def setup_environment(self) -> None:
        """Leave Lightning's check for CUDA out where the accelerator is the CPU."""
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        self._process_group_backend = "gloo"
        super(DeepSpeedStrategy, self).setup_environment()

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """Devices of this node; those of CPU processes are numbered, as DeepSpeed has them."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices is not None and all(device.type == "cpu" for device in devices):
            devices = [torch.device("cpu", i) for i in range(len(devices))]
        self._parallel_devices = devices
