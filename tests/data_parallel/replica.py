"""One rank of a run of the update engine, on a few tensors of odd shapes whose gradients come from a given problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.compressors import parse
from lightning_distopt.data_parallel import UpdateSync, UpdateSyncConfig
from lightning_distopt.exchange import Meter
from tests.data_parallel.reference import Problem

SHAPES: dict[str, tuple[int, ...]] = {"w": (5, 7), "bias": (13,), "scale": (), "v": (40, 3)}
NAMES = list(SHAPES)
SIZES = [torch.Size(shape).numel() for shape in SHAPES.values()]
SIZE = sum(SIZES)


def config(compressor: str = "sign", exchange: str = "all_gather", **changes: Any) -> UpdateSyncConfig:
    """A configuration from text; the rest by name."""
    return UpdateSyncConfig(parse(compressor), exchange, **changes)  # type: ignore[arg-type]


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def my_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def decaying(step: int) -> float:
    """A learning rate with a schedule."""
    return 0.05 * 0.97**step


class Replica:
    """A model, an optimizer and an engine.

    Args:
        config: of the engine.
        dtype: of the parameters.
        optimizer: builds the optimizer.
        lr: learning rate of each step.
        noise: of the problem's gradients.
    """

    def __init__(
        self,
        config: UpdateSyncConfig,
        dtype: torch.dtype = torch.float64,
        optimizer: Callable[[Iterable[Parameter]], torch.optim.Optimizer] | None = None,
        lr: Callable[[int], float] | None = decaying,
        noise: float = 1.0,
    ) -> None:
        self.problem = Problem(world_size(), SIZE, noise)
        self.params = {
            name: Parameter(part.reshape(shape).to(dtype, copy=True))
            for (name, shape), part in zip(SHAPES.items(), self.problem.start.split(SIZES), strict=True)
        }
        make = optimizer or (lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01))
        self.optimizer = make(self.params.values())
        self.lr = lr
        self.meter = Meter()
        self.sync = UpdateSync(config, self.meter)
        self.steps = 0

    def track(self, names: Sequence[str] = tuple(SHAPES), owner: tuple[int, ...] = (0,)) -> None:
        self.sync.track({n: self.params[n] for n in names}, dict.fromkeys(names, owner))

    def take_gradients(self, scale: float = 1.0) -> None:
        """Accumulate the gradients of this rank and step at where the parameters are now."""
        point = flat(self.params).double()
        gradient = scale * self.problem.gradient(my_rank(), self.steps, point)
        for p, g in zip(self.params.values(), gradient.split(SIZES), strict=True):
            g = g.reshape(p.shape).to(p.dtype)
            p.grad = g if p.grad is None else p.grad + g

    def local_step(self) -> None:
        if self.lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def step(self) -> bool:
        """One training step of the strategy's call order; whether it ended a round."""
        self.track()
        self.sync.enter()
        self.take_gradients()
        self.local_step()
        return self.sync.exchange()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    @property
    def x(self) -> Tensor:
        """The common model, wherever it is kept now."""
        with self.sync.common_model():
            return flat(self.params)

    @property
    def e(self) -> Tensor:
        return by_name(self.sync.state_dict()["residuals"])

    @property
    def s(self) -> Tensor:
        """The server's residual: of a replicated one, or this rank's pieces and 0 elsewhere."""
        state = self.sync.state_dict()
        return by_name(state["server"]) + pieces(state)


def flat(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().reshape(-1) for value in values.values()])


def by_name(values: Mapping[str, Tensor]) -> Tensor:
    """Lay named tensors end to end in the model's order, in float64; zeros where one is missing."""
    return torch.cat(
        [
            values[name].reshape(-1).double() if name in values else torch.zeros(n, dtype=torch.float64)
            for name, n in zip(SHAPES, SIZES, strict=True)
        ]
    )


def pieces(state: Mapping[str, Any]) -> Tensor:
    """Lay a state's pieces of a sharded server's residual into the model's order."""
    whole = {name: torch.zeros(n, dtype=torch.float64) for name, n in zip(SHAPES, SIZES, strict=True)}
    for name, those in state["shards"].items():
        for piece in those:
            start, values = piece["start"], piece["values"]
            whole[name][start : start + values.numel()] += values
    return by_name(whole)
