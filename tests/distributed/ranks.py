"""Real ranks on gloo over a file: no port to clash, and a rank that hangs fails its test, not the suite.

Ranks are forked, each from a server of its own that has imported what takes ten seconds to import and done nothing
else; what the session sets in its environment, they get too. The servers are programs of their own, so that strings
hash differently on every rank, as they do where torchrun starts them: the order of a set is no rank's to rely on.
"""

import contextlib
import functools
import itertools
import os
import shutil
import subprocess
import sys
from multiprocessing import forkserver
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

IMPORTED = ["torch.distributed.fsdp", "pytorch_lightning", "timm", "transformers.trainer", "peft", "deepspeed"]
START = "spawn" if torch.cuda.is_available() else "forkserver"  # what one of them imports may start CUDA


@contextlib.contextmanager
def process_group(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@functools.cache
def _server_of(rank):
    server = forkserver.ForkServer()
    server.set_forkserver_preload(IMPORTED)  # skips what is not installed
    return server


def _work_and_leave(rank, environment, work, *args):
    os.environ |= environment  # a server has that of its own start
    np.random.seed()
    work(rank, *args)
    # All is done and saved. At interpreter exit gloo's threads now and then abort the process (seen twice in 150
    # runs, with the group destroyed); an abort before this line still fails the test.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def start(work, world_size, folder, *args):
    """Start the ranks and return torch's context of them."""
    ranks, words = itertools.count(), (dict(os.environ), work, world_size, str(folder), *args)
    from_its_server = mock.patch.object(
        forkserver, "connect_to_new_process", lambda fds: _server_of(next(ranks)).connect_to_new_process(fds)
    )
    with from_its_server:
        return mp.start_processes(_work_and_leave, words, nprocs=world_size, join=False, start_method=START)


def spawn(work, world_size, folder, *args):
    """Run `work(rank, world_size, folder, *args)` on each rank; those that hang end with the time limit of the test."""
    context = start(work, world_size, folder, *args)
    try:
        while not context.join():
            pass
    finally:
        for process in context.processes:
            process.kill()


def run_command(words, *, written=None, seconds=280, **settings):
    """Run a command that starts ranks of its own and return what it did, once more where gloo aborted a rank.

    Such ranks end as any program does, so that gloo's threads now and then abort one that is done (see above; once in
    some 100 runs, pytorch/pytorch#179291). An abort that is anything else's fault comes again. The folder `written`
    is removed before each run, so that the second finds nothing of the first.
    """
    for _ in range(2):
        if written is not None:
            shutil.rmtree(written, ignore_errors=True)
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, **settings)
        if done.returncode == 0 or not any(sign in done.stderr for sign in ("SIGABRT", "terminate called")):
            break
    return done
