"""The mean of tensors by way of payloads: compress, exchange, and compress again if a replicated server answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distopt.compressors.randomness import derive_key
from lightning_distopt.exchange.base import Arrived, Exchange, Piece
from lightning_distopt.exchange.tensor_mean import Averaging, MeanTensors, TensorMean

__all__ = ["CompressedMean"]


@dataclass(frozen=True)
class _Payloads(MeanTensors):
    """Means as payloads.

    Args:
        arrived: what they are decoded from.
        numels: of what the compressor was handed, end to end.
        dtype: in which they are summed.
    """

    arrived: Arrived
    numels: list[int]
    dtype: torch.dtype

    def finite(self) -> bool:
        return self.arrived.finite()

    def write_(self, out: Tensor) -> None:
        total = out.zero_() if out.dtype is self.dtype else torch.zeros_like(out, dtype=self.dtype)
        self.arrived.add_to(torch.split(total, self.numels))
        if total is not out:
            out.copy_(total)


class CompressedMean(TensorMean):
    """Hands each tensor, or the whole bucket where that makes no difference, to a compressor and its exchange.

    Args:
        exchange: averages the payloads.
        residual: leave in the tensors what the compression left out, while compressing; else they stay as they are.
        answer: compress the mean again, the same on every rank, and forget what that leaves out.
        seed: enters the keys of randomness.
    """

    def __init__(self, exchange: Exchange, *, residual: bool = False, answer: bool = False, seed: int = 0) -> None:
        super().__init__(exchange.meter, exchange.group)
        self.exchange = exchange
        self.residual = residual
        self.answer = answer
        self.seed = seed

    def mean_(self, names: Sequence[str], tensors: Sequence[Tensor], flat: Tensor, step: int) -> Averaging:
        compressor = self.exchange.compressor
        whole = not compressor.per_tensor
        handed, handed_names = ([flat], ["+".join(names)]) if whole else (tensors, names)
        with self.meter.timed("encode"):
            compress = compressor.compress_ if self.residual else compressor.compress
            keys = self._keys(handed_names, step)
            payloads = [compress(tensor, key, assume_finite=True) for tensor, key in zip(handed, keys, strict=True)]
        gathered = self.exchange.gather(handed_names, payloads, step)
        del payloads  # so that the exchange can free them
        means = _Payloads((yield from gathered), [tensor.numel() for tensor in handed], flat.dtype)
        if self.answer:
            means = self._answered(means, flat, self._keys(handed_names, step, "@server"))
        return means

    def _answered(self, means: _Payloads, flat: Tensor, keys: Sequence[int]) -> _Payloads:
        """Compress the means of a bucket like ``flat`` again."""
        compressor = self.exchange.compressor
        with self.meter.timed("encode"):
            total = torch.empty_like(flat)
            means.write_(total)
            answers = [
                compressor.compress(mean, key, assume_finite=True)
                for mean, key in zip(torch.split(total, means.numels), keys, strict=True)
            ]
        arrived = Arrived([Piece(compressor, answer, i, 0, 1.0) for i, answer in enumerate(answers)])
        return _Payloads(arrived, means.numels, means.dtype)

    def _keys(self, names: Sequence[str], step: int, suffix: str = "") -> list[int]:
        # The server's draws must be the same on all ranks, like those of shared randomness.
        rank = 0 if suffix or self.exchange.compressor.shared_randomness else self.rank
        return [derive_key(self.seed, rank, step, name + suffix) for name in names]
