"""What the cost model needs to know of this machine and this network, measured on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.advice.candidates import Candidate
from lightning_distopt.advice.cost_model import CodecSpeed, Link
from lightning_distopt.compressors import Compressor
from lightning_distopt.data_parallel import GradientSync, UpdateSync, UpdateSyncConfig
from lightning_distopt.data_parallel.exchanges import choose_exchange
from lightning_distopt.exchange import Meter

__all__ = ["alone", "measure_codec", "measure_link", "timed"]

_SMALL, _LARGE = 256, 1 << 20  # elements of float32: 1 kB shows the latency, 4 MB the bandwidth
_REPEATS = 5
_SIDE = 512  # of a square matrix, where no shapes are given


@contextmanager
def alone() -> Iterator[dist.ProcessGroup | None]:
    """Yield a process group of this rank only; ``None`` where there is no process group at all."""
    if not dist.is_initialized():
        yield None
        return
    group: Any = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def measure_link(device: torch.device, group: dist.ProcessGroup | None = None, seconds: float = 5.0) -> Link:
    """Return latency, bandwidth and overlap of the group from all-reduces, the same figures on every rank.

    A collective: call it on all ranks. The large message shrinks until its all-reduces take about ``seconds`` in all. For
    the overlap a computation that takes about as long as the large all-reduce runs beside it, and each of them by itself.

    Raises:
        ValueError: if there is one rank, which has no link.
    """
    world = dist.get_world_size(group)
    if world == 1:
        raise ValueError("`measure_link` needs at least 2 ranks: got 1. Pass `--bandwidth` and `--latency` instead.")

    def slowest(run: Callable[[], object], repeats: int = _REPEATS) -> float:
        took = []
        for _ in range(repeats + 1):
            dist.barrier(group)
            took.append(timed(run, device))
        found = torch.tensor(median(took[1:]), device=device, dtype=torch.float32)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        return float(found)

    def all_reduce(numel: int) -> float:
        values = torch.ones(numel, device=device)
        return slowest(lambda: dist.all_reduce(values, group=group))

    messages = 2 * (world - 1)
    small = all_reduce(_SMALL)
    numel = _LARGE
    probe = all_reduce(numel // 16)
    while numel > _SMALL * 64 and 16 * probe * (numel / _LARGE) * 3 * _REPEATS > seconds:
        numel //= 2
    values = torch.ones(numel, device=device)
    large = slowest(lambda: dist.all_reduce(values, group=group))
    quarter = all_reduce(numel // 4)  # the slope between two long messages: start-up is in both

    matrix = torch.randn(256, 256, device=device)
    one = slowest(lambda: _compute(matrix, 8)) / 8
    times = max(1, min(10_000, round(large / one)))
    computing = slowest(lambda: _compute(matrix, times))

    def both() -> None:
        work = dist.all_reduce(values, group=group, async_op=True)
        _compute(matrix, times)
        if work is not None:
            work.wait()

    together = slowest(both)
    hidden = (large + computing - together) / min(large, computing)
    nbytes = 2 * 4 * (numel - numel // 4) * (world - 1) / world
    return Link(nbytes / max(large - quarter, large / 4), small / messages, min(1.0, max(0.0, hidden)))


def _compute(matrix: Tensor, times: int) -> Tensor:
    out = matrix
    for _ in range(times):
        out = matrix @ matrix
    return out


def measure_codec(
    candidate: Candidate,
    device: torch.device,
    numel: int = 1 << 22,
    shapes: Sequence[tuple[int, ...]] = (),
    group: dist.ProcessGroup | None = None,
    repeats: int = _REPEATS,
) -> CodecSpeed:
    """Return how fast this rank works on ``numel`` elements, with the whole engine of the candidate's path.

    Everything that the path does with an element is in it: residuals, checks for NaN, copies of ``x``, delivery.

    Args:
        candidate: the method.
        device: where.
        numel: elements, about.
        shapes: of the parameters; a part of them is taken if they hold more than ``numel``. Square matrices if empty.
        group: a process group of this rank only (:func:`alone`); the default one if ``None``, which must be that.
        repeats: the fastest of so many counts.
    """
    shapes = _some(shapes, numel) or [(_SIDE, _SIDE)] * max(1, numel // _SIDE**2)
    total = sum(map(prod, shapes))
    engine = _updates if candidate.path == "updates" else _gradients
    with torch.no_grad():
        engine(candidate, [(32, 32)], device, group, 1)  # compile
        small = engine(candidate, [(32, 32)], device, group, repeats)
        large = engine(candidate, shapes, device, group, repeats)
        decode = _decode(candidate, shapes, device, repeats)
    each = max(large - small, 1e-12) / total
    decode = min(decode / total, each)
    return CodecSpeed(max(each - decode, 1e-15), max(decode, 1e-15), small)


def _some(shapes: Sequence[tuple[int, ...]], numel: int) -> list[tuple[int, ...]]:
    """Return every second, third, ... shape, so that they hold about ``numel`` elements."""
    step = max(1, round(sum(map(prod, shapes)) / numel))
    return list(shapes[::step])


class _Bucket:
    """What DDP hands to a hook: one bucket with everything in it."""

    def __init__(self, params: Sequence[Parameter], flat: Tensor) -> None:
        self._params, self._flat = list(params), flat
        parts = torch.split(flat, [p.numel() for p in params])
        self._gradients = [part.view(p.shape) for part, p in zip(parts, params, strict=True)]

    def buffer(self) -> Tensor:
        return self._flat

    def gradients(self) -> list[Tensor]:
        return self._gradients

    def parameters(self) -> list[Parameter]:
        return self._params

    def is_last(self) -> bool:
        return True


def _gradients(
    candidate: Candidate,
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    group: dist.ProcessGroup | None,
    repeats: int,
) -> float:
    """Return the seconds of the gradient path's engine with one bucket."""
    params = [Parameter(torch.empty(shape, device=device)) for shape in shapes]
    source = torch.randn(sum(map(prod, shapes)), device=device)
    flat, scheme = source.clone(), candidate.compressor
    exchange = choose_exchange(scheme, 1) if isinstance(scheme, Compressor) else "all_reduce"
    names = {param: str(i) for i, param in enumerate(params)}
    sync = GradientSync(names, scheme, exchange, False, 0, Meter(), residuals=candidate.residual, group=group)
    bucket, took = _Bucket(params, flat), []
    for _ in range(repeats + 1):  # the first one makes residuals
        flat.copy_(source)
        took.append(timed(lambda: sync.hook(bucket).wait(), device))
    return min(took[1:])


