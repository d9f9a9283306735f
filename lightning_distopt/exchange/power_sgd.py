"""PowerSGD: one warm-started power iteration a step finds a low-rank mean of matrices, by two all-reduces a bucket.

    1. up      all-reduce   P = M Q of every matrix of the bucket, and all that is sent dense
    2.                      orthonormalise the columns of mean P
    3. down    all-reduce   Q = Mᵀ P of every matrix
    4.                      out = P (mean Q)ᵀ;  e = M - out

Source: arXiv:1905.13727, with the error feedback of its algorithm 2 (the residual is what *all* ranks left out together).
The means are the same bits on every rank as far as matrix products and QR are: on machines of one kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.compressors.base import all_finite, wide
from lightning_distopt.compressors.randomness import derive_key, uniform
from lightning_distopt.exchange.meter import Meter
from lightning_distopt.exchange.tensor_mean import Averaging, MeanTensors, TensorMean

__all__ = ["PowerSGDMean", "orthonormal"]


class _Matrix(NamedTuple):
    """A tensor that is compressed: its number in the bucket, and its view as rows x columns."""

    number: int
    m: Tensor


class _Factors(NamedTuple):
    """A mean of rank ``r``, ``p @ q.t()``."""

    p: Tensor
    q: Tensor

    @property
    def product(self) -> Tensor:
        return self.p @ self.q.t()


@dataclass(frozen=True)
class _Approximations(MeanTensors):
    """Means as factors where a tensor is compressed, else as they are; one matrix is written out at a time.

    Args:
        means: one a tensor.
    """

    means: list[_Factors | Tensor]

    def finite(self) -> bool:
        # The columns of P are of length 1, so that a product of rank r is at most the sum of r numbers of Q.
        parts = [mean.q.abs().sum(1) + mean.p.sum() if isinstance(mean, _Factors) else mean for mean in self.means]
        return all(all_finite(part) for part in parts)

    def write_(self, out: Tensor) -> None:
        start = 0
        for mean in self.means:
            values = (mean.product if isinstance(mean, _Factors) else mean).view(-1)
            out[start : start + values.numel()].copy_(values)
            start += values.numel()

    def leave_(self, tensors: Sequence[Tensor]) -> None:
        for tensor, mean in zip(tensors, self.means, strict=True):
            if isinstance(mean, _Factors):
                tensor.sub_(mean.product.view(tensor.shape))
            else:
                tensor.zero_()


class PowerSGDMean(TensorMean):
    """Averages matrices by their best recent rank-``r`` approximation, and everything else exactly, in float32.

    Args:
        rank: ``r``. A tensor of rows x columns is compressed if ``r (rows + columns) < rows * columns``.
        meter: counts what travels.
        group: process group; the default one if ``None``.
        seed: of the first ``Q``, which is the same on all ranks.
    """

    def __init__(self, rank: int, meter: Meter, group: dist.ProcessGroup | None = None, *, seed: int = 0) -> None:
        super().__init__(meter, group)
        self.r = rank
        self.seed = seed
        self._queries: dict[str, Tensor] = {}  # where the next step starts: Q by name, shape (columns, r)
        self._next: dict[str, Tensor] = {}  # those of the step under way

    def mean_(self, names: Sequence[str], tensors: Sequence[Tensor], flat: Tensor, step: int) -> Averaging:
        with self.meter.timed("encode"):
            dtype = wide(flat.dtype)
            matrices = [
                _Matrix(i, t.reshape(t.shape[0], -1).to(dtype)) for i, t in enumerate(tensors) if self._compresses(t)
            ]
            queries = [self._start(names[i], m, step) for i, m in matrices]
            dense = [t.reshape(-1).to(dtype) for t in tensors if not self._compresses(t)]
            up = torch.cat([*(_product(m, q) for (_, m), q in zip(matrices, queries, strict=True)), *dense])
        work = self._all_reduce(up)
        yield
        self.wait(work, names, step)
        with self.meter.timed("encode"):
            up.div_(self.world)
            sizes = [m.shape[0] * self.r for _, m in matrices] + [t.numel() for t in dense]
            parts = list(torch.split(up, sizes))
            dense, products = parts[len(matrices) :], parts[: len(matrices)]
            bases = [orthonormal(p.view(-1, self.r)) for p in products]
        if matrices:
            with self.meter.timed("encode"):
                down = torch.cat([(m.t() @ p).view(-1) for (_, m), p in zip(matrices, bases, strict=True)])
            work = self._all_reduce(down)
            yield
            self.wait(work, names, step)
        factors = {}
        if matrices:
            with self.meter.timed("encode"):
                down.div_(self.world)
                queries = [q.view(-1, self.r) for q in torch.split(down, [m.shape[1] * self.r for _, m in matrices])]
                factors = {i: _Factors(p, q) for (i, _), p, q in zip(matrices, bases, queries, strict=True)}
                self._remember([names[i] for i, _ in matrices], queries, step)
        rest = iter(dense)
        return _Approximations([factors[i] if i in factors else next(rest) for i in range(len(tensors))])

    def settle(self, keep: bool) -> None:
        if keep:
            self._queries.update(self._next)
        self._next = {}

    def state_dict(self) -> dict[str, Any]:
        return {"queries": dict(self._queries)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._queries = {name: q.clone() for name, q in state.get("queries", {}).items()}

    def _compresses(self, tensor: Tensor) -> bool:
        if tensor.dim() < 2 or tensor.numel() == 0:
            return False
        rows = tensor.shape[0]
        return self.r * (rows + tensor.numel() // rows) < tensor.numel()

    def _start(self, name: str, m: Tensor, step: int) -> Tensor:
        """Return where the power iteration of a matrix starts."""
        q = self._queries.get(name)
        if q is None or q.shape != (m.shape[1], self.r):
            q = self._draw(name, m.shape[1], step, m.device)
        return q.to(m.device, m.dtype)

    def _draw(self, name: str, columns: int, step: int, device: torch.device) -> Tensor:
        key = derive_key(self.seed, 0, step, name)
        return uniform(key, columns * self.r, device).view(columns, self.r) - 0.5

    def _remember(self, names: Sequence[str], queries: Sequence[Tensor], step: int) -> None:
        """Keep each ``Q`` for the next step, every column with a largest entry of 1, so that its scale never matters.

        A column that has become 0 (a step without gradients) would stay 0 for ever, so it is drawn anew.
        """
        if not queries:
            return
        scales = torch.stack([q.abs().amax(0) for q in queries])
        zeros = (scales == 0).tolist()  # one look for all
        for name, q, scale, dead in zip(names, queries, scales, zeros, strict=True):
            kept = q / scale
            if any(dead):
                kept = torch.where(scale == 0, self._draw(name, q.shape[0], step + 1, q.device).to(q.dtype), kept)
            self._next[name] = kept

    def _all_reduce(self, values: Tensor) -> dist.Work | None:
        if self.world == 1:
            return None
        self.meter.all_reduce("exchange", values.nbytes, self.world)
        work: dist.Work | None = dist.all_reduce(values, group=self.group, async_op=True)
        return work


def _product(m: Tensor, q: Tensor) -> Tensor:
    """Return ``m @ q``, flat.

    A single column is computed beside another: how a matrix-vector product is rounded depends on where ``m`` begins in
    memory, and DDP lays out its buckets differently in the first step of a resumed run.
    """
    if q.shape[1] == 1:
        return (m @ torch.cat((q, q), dim=1))[:, 0]
    return (m @ q).view(-1)


def orthonormal(p: Tensor) -> Tensor:
    """Return orthonormal columns whose span contains that of ``p``, shape (rows, r) with r <= rows.

    Householder's QR: where columns of ``p`` are 0 or depend on one another, it completes the basis by itself. A NaN or an
    infinity makes something in the result non-finite.
    """
    # LAPACK may skip what it cannot compare, so its word is not taken for it.
    return torch.where(p.isfinite().all(), torch.linalg.qr(p).Q, float("nan"))
