"""CPU ranks as Accelerate would have them for sharding, and what each holds of a parameter."""

import torch


def take_cpus_for_gpus():
    """Accelerate shards on accelerators only, though gloo does it as well."""
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))


def local(parameter):
    tensor = getattr(parameter, "ds_tensor", parameter.detach())
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
