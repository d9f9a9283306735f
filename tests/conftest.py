"""Every test starts with the same seed and leaves no process, process group or environment variable behind."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from lightning_distopt.compressors.kernels import kernels_of

# Set by Lightning's launchers and seeding, by design; everything else that appears in the environment is a leak.
_ALLOWED = {
    "OMP_NUM_THREADS",
    "MASTER_PORT",
    "MASTER_ADDR",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "WANDB_MODE",
    "WANDB_SERVICE",
}
_FOREIGN = ("PYTEST_", "HYPOTHESIS_", "KMP_", "CUDA_", "TORCHINDUCTOR_", "TRITON_", "WANDB_", "LC_", "TOKENIZERS_")

# Tests fork. A child inherits its parent's OpenMP pool without the threads in it, and would wait for them for ever.
torch.set_num_threads(1)

# Children inherit what is compiled and loaded here, instead of each loading it again.
kernels_of(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    torch.manual_seed(0)
    before = dict(os.environ)
    threads = torch.get_num_threads()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for child in multiprocessing.active_children():  # a test that timed out must not slow down the next ones
        child.kill()
        child.join()
    torch.set_num_threads(threads)
    leaked = [k for k in os.environ if k not in before and k not in _ALLOWED and not k.startswith(_FOREIGN)]
    os.environ.clear()
    os.environ.update(before)
    assert not leaked, f"environment variables left behind: {leaked}"
