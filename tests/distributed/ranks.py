"""Real ranks on gloo over a file: no port to clash, and a rank that hangs fails its test, not the suite."""

import contextlib
import os
import shutil
import subprocess
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


@contextlib.contextmanager
def process_group(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _work_and_leave(rank, work, *args):
    work(rank, *args)
    # All is done and saved. At interpreter exit gloo's threads now and then abort the process (seen twice in 150
    # runs, with the group destroyed); an abort before this line still fails the test.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def spawn(work, world_size, folder, *args, seconds=240):
    """Run `work(rank, world_size, folder, *args)` on each rank; a rank that hangs fails the test, not the suite."""
    context = mp.start_processes(
        _work_and_leave, (work, world_size, str(folder), *args), nprocs=world_size, join=False, start_method="spawn"
    )
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"ranks still running after {seconds} s"
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
