"""Small problems with known answers, and ways to ask them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.zeroth_order.asking import Ask, Layout, QueryCount
from lightning_distopt.zeroth_order.closure import ClosureAsk
from lightning_distopt.zeroth_order.estimators import Draw
from lightning_distopt.zeroth_order.functional import FunctionalAsk
from lightning_distopt.zeroth_order.retry import RetryPolicy

Form = str
FORMS = ("closure", "objective")


class Problem:
    """f_i over parameters of any shapes, asked in both ways; counts what it is asked.

    Args:
        f: ``f(flat parameters, indices) -> losses``.
        start: the parameters.
    """

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], *start: Tensor) -> None:
        self.f = f
        self.params = [Parameter(tensor.clone()) for tensor in start]
        self.asked = 0

    def closure(self, indices: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.asked += len(indices)
        return self.f(torch.cat([p.reshape(-1) for p in self.params]), indices)

    def objective(self, params: tuple[Tensor, ...], indices: Tensor) -> Tensor:
        return self.f(torch.cat([p.reshape(-1) for p in params]), indices)

    def asks(self, form: Form) -> dict[str, Any]:
        return {form: getattr(self, form)}

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def ask(self, form: Form) -> Ask:
        layout, count = Layout(self.params), QueryCount()
        if form == "closure":
            return ClosureAsk(self.closure, layout, count, RetryPolicy())
        return FunctionalAsk(self.objective, layout, count, RetryPolicy(), 1 << 20)


def draw(samples: int, step: int = 0, team: Any = None) -> Draw:
    return Draw(torch.arange(samples), 0, step, "test", samples, team)


def sigmoid_problem(n: int = 400, d: int = 30, dtype: torch.dtype = torch.float64) -> tuple[Problem, Tensor, Tensor]:
    """The classification problem of the specification: unit rows, labels of a sparse direction, noise 0.2."""
    generator = torch.Generator().manual_seed(7)
    a = torch.randn(n, d, generator=generator, dtype=torch.float64)
    a /= a.norm(dim=1, keepdim=True)
    truth = torch.zeros(d, dtype=torch.float64)
    truth[:6] = torch.randn(6, generator=generator, dtype=torch.float64) * 3
    y = (a @ truth + 0.2 * torch.randn(n, generator=generator, dtype=torch.float64)).sign()
    a, y = a.to(dtype), y.to(dtype)

    def f(x: Tensor, indices: Tensor) -> Tensor:
        return torch.sigmoid(-y[indices] * (a[indices] @ x))

    return Problem(f, torch.zeros(d, dtype=dtype)), a, y
