"""Gradients are compressed inside backward, bucket by bucket, and averaged; momentum comes after the averaging.

The DDP communication hook compresses a bucket when backward has filled it, and starts its exchange; the network works
while backward goes on. What comes after (waiting, serving, decoding) is done for all buckets in order when the last one
is ready, on the thread of backward, so that all ranks issue the same collectives in the same order:

    backward   layer 3 ─ layer 2 ─ layer 1 ─ layer 0 ┐
    hook            start 0 ─────── start 1 ─ start 2 ┴ finish 0 ─ finish 1 ─ finish 2 ─ keep residuals

With residuals, a bucket's buffer is where ``v`` is built and what compression left out stays; the old residuals are not
touched before all means are there. Those are the same bits on all ranks, so all ranks see alike whether they are finite,
and either all keep their new residuals or none does, without a word between them.

Memory beyond DDP's: nothing, or one copy of the gradients for the residuals, and what arrived, still compressed; it is
decoded into DDP's own buffers. What is sent dense (``dense_steps``, 16 bits, parameters that PowerSGD leaves alone) arrives
as large as it is, and half-precision gradients with residuals are added up in float32, one more copy until backward ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn import Parameter

from lightning_distopt.compressors import Compressor, Specification
from lightning_distopt.compressors.base import wide
from lightning_distopt.data_parallel.agreement import agree, first_non_finite
from lightning_distopt.data_parallel.exchanges import ExchangeName, make_tensor_mean
from lightning_distopt.data_parallel.gradient_memory import GradientMemory
from lightning_distopt.errors import NonFiniteError
from lightning_distopt.exchange import Meter, Steps, network_failures
from lightning_distopt.exchange.base import drain
from lightning_distopt.exchange.meter import ring_all_reduce_bytes
from lightning_distopt.exchange.tensor_mean import MeanTensors

__all__ = ["GradientSync"]


@dataclass
class _Received:
    """A bucket whose means are there.

    Args:
        buffer: DDP's, where the means go.
        names: of its parameters.
        tensors: what was handed to the exchange, one a parameter.
        means: of them.
        used: whether this rank's gradient of each parameter held anything but zeros; empty if nobody asks.
        future: DDP waits for it.
    """

    buffer: Tensor
    names: list[str]
    tensors: list[Tensor]
    means: MeanTensors
    used: list[Tensor]
    future: Future[Tensor]


class GradientSync:
    """The state and the hook of ``error_feedback="none"`` and ``"gradient"``.

    Args:
        names: full name of every parameter; residuals, keys of randomness and error messages use it, never a bucket's
            number, because DDP rebuilds its buckets after the first backward.
        compressor: of the gradients, or a specification, which brings its own communication.
        exchange: how payloads are averaged; of no account with a specification.
        server_compression: compress the average again, and forget what that leaves out.
        dense_steps: steps at the start that send everything.
        meter: counts what travels.
        seed: enters the keys of all randomness.
        residuals: keep what compression leaves out, and add it to the next gradient.
        rates: the learning rates of the step that follows, by parameter; asked for once a step.
        find_unused: DDP looks for unused parameters. A parameter whose gradient is 0 on all ranks then waits with its
            residual, because DDP would drop what it sends (one byte a parameter, all-reduced in each step).
        group: process group; the default one if ``None``.
    """

    def __init__(
        self,
        names: Mapping[Parameter, str],
        compressor: Compressor | Specification,
        exchange: ExchangeName,
        server_compression: bool,
        dense_steps: int,
        meter: Meter,
        seed: int = 0,
        *,
        residuals: bool = False,
        rates: Callable[[], Mapping[Parameter, float]] | None = None,
        find_unused: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.names = names
        self.dense_steps = dense_steps
        self.meter = meter
        self.rounds = 0
        self.group = group
        self.world = dist.get_world_size(group) if dist.is_initialized() else 1
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self._seed = seed
        self._ask_rates = rates
        self._asked_for_unused = find_unused
        self.use(compressor, exchange, server_compression, residuals=residuals)
        self._rates: dict[str, float] = {}
        self._works: list[Steps] = []
        self._arrived: list[_Received] = []
        self._bytes = 0
        self._non_finite: list[str | None] = []
        self._counted_alike = False

    def use(
        self,
        compressor: Compressor | Specification,
        exchange: ExchangeName,
        server_compression: bool = False,
        *,
        residuals: bool = False,
    ) -> None:
        """Compress this way from the next step on, the same on all ranks; residuals and other memories start anew.

        Raises:
            ValueError: if the compressor cannot travel that way, or there are too many ranks for it.
        """
        self._mean = make_tensor_mean(
            compressor,
            exchange,
            self.meter,
            self.group,
            residual=residuals,
            server_compression=server_compression,
            seed=self._seed,
        )
        self._dense = make_tensor_mean(None, "all_reduce", self.meter, self.group, residual=residuals)
        self.memory = GradientMemory() if residuals else None
        self._find_unused = self._asked_for_unused and residuals

    def hook(self, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        """Take one bucket of DDP's reducer; the future holds its averaged gradients.

        Raises:
            ExchangeError: if a collective failed or timed out; no residual has changed.
        """
        buffer = bucket.buffer()
        if not self._works:
            self._begin(buffer.device)
        future: Future[Tensor] = Future(devices=[buffer.device]) if buffer.is_cuda else Future()
        work = self._average(bucket, future)
        next(work)
        self._works.append(work)
        self._bytes += buffer.nbytes
        if bucket.is_last():
            self._finish()
        return future

    def _begin(self, device: torch.device) -> None:
        if not self._counted_alike:
            self._count_alike(device)
        if self.memory is not None and self._ask_rates is not None:
            self._rates = {self.names[p]: rate for p, rate in self._ask_rates().items() if p in self.names}

    def _count_alike(self, device: torch.device) -> None:
        """Let ranks that lost their counter of steps (a sidecar) go on with the others', once."""
        rounds = torch.tensor(self.rounds, device=device)
        if self.world > 1:
            with network_failures(self.rank, self.rounds, doing="begin"):
                dist.all_reduce(rounds, op=dist.ReduceOp.MAX, group=self.group)
            self.meter.all_reduce("setup", rounds.nbytes, self.world)
        self.rounds = int(rounds)
        self._counted_alike = True

    def _average(self, bucket: dist.GradBucket, future: Future[Tensor]) -> Steps:  # type: ignore[name-defined]
        mean = self._dense if self.rounds < self.dense_steps else self._mean
        buffer, tensors = bucket.buffer(), bucket.gradients()
        names = [self.names.get(param, "") for param in bucket.parameters()]
        used: list[Tensor] = []
        flat = buffer
        with self.meter.timed("encode"):
            if self._find_unused:
                used = [tensor.any() for tensor in tensors]
            if self.memory is not None:
                if buffer.dtype is not wide(buffer.dtype):  # so that small residuals are not rounded away
                    flat = buffer.to(wide(buffer.dtype))
                    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
                    tensors = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
                self.memory.compensate_(names, tensors, self._rates)
        means = yield from mean.mean_(names, tensors, flat, self.rounds)
        with self.meter.timed("encode"):
            if not means.finite():  # the same bits on all ranks, so the same answer
                index = first_non_finite(tensors)
                self._non_finite.append(None if index is None else names[index])
            arrived = _Received(buffer, names, tensors, means, used, future)
            if self.memory is None:
                _deliver(arrived)
            else:
                self._arrived.append(arrived)

    def _finish(self) -> None:
        works, self._works = self._works, []
        try:
            drain(works)
            self._keep_residuals()
        finally:
            self._arrived = []  # where an exchange has failed, DDP never gets its answers
        for mean in (self._mean, self._dense):
            mean.settle(not self._non_finite)
        self.meter.step(ring_all_reduce_bytes(self._bytes, self.world))
        self._bytes = 0
        self.rounds += 1

    def _keep_residuals(self) -> None:
        """Write new residuals into their memory, if the step was finite, and the means into DDP's buffers."""
        if self.memory is None:
            return
        idle = self._idle()
        with self.meter.timed("encode"):
            for arrived in self._arrived:
                if not self._non_finite:
                    arrived.means.leave_(arrived.tensors)
                    awake = [pair for pair in zip(arrived.names, arrived.tensors, strict=True) if pair[0] not in idle]
                    self.memory.keep([name for name, _ in awake], [tensor for _, tensor in awake], self._rates)
                _deliver(arrived, idle)

    def _idle(self) -> set[str]:
        """Return the parameters whose gradient is 0 on all ranks, the same set on each."""
        if not self._find_unused:
            return set()
        used = torch.stack([flag for arrived in self._arrived for flag in arrived.used]).to(torch.uint8)
        if self.world > 1:
            with self.meter.timed("exchange"), network_failures(self.rank, self.rounds, doing="find unused parameters"):
                dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.group)
            self.meter.all_reduce("flag", used.nbytes, self.world)
        names = [name for arrived in self._arrived for name in arrived.names]
        return {name for name, flag in zip(names, used.tolist(), strict=True) if not flag}

    def forget_non_finite(self) -> bool:
        """Whether the last average held a NaN or an infinity, the same on all ranks; residuals are as before the step."""
        found, self._non_finite = bool(self._non_finite), []
        return found

    def raise_if_non_finite(self) -> None:
        """Raise on all ranks if the last average held a NaN or an infinity.

        Raises:
            NonFiniteError: naming rank, step and parameter; residuals are as before the step.
        """
        if not self._non_finite:
            return
        mine = next((name for name in self._non_finite if name), None)
        self._non_finite = []
        order = sorted(self.names.values())
        device = next(iter(self.names)).device
        with network_failures(self.rank, self.rounds - 1, doing="look for the cause of a NaN or an infinity"):
            culprit = agree(
                0, None if mine is None else order.index(mine), False, self.meter, device, self.group
            ).culprit
        where = "the sum over ranks overflowed"
        if culprit is not None:
            where = f"the gradient of `{order[culprit[1]]}` holds a NaN or an infinity on rank {culprit[0]}"
        raise NonFiniteError(
            f"In step {self.rounds - 1} {where}, and all {self.world} ranks stopped before the optimizer's step. "
            "Look for the cause in that rank's batch or loss, or lower the learning rate."
        )

    # ---- figures and state ------------------------------------------------------------------------------------------

    def residual_norm(self) -> float:
        """Return the 2-norm of this rank's residuals."""
        return 0.0 if self.memory is None else self.memory.norm()

    def state_dict(self) -> dict[str, Any]:
        """Return the state; references. All but ``residuals`` is the same on all ranks.

        ============= ================================================================================
        ``rounds``    counter of steps, which enters the keys of randomness
        ``mean``      memories of the scheme: the starts of PowerSGD's iterations
        ``rates``     learning rates of the last step, by parameter, if there are residuals
        ``residuals`` by parameter, in units of gradients, if there are any
        ============= ================================================================================
        """
        own = {} if self.memory is None else self.memory.state_dict()
        return {"rounds": self.rounds, "mean": self._mean.state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; what is missing starts anew."""
        self.rounds = int(state.get("rounds", 0))
        self._mean.load_state_dict(state.get("mean", {}))
        if self.memory is not None:
            self.memory.load(state.get("residuals", {}), {name: param.device for param, name in self.names.items()})
            self.memory.rates = {name: float(rate) for name, rate in state.get("rates", {}).items()}


def _deliver(arrived: _Received, idle: Collection[str] = ()) -> None:
    """Give DDP the means, and 0 for idle parameters, which take no part in the step."""
    arrived.means.write_(arrived.buffer)
    parts = torch.split(arrived.buffer, [tensor.numel() for tensor in arrived.tensors])
    for name, part in zip(arrived.names, parts, strict=True):
        if name in idle:
            part.zero_()
    arrived.future.set_result(arrived.buffer)
