"""Majority vote: every rank sends signs, and the sign of their sum is the step of all.

Source: arXiv:1802.04434, arXiv:1810.05291; momentum is left to the optimizer, and no residual is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.compressors.base import all_finite
from lightning_distopt.compressors.bits import add_signs_, pack_bits
from lightning_distopt.exchange.meter import Meter
from lightning_distopt.exchange.tensor_mean import Averaging, MeanTensors, TensorMean

__all__ = ["MajorityVote"]

BIT_RANKS = 8  # up to here bits are gathered; beyond, decoding W - 1 of them costs more than an all-reduce of bytes
MOST_RANKS = 127  # an int8 sum of more votes could overflow


class MajorityVote(TensorMean):
    """``out = sgn(Σ sgn(g_k))``, 0 where votes are even; it depends on the counts alone, which are exact.

    A zero has no sign: it votes + and - in turns, by rank and step, so that an even number of ranks whose gradients are
    all 0 (the unused rows of an embedding) takes no step there, and one rank goes to and fro.

    Bytes received by a rank for n elements: ``(n / 8 + 1) (W - 1)`` up to 8 ranks, about ``2 n`` above. One byte of each
    rank says whether all its numbers are finite.

    Args:
        meter: counts what travels.
        group: process group; the default one if ``None``.

    Raises:
        ValueError: if there are more than 127 ranks.
    """

    def __init__(self, meter: Meter, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(meter, group)
        if self.world > MOST_RANKS:
            raise ValueError(
                f"`compressor='signsgd'` counts votes in 8 bits, of at most {MOST_RANKS} ranks: got {self.world}. Use "
                "`compressor='sign'` with `exchange='sharded_server'`."
            )

    def mean_(self, names: Sequence[str], tensors: Sequence[Tensor], flat: Tensor, step: int) -> Averaging:
        with self.meter.timed("encode"):
            signs = flat >= 0 if (self.rank + step) % 2 == 0 else flat > 0
            broken = torch.full((1,), not all_finite(flat), dtype=torch.uint8, device=flat.device)
            if self.world <= BIT_RANKS:
                votes = torch.cat((pack_bits(signs), broken))
            else:
                votes = torch.cat((signs.to(torch.int8).mul_(2).sub_(1), broken.to(torch.int8)))
        work: dist.Work | None = None
        ballots = votes
        if self.world > BIT_RANKS:
            work = dist.all_reduce(votes, group=self.group, async_op=True)
            self.meter.all_reduce("exchange", votes.nbytes, self.world)
        elif self.world > 1:
            ballots = torch.empty(self.world * votes.numel(), dtype=torch.uint8, device=votes.device)
            work = dist.all_gather_into_tensor(ballots, votes, group=self.group, async_op=True)
            self.meter.all_gather("exchange", votes.nbytes, self.world)
        yield
        self.wait(work, names, step)
        return _Votes(ballots.view(-1, votes.numel()), self.world <= BIT_RANKS)


@dataclass(frozen=True)
class _Votes(MeanTensors):
    """Means as votes.

    Args:
        ballots: shape (ranks, bytes of bits and 1) or (1, elements and 1); the last of a row is not 0 where something was
            not finite.
        bits: one ballot a rank; else one with the sums.
    """

    ballots: Tensor
    bits: bool

    def finite(self) -> bool:
        return not bool(self._broken)

    @property
    def _broken(self) -> Tensor:
        return (self.ballots[:, -1] != 0).any()

    def write_(self, out: Tensor) -> None:
        if self.bits:
            out.zero_()
            one = torch.ones((), dtype=out.dtype, device=out.device)
            for ballot in self.ballots:
                add_signs_(ballot[:-1], one, out)
        else:
            out.copy_(self.ballots[0, :-1])
        out.sign_().masked_fill_(self._broken, float("nan"))
