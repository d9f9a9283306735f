"""Local updates with everything that acts on them, all ranks in one process, one line after the other: slow, plain, float64.

It shares no code with the engine, only the problem whose gradients both take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tests.data_parallel.reference import C, Problem, Span, identity, on_spans

Outer = Callable[[Tensor, Tensor, int], Tensor]
"""The next common model, from the model, the pseudo-gradient and the number of the round."""


def plain(x: Tensor, g: Tensor, t: int) -> Tensor:
    return x - g


def nesterov(lr: Callable[[int], float], beta: float) -> Outer:
    """E3 and E4, as they are written; v is the model of the first outer step."""
    v: Tensor | None = None

    def step(x: Tensor, g: Tensor, t: int) -> Tensor:
        nonlocal v
        before, v = (x if v is None else v), x - lr(t) * g
        return v + beta * (v - before)

    return step


class Worker:
    """One rank: parameters, SGD with momentum and weight decay.

    Args:
        start: the parameters.
        lr: rate of each step.
    """

    def __init__(self, start: Tensor, lr: Callable[[int], float]) -> None:
        self.z, self.m, self.lr = start.clone(), None, lr

    def step(self, gradient: Tensor, i: int) -> None:
        d = gradient + 0.01 * self.z
        self.m = d if self.m is None else 0.9 * self.m + d
        self.z = self.z - self.lr(i) * self.m


def rounds(
    problem: Problem,
    ranks: int,
    outer: Outer,
    *,
    every: int,
    lr: Callable[[int], float],
    shares: Callable[[int], Sequence[float]] | None = None,
    compress: C = identity,
    spans: Sequence[Span] = (),
    alpha: float = 0.0,
    warm: int = 0,
    fresh: bool = False,
) -> Iterator[Tensor]:
    """Yield the common model after each round; ``shares(t)`` are p_k, 0 for a rank that sits out."""
    x = problem.start.clone()
    spans = spans or [(0, x.numel())]
    workers = [Worker(x, lr) for _ in range(ranks)]
    e = [torch.zeros_like(x) for _ in range(ranks)]
    i = t = 0
    while True:
        is_warm = t < warm
        p = [1 / ranks] * ranks if is_warm or shares is None else shares(t)
        g = torch.zeros_like(x)
        for k, worker in enumerate(workers):
            y = x - (0.0 if is_warm else alpha) * e[k]
            worker.z = y.clone()
            if fresh and not is_warm:
                worker.m = None
            if p[k] == 0:
                continue
            for h in range(1 if is_warm else every):
                worker.step(problem.gradient(k, i + h, worker.z), i + h)
            whole = e[k] + p[k] * ranks * (y - worker.z)
            sent = whole if is_warm else on_spans(compress, whole, spans)
            e[k] = whole - sent
            g += sent / ranks
        i += 1 if is_warm else every
        if any(p):
            x = x - g if is_warm else outer(x, g, t - warm)
        t += 1
        yield x


def streaming(
    problem: Problem,
    ranks: int,
    outers: Sequence[Outer],
    spans: Sequence[Span],
    *,
    every: int,
    delay: int,
    mix: float,
    lr: Callable[[int], float],
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield the common model and every rank's parameters after each local step; one outer optimizer a fragment."""
    x = problem.start.clone()
    workers = [Worker(x, lr) for _ in range(ranks)]
    apart = every // len(spans)
    coming: dict[int, list[tuple[int, Tensor]]] = {}
    done = [0] * len(spans)
    step = 0
    while True:
        for k, worker in enumerate(workers):
            worker.step(problem.gradient(k, step, worker.z), step)
        step += 1
        for f, (a, b) in enumerate(spans):
            arrives = step + delay
            if arrives >= (f + 1) * apart and (arrives - (f + 1) * apart) % every == 0:
                g = sum((x[a:b] - worker.z[a:b]) / ranks for worker in workers)
                coming.setdefault(arrives, []).append((f, g))
        for f, g in coming.pop(step, []):
            a, b = spans[f]
            x = x.clone()
            x[a:b] = outers[f](x[a:b], g, done[f])
            done[f] += 1
            for worker in workers:
                worker.z = worker.z.clone()
                worker.z[a:b] = mix * worker.z[a:b] + (1 - mix) * x[a:b]
        yield x, [worker.z for worker in workers]
