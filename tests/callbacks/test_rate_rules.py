"""The rules as functions of norms: the numbers of the specification, and what holds for all norms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_distopt.callbacks import rate_rules as rules
from lightning_distopt.callbacks.norms import norms

W = torch.tensor([3.0, 4.0], dtype=torch.float64)
G = torch.tensor([0.7, 0.1], dtype=torch.float64)  # the mean of (0.6, 0.8) and (0.8, -0.6), both of norm 1


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def run(rule: str, decay: float = 0.0, n: float = 1.0) -> list[tuple[float, list[float]]]:
    """Return scale and weights after two steps with rate 0.1 and momentum 0.9, written out."""
    w, buffer, found = W.clone(), None, []
    for _ in range(2):
        d = G + decay * w
        if rule == "lars":
            s = rules.lars(one(w.norm()), one(G.norm()), one(decay), 0.001)
            buffer = 0.1 * s * d if buffer is None else 0.9 * buffer + 0.1 * s * d
            w = w - buffer
        else:
            buffer = d if buffer is None else 0.9 * buffer + d
            s = (
                rules.clars_authors(one(w.norm()), one(d.norm()), one(n), 0.01, 0.1)
                if rule == "clars_authors"
                else rules.lars_outside(one(w.norm()), one(d.norm()), 0.001)
            )
            w = w - 0.1 * s * buffer
        found.append((float(s), w.tolist()))
    return found


@pytest.mark.parametrize(
    ("rule", "decay", "n", "scales", "first", "second"),
    [
        ("clars_authors", 0.0, 1.0, (0.04999988, 0.04997489), (2.99650001, 3.99950000), (2.98985335, 3.99855048)),
        ("clars_authors", 2e-4, 1.0, (0.04999988, 0.04997484), (2.99649701, 3.99949600), (2.98984466, 3.99853888)),
        ("clars_authors", 0.0, 0.1, (0.1, None), (2.993, 3.999), None),
        ("lars_outside", 0.0, 1.0, (0.00707106, 0.00707056), (2.99950503, 3.99992929), (2.99856464, 3.99979495)),
        ("lars", 5e-4, 1.0, (0.00704616, 0.00704566), (2.99950571, 3.99992813), (2.99856660, 3.99979158)),
    ],
)
def test_the_golden_numbers(
    rule: str,
    decay: float,
    n: float,
    scales: tuple[float, float | None],
    first: tuple[float, float],
    second: tuple[float, float] | None,
) -> None:
    (s1, w1), (s2, w2) = run(rule, decay, n)
    assert s1 == pytest.approx(scales[0], abs=1e-8)
    assert w1 == pytest.approx(first, abs=1e-8)
    if second is not None:
        assert s2 == pytest.approx(scales[1], abs=1e-8)
        assert w2 == pytest.approx(second, abs=1e-8)


positive = st.floats(1e-3, 1e3)


@settings(deadline=None, max_examples=50)
@given(w=positive, g=positive, eta=st.floats(1e-4, 1e-1))
def test_equal_probes_make_clars_lars(w: float, g: float, eta: float) -> None:
    clars = rules.clars(one(w), one(g), eta, clip=1e9)
    assert float(clars) == pytest.approx(float(rules.lars(one(w), one(g), one(0.0), eta)), rel=1e-12)
    authors = rules.clars_authors(one(w), one(g), one(g), eta, clip=1e9, eps=0.0)
    assert float(clars) == pytest.approx(float(authors), rel=1e-12)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1000), parts=st.integers(1, 8))
def test_rho_is_at_most_one_where_probes_partition_the_batch(seed: int, parts: int) -> None:
    probes = torch.randn(parts, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert float(probes.mean(0).norm() / probes.norm(dim=1).mean()) <= 1 + 1e-12


@settings(deadline=None, max_examples=50)
@given(w=positive, g=positive, n=positive, c=st.floats(1e-2, 1e2))
def test_updates_do_not_depend_on_the_scale_of_the_loss(w: float, g: float, n: float, c: float) -> None:
    for scaled, plain in (
        (c * rules.clars(one(w), one(c * n), 0.01, 1e9), rules.clars(one(w), one(n), 0.01, 1e9)),
        (c * rules.lars(one(w), one(c * g), one(0.0), 0.01), rules.lars(one(w), one(g), one(0.0), 0.01)),
    ):
        assert float(scaled) == pytest.approx(float(plain), rel=1e-12)


def test_the_limits_of_probes() -> None:
    assert rules.clars(one(5.0), one(float("inf")), 0.01, 0.1).item() == 0
    assert rules.clars(one(5.0), one(1e-30), 0.01, 0.1).item() == 0.1


def test_zero_norms_follow_the_documented_rule() -> None:
    zero, five = one(0.0), one(5.0)
    assert rules.clars(zero, five, 0.01, 0.1).item() == 0.1
    assert rules.clars(five, zero, 0.01, 0.1).item() == 0.1
    assert rules.clars(zero, zero, 0.01, 0.1).item() == 0.1
    assert rules.lars(zero, five, one(0.1), 0.01).item() == rules.lars(five, zero, one(0.1), 0.01).item() == 1
    assert rules.lars_outside(zero, five, 0.01).item() == rules.lars_outside(five, zero, 0.01).item() == 1
    # the authors' form: a tensor with a zero gradient stops, one of zeros moves by its gradient over n, at most by clip
    assert rules.clars_authors(five, zero, five, 0.01, 0.1).item() == 0
    assert rules.clars_authors(zero, one(0.2), five, 0.01, 0.1).item() == pytest.approx(0.04)
    assert rules.clars_authors(zero, five, five, 0.01, 0.1).item() == 0.1


def test_norms_are_taken_in_at_least_float32() -> None:
    half = torch.full((100_000,), 300.0, dtype=torch.float16)  # the squares overflow, the sum does, too
    found = norms([half, torch.tensor([3.0, 4.0])])
    assert found.dtype is torch.float32
    assert found.tolist() == pytest.approx([300 * 100_000**0.5, 5.0], rel=1e-3)
    assert norms([W]).dtype is torch.float64
    assert norms([]).shape == (0,)