def _updates(
    candidate: Candidate,
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    group: dist.ProcessGroup | None,
    repeats: int,
) -> float:
    """Return the seconds of the updates' engine: before the step, and after it."""
    compressor = candidate.compressor
    assert isinstance(compressor, Compressor)
    params = {str(i): Parameter(torch.randn(shape, device=device)) for i, shape in enumerate(shapes)}
    sync = UpdateSync(UpdateSyncConfig(compressor, choose_exchange(compressor, 1)), Meter(), group)
    sync.track(params, dict.fromkeys(params, (0,)))
    took = []
    for _ in range(repeats + 1):
        entered = timed(sync.enter, device)
        for param in params.values():  # a step of the optimizer
            param.mul_(0.999)
        took.append(entered + timed(sync.exchange, device))
    return min(took[1:])


def _decode(candidate: Candidate, shapes: Sequence[tuple[int, ...]], device: torch.device, repeats: int) -> float:
    """Return the seconds of decompressing one rank's payloads; of a specification, what follows the network."""
    compressor = candidate.compressor
    if not isinstance(compressor, Compressor):
        return 0.0
    parts = [torch.randn(prod(shape), device=device) for shape in shapes]
    if not compressor.per_tensor:
        parts = [torch.cat(parts)]
    payloads = [compressor.compress(part, 1, assume_finite=True) for part in parts]

    def run() -> None:
        for payload, part in zip(payloads, parts, strict=True):
            compressor.decompress_add_(payload, part, 0.5)

    return min(timed(run, device) for _ in range(repeats))


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that ``run`` takes, on a GPU until it has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
