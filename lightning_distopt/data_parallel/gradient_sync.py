"""Gradients are compressed inside backward, bucket by bucket, and averaged: no residual, momentum after the averaging.

The DDP communication hook compresses a bucket when backward has filled it, and starts its exchange; the network works
while backward goes on. What comes after (waiting, serving, decoding) is done for all buckets in order when the last one
is ready, on the thread of backward, so that all ranks issue the same collectives in the same order:

    backward   layer 3 ─ layer 2 ─ layer 1 ─ layer 0 ┐
    hook            start 0 ─────── start 1 ─ start 2 ┴ finish 0 ─ finish 1 ─ finish 2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn import Parameter

from lightning_distopt.compressors import Compressor, Dense
from lightning_distopt.compressors.base import all_finite, wide
from lightning_distopt.compressors.randomness import derive_key
from lightning_distopt.data_parallel.agreement import agree, first_non_finite
from lightning_distopt.data_parallel.exchanges import ExchangeName, make_exchange
from lightning_distopt.errors import NonFiniteError
from lightning_distopt.exchange import Meter, Steps
from lightning_distopt.exchange.base import drain
from lightning_distopt.exchange.meter import ring_all_reduce_bytes

__all__ = ["GradientSync"]


class GradientSync:
    """The state and the hook of ``error_feedback="none"``.

    Args:
        names: full name of every parameter; keys of randomness and error messages use it, never a bucket's number,
            because DDP rebuilds its buckets after the first backward.
        compressor: of the gradients.
        exchange: how payloads are averaged.
        server_compression: compress the average again.
        dense_steps: steps at the start that send everything.
        meter: counts what travels.
        seed: enters the keys of all randomness.
    """

    def __init__(
        self,
        names: Mapping[Parameter, str],
        compressor: Compressor,
        exchange: ExchangeName,
        server_compression: bool,
        dense_steps: int,
        meter: Meter,
        seed: int = 0,
    ) -> None:
        self.names = names
        self.compressor = compressor
        self.dense_steps = dense_steps
        self.meter = meter
        self.seed = seed
        self.rounds = 0
        self._exchange = make_exchange(
            exchange, compressor, meter, compress_answer=server_compression, keep_residual=False, seed=seed
        )
        self._server = server_compression and exchange != "sharded_server"
        self._dense = make_exchange("all_reduce", Dense("float32"), meter)
        self._works: list[Steps] = []
        self._bytes = 0
        self._non_finite: list[str | None] = []
        self._counted_alike = False

    def hook(self, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        """Take one bucket of DDP's reducer; the future holds its averaged gradients."""
        buffer = bucket.buffer()
        if not self._counted_alike:
            self._count_alike(buffer.device)
        future: Future[Tensor] = Future(devices=[buffer.device]) if buffer.is_cuda else Future()
        work = self._average(bucket, future)
        next(work)
        self._works.append(work)
        self._bytes += buffer.nbytes
        if bucket.is_last():
            self._finish()
        return future

    def _count_alike(self, device: torch.device) -> None:
        """Let ranks that lost their counter of steps (a sidecar) go on with the others', once."""
        rounds = torch.tensor(self.rounds, device=device)
        if self._exchange.world > 1:
            dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
            self.meter.all_reduce("setup", rounds.nbytes, self._exchange.world)
        self.rounds = int(rounds)
        self._counted_alike = True

    def _finish(self) -> None:
        works, self._works = self._works, []
        drain(works)
        self.meter.step(ring_all_reduce_bytes(self._bytes, self._exchange.world))
        self._bytes = 0
        self.rounds += 1

    def _average(self, bucket: dist.GradBucket, future: Future[Tensor]) -> Steps:  # type: ignore[name-defined]
        exchange = self._dense if self.rounds < self.dense_steps else self._exchange
        compressor = exchange.compressor
        gradients = bucket.gradients()
        names = [self.names.get(param, "") for param in bucket.parameters()]
        handed = gradients if compressor.per_tensor else [bucket.buffer()]
        handed_names = names if compressor.per_tensor else ["+".join(names)]
        with self.meter.timed("encode"):
            keys = self._keys(handed_names, "")
            payloads = [compressor.compress(t, k, assume_finite=True) for t, k in zip(handed, keys, strict=True)]
        means = yield from exchange.mean(handed_names, payloads, self.rounds)
        with self.meter.timed("encode"):
            if self._server and exchange is self._exchange:
                means = [
                    compressor.decompress(compressor.compress(mean, key, assume_finite=True))
                    for mean, key in zip(means, self._keys(handed_names, "@server"), strict=True)
                ]
            if not _all_finite(means):  # the same bits on all ranks, so the same answer
                index = first_non_finite(gradients)
                self._non_finite.append(None if index is None else names[index])
            for tensor, mean in zip(handed, means, strict=True):
                tensor.copy_(mean.view(tensor.shape))
        future.set_result(bucket.buffer())

    def _keys(self, names: list[str], suffix: str) -> list[int]:
        rank = 0 if suffix or self.compressor.shared_randomness else self._exchange.rank
        return [derive_key(self.seed, rank, self.rounds, name + suffix) for name in names]

    def raise_if_non_finite(self) -> None:
        """Raise on all ranks if the last average held a NaN or an infinity.

        Raises:
            NonFiniteError: naming rank, step and parameter.
        """
        if not self._non_finite:
            return
        mine = next((name for name in self._non_finite if name), None)
        self._non_finite = []
        order = sorted(self.names.values())
        device = next(iter(self.names)).device
        culprit = agree(0, None if mine is None else order.index(mine), False, self.meter, device).culprit
        where = "the sum over ranks overflowed"
        if culprit is not None:
            where = f"the gradient of `{order[culprit[1]]}` holds a NaN or an infinity on rank {culprit[0]}"
        raise NonFiniteError(
            f"In step {self.rounds - 1} {where}, and all {self._exchange.world} ranks stopped before the optimizer's step. "
            "Look for the cause in that rank's batch or loss, or lower the learning rate."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the counter of steps, which enters the keys of randomness."""
        return {"rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from there."""
        self.rounds = int(state.get("rounds", 0))


def _all_finite(tensors: list[Tensor]) -> bool:
    sums = torch.stack([tensor.sum(dtype=wide(tensor.dtype)) for tensor in tensors])  # one look at the device for all
    return bool(sums.isfinite().all()) or all(all_finite(tensor) for tensor in tensors)
