"""Section 2.1 of the specification, all ranks in one process, one line after the other: slow, plain, float64.

Everything is one flat vector; a compressor works on spans of it, and a server on spans of its own. It shares no code
with the engine, only the problem whose gradients both take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Span = tuple[int, int]
C = Callable[[Tensor], Tensor]


class Problem:
    """Quadratic losses that differ from rank to rank, ``½ Σ h (x - x* - o_k)²``, with gradient noise.

    Args:
        ranks: number of workers.
        size: elements of ``x``.
        noise: standard deviation of the gradient noise.
        from_zero: start at 0 instead of at a random point.
    """

    def __init__(self, ranks: int, size: int, noise: float = 1.0, from_zero: bool = False) -> None:
        draw = torch.Generator().manual_seed(size)
        normal = torch.randn(4, size, generator=draw, dtype=torch.float64)
        offsets = 0.3 * torch.randn(ranks, size, generator=draw, dtype=torch.float64)
        curvature = torch.exp(0.8 * normal[0])
        self.curvature = curvature / curvature.max()
        self.target = normal[1]
        self.start = torch.zeros_like(normal[2]) if from_zero else normal[2]
        self.offsets = offsets - offsets.mean(0)
        self.noise = noise

    def gradient(self, rank: int, step: int, point: Tensor) -> Tensor:
        """Return ``h (y - x* - o_k) + noise``; the noise depends on rank and step alone."""
        draw = torch.Generator().manual_seed(100_003 * rank + step)
        noise = torch.randn(point.numel(), generator=draw, dtype=torch.float64)
        return self.curvature * (point - self.target - self.offsets[rank]) + self.noise * noise

    def loss(self, point: Tensor) -> float:
        """Return ``½ mean(h (x - x*)²)``."""
        return 0.5 * float((self.curvature * (point - self.target) ** 2).mean())


class Moment(NamedTuple):
    """All ranks after a round: ``x`` and ``s`` of shape (n,), ``e`` and the sums of local steps of shape (K, n)."""

    x: Tensor
    e: Tensor
    s: Tensor
    steps: Tensor


def sign(v: Tensor) -> Tensor:
    return v.abs().mean() * torch.where(v >= 0, 1.0, -1.0).to(v.dtype)


def top(ratio: float) -> C:
    def compress(v: Tensor) -> Tensor:
        largest = v.abs().argsort(descending=True, stable=True)[: max(1, int(v.numel() * ratio))]
        return torch.zeros_like(v).index_copy(0, largest, v[largest])

    return compress


def identity(v: Tensor) -> Tensor:
    return v


def spans_of(sizes: Sequence[int]) -> list[Span]:
    """Spans of tensors that lie end to end."""
    return list(pairwise([0, *accumulate(sizes)]))


def server_spans(buckets: Sequence[Sequence[int]], ranks: int) -> list[Span]:
    """What each owner answers for: each bucket in equal shares, cuts inside a tensor moved down to multiples of 8."""
    spans: list[Span] = []
    start = 0
    for sizes in buckets:
        total = sum(sizes)
        for begin, end in spans_of(sizes):
            inner = [total * rank // ranks for rank in range(1, ranks)]
            cuts = sorted({(cut - begin) // 8 * 8 + begin for cut in inner if begin < cut < end} | {begin, end})
            spans += [(start + a, start + b) for a, b in pairwise(cuts)]
        start += total
    return spans


def on_spans(compress: C, v: Tensor, spans: Sequence[Span]) -> Tensor:
    return torch.cat([compress(v[a:b]) for a, b in spans])


def family(
    problem: Problem,
    ranks: int,
    *,
    compress: C,
    spans: Sequence[Span],
    server: Sequence[Span] | None = None,
    alpha: float = 1.0,
    period: int = 0,
    local_steps: int = 1,
    lr: Callable[[int], float] = lambda step: 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> Iterator[Moment]:
    """Yield all ranks after each round; letters as in the specification."""
    x = problem.start.clone()
    e = [torch.zeros_like(x) for _ in range(ranks)]
    s = torch.zeros_like(x)
    m: list[Tensor | None] = [None] * ranks
    t = 0
    while True:
        if period > 0 and (t + 1) % period == 0:  # (a)
            mean = sum(e, torch.zeros_like(x)) / ranks
            e = [mean.clone() for _ in range(ranks)]
        sent, steps = [], []
        for k in range(ranks):
            y = x - alpha * e[k]  # (b)
            step = torch.zeros_like(x)
            for h in range(local_steps):
                i = t * local_steps + h
                g = problem.gradient(k, i, y)  # (c)
                d = g + weight_decay * y  # (d)
                previous = m[k]
                m_k = d if previous is None else momentum * previous + d
                m[k] = m_k
                y = y - lr(i) * m_k
                step = step + lr(i) * m_k
            D = e[k] + step  # (e)
            c = on_spans(compress, D, spans)
            e[k] = D - c
            sent.append(c)
            steps.append(step)
        v = sum(sent, torch.zeros_like(x)) / ranks  # (f)
        if server is not None:
            s = s + v
            v = on_spans(compress, s, server)
            s = s - v
        x = x - v  # (g)
        t += 1
        yield Moment(x, torch.stack(e), s, torch.stack(steps))


def double_squeeze(problem: Problem, ranks: int, *, compress: C, spans: Sequence[Span], lr: float) -> Iterator[Tensor]:
    """Section 5.3: residuals in gradient units, the learning rate last; yields ``x``."""
    x = problem.start.clone()
    e = [torch.zeros_like(x) for _ in range(ranks)]
    s = torch.zeros_like(x)
    t = 0
    while True:
        u = s
        for k in range(ranks):
            q = problem.gradient(k, t, x) + e[k]
            c = on_spans(compress, q, spans)
            e[k] = q - c
            u = u + c / ranks
        v = on_spans(compress, u, spans)
        s = u - v
        x = x - lr * v
        t += 1
        yield x
