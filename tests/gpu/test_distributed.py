"""On a CUDA device: one rank under NCCL prunes as a run without a process group, plain, in DDP and in FSDP2."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.gpu.common import DEVICE, FEATURES, MODES, ON_A_GPU, REHEARSAL, SCOPES, UNITS, check_alike, forms, trained

pytestmark = ON_A_GPU


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    backend = "gloo" if REHEARSAL else "nccl"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model):
    mesh = init_device_mesh(DEVICE, (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {"plain": lambda model: model, "DDP": DistributedDataParallel, "FSDP2": sharded}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@forms({**MODES, **SCOPES, **UNITS, **FEATURES})
def test_one_rank_prunes_as_a_run_without_ranks(settings, wrap, one_rank):
    ours = trained(settings, wrap=wrap)
    masks = {name: getattr(mask, "full_tensor", lambda mask=mask: mask)() for name, mask in ours.masks.items()}
    check_alike(ours._replace(masks=masks), trained(settings))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_folder_of_masks_is_continued(wrap, one_rank, tmp_path):
    first = trained({}, wrap=wrap)
    first.pruner.save(tmp_path)
    again = trained({}, wrap=wrap)
    again.pruner.load(tmp_path)
    assert again.pruner.steps == first.pruner.steps
    assert all(torch.equal(mask, first.masks[name]) for name, mask in again.pruner.masks.items())
