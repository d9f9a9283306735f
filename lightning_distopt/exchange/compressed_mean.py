"""The mean of tensors by way of payloads: compress, exchange, and compress again if a replicated server answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_distopt.compressors.randomness import derive_key
from lightning_distopt.exchange.base import Exchange, Means
from lightning_distopt.exchange.tensor_mean import TensorMean

__all__ = ["CompressedMean"]


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

    def mean_(self, names: Sequence[str], tensors: Sequence[Tensor], flat: Tensor, step: int) -> Means:
        compressor = self.exchange.compressor
        whole = not compressor.per_tensor
        handed, handed_names = ([flat], ["+".join(names)]) if whole else (tensors, names)
        with self.meter.timed("encode"):
            compress = compressor.compress_ if self.residual else compressor.compress
            keys = self._keys(handed_names, step)
            payloads = [compress(tensor, key, assume_finite=True) for tensor, key in zip(handed, keys, strict=True)]
        exchanged = self.exchange.mean(handed_names, payloads, step)
        del payloads  # so that the exchange can free them
        means = yield from exchanged
        with self.meter.timed("encode"):
            if self.answer:
                keys = self._keys(handed_names, step, "@server")
                means = [
                    compressor.decompress(compressor.compress(mean, key, assume_finite=True))
                    for mean, key in zip(means, keys, strict=True)
                ]
            if whole:
                means = list(torch.split(means[0], [tensor.numel() for tensor in tensors]))
        return means

    def _keys(self, names: Sequence[str], step: int, suffix: str = "") -> list[int]:
        # The server's draws must be the same on all ranks, like those of shared randomness.
        rank = 0 if suffix or self.exchange.compressor.shared_randomness else self.rank
        return [derive_key(self.seed, rank, step, name + suffix) for name in names]
