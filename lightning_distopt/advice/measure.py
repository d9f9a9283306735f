"""What the cost model needs to know of this machine and this network, measured on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

from lightning_distopt.advice.candidates import Candidate
from lightning_distopt.advice.cost_model import CodecSpeed, Link

__all__ = ["measure_codec", "measure_link", "timed"]

_SMALL, _LARGE = 256, 1 << 20  # elements of float32: 1 kB shows the latency, 4 MB the bandwidth
_REPEATS = 5


def measure_link(device: torch.device, group: dist.ProcessGroup | None = None, seconds: float = 5.0) -> Link:
    """Return latency and bandwidth of the group from small and large all-reduces, the same figures on every rank.

    A collective: call it on all ranks. The large message shrinks until its all-reduces take about ``seconds`` in all.

    Raises:
        ValueError: if there is one rank, which has no link.
    """
    world = dist.get_world_size(group)
    if world == 1:
        raise ValueError("`measure_link` needs at least 2 ranks: got 1. Pass `--bandwidth` and `--latency` instead.")

    def all_reduce(numel: int) -> float:
        values = torch.ones(numel, device=device)
        took = [timed(lambda: dist.all_reduce(values, group=group), device) for _ in range(_REPEATS + 1)]
        slowest = torch.tensor(median(took[1:]), device=device, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
        return float(slowest)

    messages = 2 * (world - 1)
    small = all_reduce(_SMALL)
    numel = _LARGE
    probe = all_reduce(numel // 16)
    while numel > _SMALL * 64 and 16 * probe * (numel / _LARGE) * _REPEATS > seconds:
        numel //= 2
    large = all_reduce(numel)
    nbytes = 2 * 4 * (numel - _SMALL) * (world - 1) / world
    return Link(bandwidth=nbytes / max(large - small, 1e-9), latency=small / messages)


def measure_codec(candidate: Candidate, device: torch.device, numel: int = 1 << 22) -> CodecSpeed:
    """Return how fast this rank encodes and decodes, alone, with ``numel`` elements (``numel // 64`` for what is fixed).

    On the path of updates the passes over ``x`` and ``e`` that the exchange needs are part of encoding.
    """
    compressor = candidate.compressor

    def both(n: int) -> tuple[float, float]:
        source = torch.randn(n, device=device)
        buffer, out = source.clone(), torch.zeros(n, device=device)
        x = source.clone() if candidate.path == "updates" else None
        encode, decode = [], []
        for _ in range(_REPEATS):
            buffer.copy_(source)

            def compress() -> object:
                if x is None:
                    return compressor.compress(buffer, 1, assume_finite=True)
                torch.sub(x, out, out=buffer)  # the displacement,
                x.copy_(out)  # and the two copies of x in a step
                x.copy_(buffer)
                return compressor.compress_(buffer, 1, assume_finite=True)

            encode.append(timed(compress, device))
            payload = compressor.compress(source, 1, assume_finite=True)
            decode.append(timed(lambda payload=payload: compressor.decompress_add_(payload, out, 0.5), device))  # type: ignore[misc]
        return min(encode), min(decode)

    both(1024)  # compile
    (small_encode, small_decode), (encode, decode) = both(numel // 64), both(numel)
    per = numel - numel // 64
    speed_encode, speed_decode = max(encode - small_encode, 1e-12) / per, max(decode - small_decode, 1e-12) / per
    fixed = max(0.0, small_encode - speed_encode * (numel // 64)) + max(
        0.0, small_decode - speed_decode * (numel // 64)
    )
    return CodecSpeed(speed_encode, speed_decode, fixed)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that ``run`` takes, on a GPU until it has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
