"""Outer optimizers: the exact equivalences of FedMom, and what any optimizer of torch does with a pseudo-gradient."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.data_parallel import FedMom, OuterOptimizer, Plain, TorchOuter
from lightning_distopt.data_parallel.torch_outer import as_outer_optimizer

ROUNDS, SIZE = 30, 7
# the tolerances of the specification: rounding
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6}
DTYPES = pytest.mark.parametrize("dtype", CLOSE, ids=str)


def decaying(round: int) -> float:
    return 0.7 * 0.97**round


class Quadratic:
    """A pseudo-gradient that depends on the model: ``A (w - w*)`` plus noise of the round."""

    def __init__(self, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(3)
        self.curvature = torch.rand(SIZE, generator=draw, dtype=torch.float64).to(dtype)
        self.target = torch.randn(SIZE, generator=draw, dtype=torch.float64).to(dtype)
        self.noise = 0.1 * torch.randn(ROUNDS, SIZE, generator=draw, dtype=torch.float64).to(dtype)
        self.start = torch.randn(SIZE, generator=draw, dtype=torch.float64).to(dtype)

    def __call__(self, w: Tensor, t: int) -> Tensor:
        return self.curvature * (w - self.target) + self.noise[t]


def path(outer: OuterOptimizer, problem: Quadratic) -> Tensor:
    """The models after each round, shape (rounds, size)."""
    w, memory, models = problem.start.clone(), dict[str, Any](), []
    for t in range(ROUNDS):
        outer.step_([w], [problem(w, t)], [memory], t)
        models.append(w.clone())
    return torch.stack(models)


def by_hand(problem: Quadratic, step: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    w, models = problem.start.clone(), []
    for t in range(ROUNDS):
        w = step(w, problem(w, t), t)
        models.append(w)
    return torch.stack(models)


def sgd(problem: Quadratic, lr: Callable[[int], float], **arguments: Any) -> Tensor:
    param = Parameter(problem.start.clone())
    optimizer = torch.optim.SGD([param], lr=lr(0), **arguments)
    models = []
    for t in range(ROUNDS):
        optimizer.param_groups[0]["lr"] = lr(t)
        param.grad = problem(param.detach(), t)
        optimizer.step()
        models.append(param.detach().clone())
    return torch.stack(models)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@DTYPES
def test_at_a_constant_rate_it_is_torchs_nesterov(dtype: torch.dtype) -> None:
    problem = Quadratic(dtype)
    ours = path(FedMom(0.7, 0.9), problem)
    assert apart(ours, sgd(problem, lambda t: 0.7, momentum=0.9, nesterov=True)) <= CLOSE[dtype]
    through = TorchOuter("torch.optim.SGD", {"lr": 0.7, "momentum": 0.9, "nesterov": True})
    assert apart(path(through, problem), ours) <= CLOSE[dtype]


@DTYPES
def test_it_is_not_the_heavy_ball(dtype: torch.dtype) -> None:
    problem = Quadratic(dtype)
    assert apart(path(FedMom(0.7, 0.9), problem), sgd(problem, lambda t: 0.7, momentum=0.9)) > 0.1


@DTYPES
def test_with_a_schedule_it_is_the_displacement_form_and_not_torchs(dtype: torch.dtype) -> None:
    problem = Quadratic(dtype)
    ours = path(FedMom(decaying, 0.9), problem)
    p = torch.zeros_like(problem.start)

    def displace(w: Tensor, g: Tensor, t: int) -> Tensor:
        nonlocal p
        p = 0.9 * p - decaying(t) * g
        return w + 0.9 * p - decaying(t) * g

    assert apart(ours, by_hand(problem, displace)) <= CLOSE[dtype]
    assert apart(ours, sgd(problem, decaying, momentum=0.9, nesterov=True)) > 1e-2


@DTYPES
def test_it_is_the_two_equations(dtype: torch.dtype) -> None:
    """E3 and E4 as they are written, and b_t of the equivalences."""
    problem = Quadratic(dtype)
    v, b = problem.start.clone(), torch.zeros_like(problem.start)

    def equations(w: Tensor, g: Tensor, t: int) -> Tensor:
        nonlocal v, b
        before, v = v, w - 0.7 * g
        b = 0.9 * b + g
        torch.testing.assert_close(b, -(v - before) / 0.7, rtol=0, atol=100 * CLOSE[dtype])
        return v + 0.9 * (v - before)

    assert apart(path(FedMom(0.7, 0.9), problem), by_hand(problem, equations)) <= CLOSE[dtype]


@DTYPES
@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_without_momentum_it_is_federated_averaging_exactly(dtype: torch.dtype, lr: float) -> None:
    problem = Quadratic(dtype)
    assert torch.equal(path(FedMom(lr, 0.0), problem), path(Plain(lr), problem))


@DTYPES
def test_a_constant_displacement_is_amplified_by_one_over_one_minus_momentum(dtype: torch.dtype) -> None:
    w, memory = torch.zeros(1, dtype=dtype), dict[str, Any]()
    for t in range(300):
        before = w.clone()
        FedMom(0.1, 0.9).step_([w], [torch.ones_like(w)], [memory], t)
    assert float(w - before) == pytest.approx(-1.0, abs=1e-4 if dtype is torch.float32 else 1e-11)


@DTYPES
def test_the_scalar_trace(dtype: torch.dtype) -> None:
    w, memory, trace = torch.ones(1, dtype=dtype), dict[str, Any](), []
    for t in range(5):
        FedMom(0.5, 0.9).step_([w], [w.clone()], [memory], t)
        trace.append(float(w))
    assert trace == pytest.approx([0.05, -0.4025, -0.404875, -0.20350625, -0.0111371875], abs=CLOSE[dtype])


@given(st.floats(0.01, 2.0), st.floats(0.0, 0.99), st.integers(0, 2**31))
def test_any_rate_and_momentum_agree_with_torch(lr: float, momentum: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    w, param = (torch.ones(3, dtype=torch.float64), Parameter(torch.ones(3, dtype=torch.float64)))
    optimizer = torch.optim.SGD([param], lr=lr, momentum=momentum, nesterov=momentum > 0)
    memory: dict[str, Any] = {}
    for t in range(5):
        g = torch.randn(3, generator=draw, dtype=torch.float64)
        param.grad = g.clone()
        optimizer.step()
        FedMom(lr, momentum).step_([w], [g], [memory], t)
    torch.testing.assert_close(w, param.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("path_", "arguments"),
    [
        ("torch.optim.Adam", {"lr": 0.1}),
        ("torch.optim.Adagrad", {"lr": 0.1}),
        ("torch.optim.AdamW", {"lr": 0.1, "weight_decay": 0.1}),
        ("torch.optim.NAdam", {}),
        ("torch.optim.SGD", {"lr": 1.0}),
    ],
)
def test_any_optimizer_of_torch_steps_as_it_does_by_itself(path_: str, arguments: dict[str, Any]) -> None:
    problem = Quadratic(torch.float64)
    outer = TorchOuter(path_, arguments)
    param = Parameter(problem.start.clone())
    optimizer = outer.optimizer([param], **arguments)  # type: ignore[call-arg]
    models = []
    for t in range(ROUNDS):
        param.grad = problem(param.detach(), t)
        optimizer.step()
        models.append(param.detach().clone())
    assert torch.equal(path(outer, problem), torch.stack(models))


def test_its_memory_is_plain_values_and_it_goes_on_from_them() -> None:
    for outer in (FedMom(0.7, 0.9), TorchOuter("torch.optim.Adam", {"lr": 0.1})):
        w, memory = torch.ones(2), dict[str, Any]()
        outer.step_([w], [torch.ones(2)], [memory], 0)
        assert memory
        assert all(isinstance(value, (Tensor, int, float)) for value in memory.values())
        again, kept = w.clone(), {name: v.clone() if isinstance(v, Tensor) else v for name, v in memory.items()}
        outer.step_([w], [torch.ones(2)], [memory], 1)
        pickle.loads(pickle.dumps(outer)).step_([again], [torch.ones(2)], [kept], 1)
        assert torch.equal(w, again)


def test_from_text() -> None:
    assert as_outer_optimizer("plain") == Plain(1.0)
    assert as_outer_optimizer("fedmom") == FedMom(1.0, 0.9)
    assert as_outer_optimizer("torch.optim.Adagrad") == TorchOuter(torch.optim.Adagrad)
    assert as_outer_optimizer(FedMom(0.7)) == FedMom(0.7, 0.9)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FedMom(0.0), ["`lr` must be above 0", "got 0.0", "`lr=1.0`"]),
        (lambda: FedMom(float("nan")), ["`lr`", "nan"]),
        (lambda: FedMom(1.0, 1.0), ["`momentum` must be in [0, 1)", "got 1.0", "`momentum=0.9`"]),
        (lambda: Plain(-1), ["`lr` must be above 0", "got -1"]),
        (
            lambda: Plain(lambda t: -1.0).step_([torch.ones(1)], [torch.ones(1)], [{}], 4),
            ["at least 0", "got -1.0 in round 4"],
        ),
        (lambda: as_outer_optimizer("nesterov"), ["`outer_optimizer` must be 'plain', 'fedmom'", "'nesterov'"]),
        (lambda: as_outer_optimizer("torch.optim.Sgd"), ["class path", "'torch.optim.Sgd' was not found"]),
        (
            lambda: as_outer_optimizer("torch.nn.Linear"),
            ["class path", "'torch.nn.Linear' was not found", "pass the class"],
        ),
        (lambda: TorchOuter("torch.optim.SGD", {"rate": 1}), ["`arguments` must suit SGD", "'rate': 1", "'lr': 0.1"]),
        (lambda: TorchOuter("torch.optim.LBFGS"), ["LBFGS", "without a closure"]),
    ],
)
def test_bad_input_is_named(make: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), caught.value


def test_something_else_than_text_or_an_outer_optimizer() -> None:
    with pytest.raises(TypeError, match="`outer_optimizer` must be text or an `OuterOptimizer`: got 3"):
        as_outer_optimizer(3)  # type: ignore[arg-type]
