"""Steps of the loss table: the specification's oracles, a search, and the compiled twins."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_distopt.primal_dual import kernels
from lightning_distopt.primal_dual.losses import LOSSES, Loss, loss_named

ORACLES = {
    "squared": 0.1875,
    "twice_squared": 0.363636363636,
    "hinge": 0.8,
    "smoothed_hinge": 0.1875,
    "squared_hinge": 0.1875,
    "logistic": 0.155832332942,
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@each_loss
def test_step_gives_the_oracle(loss: Loss) -> None:
    assert loss.step(0.2, 1.0, 0.5, 0.6) == pytest.approx(ORACLES[loss.name], abs=1e-11)


def _objective(loss: Loss, alpha: float, y: float, z: float, q: float, delta: np.ndarray) -> np.ndarray:
    moved = alpha + delta
    dual = np.where(
        loss.feasible(moved, np.full_like(moved, y)) == moved, loss.dual(moved, np.full_like(moved, y)), -np.inf
    )
    return dual - z * delta - q / 2 * delta**2


@each_loss
@settings(max_examples=60, deadline=None)
@given(
    beta=st.floats(0, 1),
    sign=st.sampled_from([-1.0, 1.0]),
    z=st.floats(-50, 50),
    logq=st.floats(-3, 3),
)
def test_step_is_the_best_one_on_the_line(loss: Loss, beta: float, sign: float, z: float, logq: float) -> None:
    q, alpha = 10**logq, sign * beta
    delta = loss.step(alpha, sign, z, q)
    moved = np.array([alpha + delta])
    np.testing.assert_allclose(loss.feasible(moved, np.array([sign])), moved, atol=1e-12)
    near = delta + np.linspace(-1, 1, 2001) * max(1.0, abs(delta))
    best = _objective(loss, alpha, sign, z, q, near).max()
    own = _objective(loss, alpha, sign, z, q, loss.feasible(moved, np.array([sign])) - alpha)[0]
    assert own >= best - 1e-9 * max(1.0, abs(best))


@each_loss
def test_kernel_step_equals_the_reference(loss: Loss) -> None:
    rng = np.random.default_rng(1)
    for _ in range(2000):
        y = rng.choice([-1.0, 1.0]) if loss.labels else rng.normal()
        alpha, z = y * rng.random(), rng.choice([-50.0, 50.0, rng.uniform(-50, 50)])
        q = float(10 ** rng.uniform(-3, 3))
        found = kernels.step(loss.code, loss.smoothing, alpha, y, z, q)
        assert found == pytest.approx(loss.step(alpha, y, z, q), abs=1e-10)


@each_loss
def test_an_empty_row_is_solved_in_closed_form(loss: Loss) -> None:
    delta = kernels.step(loss.code, loss.smoothing, 0.0, 1.0, 0.0, 0.0)
    assert loss.dual(np.array([delta]), np.ones(1))[0] == pytest.approx(float(loss.value(np.zeros(1), np.ones(1))[0]))


@each_loss
def test_the_dual_is_the_conjugate(loss: Loss) -> None:
    # phi(z) >= dual(a) - (-a)(z)... : Fenchel's inequality phi(z) + phi*(-a) >= -a z, with equality at the best a.
    y, z = np.ones(1), np.linspace(-4, 4, 81)
    candidates = loss.feasible(np.linspace(-8, 12, 40001), np.ones(40001))
    dual = loss.dual(candidates, np.ones_like(candidates))
    for point in z:
        best = float((dual - candidates * point).max())
        assert best == pytest.approx(float(loss.value(np.array([point]), y)[0]), abs=1e-6)


def test_an_unknown_loss_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"`loss` must be one of .*'logstic'.*Did you mean 'logistic'"):
        loss_named("logstic")


def test_logistic_is_finite_far_out() -> None:
    logistic = LOSSES["logistic"]
    assert float(logistic.value(np.array([-1000.0]), np.ones(1))[0]) == 1000.0
    assert math.isfinite(kernels.step(logistic.code, 0.0, 0.5, 1.0, 1e6, 1e6))
