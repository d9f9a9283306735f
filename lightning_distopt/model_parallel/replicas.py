"""Replicas of a stage average their gradients, as they are or compressed, through the exchanges of data parallelism.

    gradients of one update ──flat by dtype──▶ mean over the replicas of this stage ──▶ the same update on all of them

Stages do not wait for each other here: each has a process group of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.compressors import Compressor, Specification
from lightning_distopt.data_parallel.exchanges import ExchangeName, choose_exchange, make_tensor_mean
from lightning_distopt.data_parallel.gradient_memory import GradientMemory
from lightning_distopt.exchange import Meter, network_failures
from lightning_distopt.exchange.base import Steps, drain
from lightning_distopt.exchange.tensor_mean import MeanTensors, TensorMean

__all__ = ["ReplicaFeedback", "ReplicaMean"]

ReplicaFeedback = Literal["gradient", "none"]


class ReplicaMean:
    """Averages the updates of one stage over its replicas.

    Args:
        names: full name of each parameter of the stage.
        group: replicas of this stage.
        meter: counts what travels.
        compressor: of the gradients; ``None`` sends them as they are.
        feedback: "gradient" keeps what compression leaves out and adds it to the next update; "none" forgets it.
        seed: of randomness.
    """

    def __init__(
        self,
        names: Mapping[Parameter, str],
        group: dist.ProcessGroup,
        meter: Meter,
        compressor: Compressor | Specification | None = None,
        feedback: ReplicaFeedback = "none",
        seed: int = 0,
    ) -> None:
        self._names, self._group, self._meter = names, group, meter
        self.replicas = dist.get_world_size(group)
        self.memory = GradientMemory() if feedback == "gradient" else None
        self.rounds = 0
        self._mean: TensorMean | None = None
        if compressor is not None:
            exchange: ExchangeName = "all_reduce"
            if isinstance(compressor, Compressor):
                exchange = choose_exchange(compressor, self.replicas)
            self._mean = make_tensor_mean(
                compressor, exchange, meter, residual=self.memory is not None, seed=seed, group=group
            )

    def average(self, updates: Mapping[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """Return the mean over replicas, which must all bring gradients of the same parameters.

        Something that is not finite on any replica makes the mean not finite on all, so that all skip alike.

        Raises:
            ExchangeError: if the collective failed or timed out.
        """
        kinds: dict[torch.dtype, list[Parameter]] = {}
        for parameter in sorted(updates, key=lambda p: self._names[p]):
            kinds.setdefault(updates[parameter].dtype, []).append(parameter)
        averaged: dict[Parameter, Tensor] = {}
        for parameters in kinds.values():
            flat = torch.cat([updates[p].detach().reshape(-1) for p in parameters])
            means = self._of_bucket(parameters, flat)
            averaged.update({p: mean.view(p.shape) for p, mean in zip(parameters, means, strict=True)})
        self.rounds += 1
        return averaged

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return what the next average depends on, by parameter; references. All but ``residuals`` is alike in all replicas.

        ============= ================================================================================
        ``residuals`` what has not been sent, in units of gradients
        ``queries``   starts of PowerSGD's iterations
        ``rounds``    averages so far
        ============= ================================================================================
        """
        return {
            "residuals": {} if self.memory is None else dict(self.memory.residuals),
            "queries": {} if self._mean is None else self._mean.state_dict().get("queries", {}),
            "rounds": dict.fromkeys(self._names.values(), self.rounds),
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from there with the parameters of this stage; what is missing starts anew."""
        devices = {name: parameter.device for parameter, name in self._names.items()}
        if self.memory is not None:
            self.memory.load(state.get("residuals", {}), devices)
        if self._mean is not None:
            self._mean.load_state_dict({"queries": {n: q for n, q in state.get("queries", {}).items() if n in devices}})
        self.rounds = max((int(count) for n, count in state.get("rounds", {}).items() if n in devices), default=0)

    def _of_bucket(self, parameters: list[Parameter], flat: Tensor) -> list[Tensor]:
        numels = [p.numel() for p in parameters]
        if self._mean is None:
            with self._meter.timed("exchange"), network_failures(dist.get_rank(), self.rounds):
                dist.all_reduce(flat, group=self._group)
            self._meter.all_reduce("replicas", flat.nbytes, self.replicas)
            return list(torch.split(flat / self.replicas, numels))
        names = [self._names[p] for p in parameters]
        tensors = [part.view(p.shape) for p, part in zip(parameters, torch.split(flat, numels), strict=True)]
        if self.memory is not None:
            self.memory.compensate_(names, tensors, {})
        arrived: list[MeanTensors] = []

        def steps(mean: TensorMean) -> Steps:
            arrived.append((yield from mean.mean_(names, tensors, flat, self.rounds)))

        drain([steps(self._mean)])
        (means,) = arrived
        out = torch.empty_like(flat)
        means.write_(out)
        finite = means.finite()
        if self.memory is not None and finite:
            means.leave_(tensors)
            self.memory.keep(names, tensors, {})
        self._mean.settle(finite)
        return list(torch.split(out, numels))
