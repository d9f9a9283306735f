"""What a black box can do wrong, and what can be asked wrongly: typed errors with the numbers and the cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_distopt.errors import BudgetError, NonDeterministicError, NonFiniteError, QueryError, QueryShapeError
from lightning_distopt.optimizers.proximal import NuclearNorm
from lightning_distopt.zeroth_order import (
    CoordinateEstimator,
    GaussianEstimator,
    RetryPolicy,
    ZOProxSAGA,
    ZOProxSGD,
    ZOProxSVRG,
)
from tests.zeroth_order.problems import FORMS, Problem

METHODS = [ZOProxSGD, ZOProxSVRG, ZOProxSAGA]


def x(*values: float, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values or (1.0, 2.0, 3.0), dtype=dtype))


BAD_ANSWERS: list[tuple[Callable[[Tensor, Tensor], Any], type[Exception], tuple[str, ...]]] = [
    (lambda x, i: x.square().sum(), QueryShapeError, ("2 losses", "shape ()", "mean", "reduction='none'")),
    (lambda x, i: x.square().sum().expand(i.shape[0], 2), QueryShapeError, ("shape (2,)", "(2, 2)")),
    (lambda x, i: x.square().sum().expand(i.shape[0] + 1), QueryShapeError, ("(3,)",)),
    (
        lambda x, i: torch.where(i == 1, torch.nan, x.sum()),
        NonFiniteError,
        ("1 of 2 samples", "number 1", "`smoothing`"),
    ),
    (lambda x, i: x.sum().expand(i.shape).half(), TypeError, ("32 bits", "float16", ".float()")),
    (lambda x, i: x.sum().expand(i.shape).long(), TypeError, ("int64",)),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", range(len(BAD_ANSWERS)))
def test_answers_that_cannot_be_used(form: str, method: Any, case: int) -> None:
    f, kind, words = BAD_ANSWERS[case]
    problem = Problem(f, torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = method(problem.params, n_samples=8, lr=0.1)
    with pytest.raises(kind) as error:
        optimizer.step(**problem.asks(form))
    assert all(word in str(error.value) for word in words), error.value
    assert problem.flat().tolist() == [1.0, 2.0]
    assert optimizer.steps == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_query_that_answers_differently_is_found_at_the_start(method: Any) -> None:
    parameter = x()
    optimizer = method([parameter], n_samples=8, lr=0.1)
    with pytest.raises(NonDeterministicError) as error:
        optimizer.step(lambda i: parameter.sum() + torch.randn(len(i)))
    assert "sample 0" in str(error.value)
    assert "eval mode" in str(error.value)
    assert optimizer.queries == 0
    assert optimizer.check_queries == 4


def test_a_budget_must_hold_one_snapshot_a_table_or_a_step() -> None:
    for method, least in ((ZOProxSGD, 6 * 4), (ZOProxSVRG, 6 * (8 + 8)), (ZOProxSAGA, 6 * (8 + 4))):
        method([x()], n_samples=8, lr=0.1, max_queries=least)
        with pytest.raises(BudgetError) as error:
            method([x()], n_samples=8, lr=0.1, max_queries=least - 1)
        assert isinstance(error.value, ValueError)
        assert (error.value.needed, error.value.left) == (least, least - 1)
        assert all(word in str(error.value) for word in (str(least), "8 samples", "GaussianEstimator")), error.value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_a_budget_is_never_exceeded(method: Any, form: str) -> None:
    problem = Problem(lambda x, i: (x * i[..., None]).square().sum(-1), torch.ones(3, dtype=torch.float64))
    optimizer = method(problem.params, n_samples=8, lr=1e-3, max_queries=300)
    steps = 0
    while optimizer.queries + optimizer.next_queries() <= 300:
        optimizer.step(**problem.asks(form))
        steps += 1
    with pytest.raises(BudgetError, match="of 300 are left"):
        optimizer.step(**problem.asks(form))
    assert steps == optimizer.steps > 2
    assert optimizer.queries <= 300 < optimizer.queries + optimizer.next_queries()


@pytest.mark.parametrize(
    ("dtype", "smoothing", "words"),
    [
        (torch.float32, 1e-8, ("1.2e-06", "1e-08", "0.005")),
        (torch.float64, 1e-16, ("2.2e-15",)),
        (torch.float64, 0.0, ("0.0",)),
    ],
)
def test_a_smoothing_below_rounding_is_refused(dtype: torch.dtype, smoothing: float, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="`smoothing`") as error:
        ZOProxSGD([x(dtype=dtype)], n_samples=8, smoothing=smoothing)
    assert all(word in str(error.value) for word in words), error.value


def test_differences_within_rounding_are_warned_of() -> None:
    parameter = x()
    optimizer = ZOProxSGD([parameter], n_samples=8, lr=0.1, estimator=GaussianEstimator())
    with pytest.warns(UserWarning, match="hard labels"):
        optimizer.step(lambda i: (parameter > 0).double().sum().expand(len(i)))


def test_a_failing_query_is_asked_again_and_counted_once() -> None:
    problem = Problem(lambda x, i: x.square().sum().expand(len(i)), torch.ones(3, dtype=torch.float64))
    calls = 0

    def flaky(indices: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 3:
            raise ConnectionError("reset by peer")
        return problem.closure(indices)

    optimizer = ZOProxSVRG(problem.params, n_samples=8, lr=0.1, retry=RetryPolicy(attempts=3, wait=0.0))
    for _ in range(3):
        optimizer.step(flaky)
    assert optimizer.queries + optimizer.check_queries == problem.asked
    assert optimizer.queries == 6 * (2 * 8 + 3 * 8)


def test_a_query_that_is_given_up_leaves_a_step_that_can_be_repeated() -> None:
    for method in METHODS:
        torch.manual_seed(0)
        problem = Problem(lambda x, i: (x - i[:, None]).square().sum(-1), torch.randn(3, dtype=torch.float64))
        other = Problem(problem.f, *[p.detach() for p in problem.params])
        straight = method(other.params, n_samples=8, lr=0.01)
        fails, calls = {7, 9, 40}, 0

        def flaky(indices: Tensor, problem: Problem = problem, fails: set[int] = fails) -> Tensor:
            nonlocal calls
            calls += 1
            if calls in fails:
                raise TimeoutError("no answer")
            return problem.closure(indices)

        optimizer = method(problem.params, n_samples=8, lr=0.01)
        said: list[str] = []
        while optimizer.steps < 5:
            before = problem.flat()
            try:
                optimizer.step(flaky)
            except QueryError as error:
                said.append(str(error))
                assert torch.equal(problem.flat(), before)
        assert said
        assert all("no answer" in text and "RetryPolicy(attempts" in text for text in said)
        for _ in range(5):
            straight.step(other.closure)
        assert torch.equal(problem.flat(), other.flat())
        assert (
            problem.asked == optimizer.queries + optimizer.check_queries
        )  # what was answered is counted, nothing else


def test_other_errors_of_a_query_pass() -> None:
    parameter = x()

    def broken(indices: Tensor) -> Tensor:
        raise KeyError("feature")

    with pytest.raises(KeyError, match="feature"):
        ZOProxSGD([parameter], n_samples=8, lr=0.1, retry=RetryPolicy(attempts=5, wait=100.0)).step(broken)


def test_an_objective_that_cannot_be_vectorised_says_so() -> None:
    with pytest.raises(QueryError, match=r"step\(closure\)"):
        ZOProxSGD([x()], n_samples=8, lr=0.1).step(
            objective=lambda p, i: p[0].sum().expand(i.shape) * float(p[0].max())
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n_samples": 0}, ("`n_samples`", "0")),
        ({"lr": -1.0}, ("`lr`", "-1.0")),
        ({"batch_size": 9}, ("`batch_size`", "9 of 8")),
        ({"batch_size": 0}, ("`batch_size`", "0")),
        ({"inner_steps": 0}, ("`inner_steps`", "0")),
        ({"max_queries": 1.5}, ("`max_queries`", "1.5")),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_arguments_out_of_range(method: Any, arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        method([x()], **{"n_samples": 8, "lr": 0.1, **arguments})
    assert all(word in str(error.value) for word in words), error.value


def test_arguments_of_single_methods() -> None:
    with pytest.raises(ValueError, match=r"ZOProxSVRG.*keeps no table"):
        ZOProxSAGA([x()], n_samples=8, lr=0.1, max_table_bytes=191)
    ZOProxSAGA([x()], n_samples=8, lr=0.1, max_table_bytes=192)
    with pytest.raises(ValueError, match="`anchor_batch`"):
        ZOProxSVRG([x()], n_samples=8, lr=0.1, anchor_batch=9)
    with pytest.raises(ValueError, match="`schedule`"):
        ZOProxSGD([x()], n_samples=8, lr=0.1, schedule="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matrix"):
        ZOProxSGD([x()], n_samples=8, lr=0.1, proximal=NuclearNorm(1.0))
    with pytest.raises(TypeError, match="`estimator`"):
        ZOProxSGD([x()], n_samples=8, lr=0.1, estimator=CoordinateEstimator)
    with pytest.raises(TypeError, match="`proximal`"):
        ZOProxSGD([x()], n_samples=8, lr=0.1, proximal=0.1)
    with pytest.raises(TypeError, match="neither"):
        ZOProxSGD([x()], n_samples=8, lr=0.1).step()
    with pytest.raises(TypeError, match="both"):
        ZOProxSGD([x()], n_samples=8, lr=0.1).step(lambda i: i, objective=lambda p, i: i)
    with pytest.raises(ValueError, match="one type"):
        ZOProxSGD([x(), x(dtype=torch.float32)], n_samples=8, lr=0.1)
    with pytest.raises(ValueError, match="contiguous"):
        ZOProxSGD([nn.Parameter(torch.ones(3, 2).T)], n_samples=8, lr=0.1)
    with pytest.raises(ValueError, match="`attempts`"):
        RetryPolicy(attempts=0)


def test_a_flat_start_needs_a_rate() -> None:
    parameter = x()
    with pytest.raises(ValueError, match="`lr`"):
        ZOProxSGD([parameter], n_samples=8).step(
            lambda i: parameter.sum() * 0 + torch.ones(len(i), dtype=torch.float64)
        )


def test_a_state_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="zeroth-order"):
        ZOProxSGD([x()], n_samples=8).load_state_dict(torch.optim.SGD([x()], lr=0.1).state_dict())


def test_a_smoothing_that_rounding_swallows_beside_one_large_entry_is_refused_before_anything_moves() -> None:
    x = torch.nn.Parameter(torch.tensor([1e5] + [0.0] * 99))
    optimizer = ZOProxSGD([x], n_samples=30, lr=0.1, smoothing=2e-3)
    with pytest.raises(ValueError, match=r"must move every parameter: 0\.002.* beside entry 0 of 100000\.0"):
        optimizer.step(lambda indices: x.sum().expand(len(indices)).double())
    assert x.tolist() == [1e5] + [0.0] * 99


def test_numbers_of_python_keep_their_64_bits() -> None:
    x = torch.nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
    optimizer = ZOProxSGD(
        [x], n_samples=2, lr=1.0, batch_size=2, smoothing=1e-6, replacement=False, schedule="constant"
    )
    optimizer.step(lambda indices: [float(x.detach()) ** 2 for _ in indices])
    assert abs(float(x.detach()) - (0.3 - 0.6)) < 1e-8


def test_failures_of_another_client_may_be_named() -> None:
    asked = []

    def sometimes(indices: Tensor) -> Tensor:
        asked.append(len(indices))
        if len(asked) == 3:
            raise KeyError("busy")
        return torch.zeros(len(indices), dtype=torch.float64) + float(x.detach().sum())

    x = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    policy = RetryPolicy(attempts=2, wait=0.0, errors=(OSError, KeyError))
    ZOProxSGD([x], n_samples=4, lr=0.1, retry=policy).step(sometimes)
    assert len(asked) > 3
