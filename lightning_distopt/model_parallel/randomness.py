"""Random numbers of a layer by (seed, stage, batch): a second forward draws what the first one drew, wherever it runs.

Storing the generator's state with every input would do the same for more memory, and would tie a run to the order in which
its batches were forwarded; a key needs no storage, survives a checkpoint, and is the same in the simulator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["keyed_random"]

_MASK = (1 << 63) - 1


@contextmanager
def keyed_random(seed: int, stage: int, batch: int, device: torch.device | None = None) -> Iterator[None]:
    """Let torch's generators of the CPU and of ``device`` draw from this key inside, and go on as before outside."""
    cuda = device if device is not None and device.type == "cuda" else None
    before = torch.get_rng_state()
    before_cuda = torch.cuda.get_rng_state(cuda) if cuda is not None else None
    key = _mix(seed, stage, batch)
    # Not torch.manual_seed, which takes a stack trace for every device type that was not used yet.
    torch.default_generator.manual_seed(key)
    try:
        if cuda is None:
            yield
        else:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(key)
                yield
    finally:
        torch.set_rng_state(before)
        if before_cuda is not None and cuda is not None:
            torch.cuda.set_rng_state(before_cuda, cuda)


def _mix(*numbers: int) -> int:
    """Hash integers to 63 bits (the finaliser of splitmix64, one round a number)."""
    h = 0x9E3779B97F4A7C15
    for number in numbers:
        h = (h ^ number) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ h >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 31
    return h & _MASK
