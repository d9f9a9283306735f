from __future__ import annotations

import math

import pytest
import torch

from lightning_distopt.federated.accountant import Accountant, Release, renyi_epsilon
from lightning_distopt.federated.privacy import Privacy, clipped_, noise_, norm

ORACLES = [  # q, z, rounds, epsilon at delta 1e-5, computed apart from this code
    (0.01, 1.1, 1000, 1.7253),
    (0.05, 1.0, 100, 4.1117),
    (0.1, 1.0, 100, 7.9729),
    (0.1, 2.0, 200, 3.6797),
]


@pytest.mark.parametrize(("rate", "z", "rounds", "epsilon"), ORACLES)
def test_renyi_accounting_has_the_known_values(rate: float, z: float, rounds: int, epsilon: float) -> None:
    assert renyi_epsilon([Release(rate, z, rounds)], 1e-5) == pytest.approx(epsilon, abs=1e-4)


@pytest.mark.parametrize(
    ("z", "rounds", "exact"), [(1, 1, 4.3772), (1, 10, 17.8566), (2, 100, 33.1037), (5, 100, 9.9973)]
)
def test_without_sampling_the_bound_is_above_the_exact_value_and_near(z: float, rounds: int, exact: float) -> None:
    bound = renyi_epsilon([Release(1.0, z, rounds)], 1e-5)
    assert exact <= bound <= 1.12 * exact


@pytest.mark.parametrize("rate", [0.01, 0.2, 1.0])
def test_the_library_and_the_plain_formula_agree(rate: float) -> None:
    pytest.importorskip("dp_accounting")
    ours, theirs = Accountant(1e-5, "renyi"), Accountant(1e-5, "dp-accounting")
    for accountant in (ours, theirs):
        for _ in range(50):
            accountant.spend(rate, 1.3)
    # theirs also tries orders between the integers
    assert theirs.epsilon() <= ours.epsilon() * (1 + 1e-9)
    assert theirs.epsilon() == pytest.approx(ours.epsilon(), rel=0.03)


def test_an_accountant_comes_back_and_looks_ahead() -> None:
    first = Accountant(1e-5, "renyi")
    for z in (1.0, 1.0, 2.0):
        first.spend(0.1, z)
    second = Accountant(1e-5, "renyi")
    second.load_state_dict(first.state_dict())
    assert second.releases == [Release(0.1, 1.0, 2), Release(0.1, 2.0, 1)]
    ahead = second.epsilon(Release(0.1, 1.0, 1))
    second.spend(0.1, 1.0)
    assert ahead == second.epsilon() > first.epsilon() > 0
    assert Accountant(1e-5).epsilon() == 0.0


def test_no_noise_is_no_privacy() -> None:
    assert renyi_epsilon([Release(0.1, 0.0, 1)], 1e-5) == math.inf


def test_clipping_shortens_what_is_too_long_and_nothing_else() -> None:
    long = {"a": torch.randn(50) * 100, "b": torch.randn(3, 3)}
    direction = long["a"].clone() / norm(long)
    before = norm(long)
    assert clipped_(long, 1.5) == before
    assert norm(long) <= 1.5
    torch.testing.assert_close(long["a"], direction * 1.5)
    short = {"a": torch.tensor([0.3, 0.4])}
    clipped_(short, 1.0)
    assert torch.equal(short["a"], torch.tensor([0.3, 0.4]))


def test_one_client_more_moves_the_clipped_sum_by_at_most_the_bound() -> None:
    updates = [{"w": torch.randn(20) * scale} for scale in (0.01, 1.0, 1e3, 1e6)]
    for update in updates:
        clipped_(update, 0.7)
    with_all = torch.stack([update["w"] for update in updates]).sum(0)
    for update in updates:
        assert float((with_all - (with_all - update["w"])).norm()) <= 0.7 + 1e-5


def test_noise_has_its_deviation_and_comes_back_with_its_key() -> None:
    first, again, other = ({"a": torch.zeros(20_000), "b": torch.zeros(7)} for _ in range(3))
    noise_(first, 3.0, 11)
    noise_(again, 3.0, 11)
    noise_(other, 3.0, 12)
    assert float(first["a"].std()) == pytest.approx(3.0, rel=0.02)  # 20,000 draws: 0.5 % is one standard error
    assert torch.equal(first["b"], again["b"])
    assert not torch.equal(first["b"], other["b"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip": 0.0}, "clip.*0.0"),
        ({"clip": math.inf}, "clip.*inf"),
        ({"noise_multiplier": -1.0}, "noise_multiplier.*-1"),
        ({"delta": 1.0}, "delta.*1.0"),
        ({"population": 0}, "population.*0"),
        ({"sampling": "some"}, "sampling.*some"),
        ({"max_epsilon": 0.0}, "max_epsilon.*0.0"),
    ],
)
def test_bad_numbers_are_refused(changes: dict, words: str) -> None:
    good = {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5, "population": 100}
    with pytest.raises(ValueError, match=words):
        Privacy(**{**good, **changes})
