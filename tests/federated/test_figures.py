from __future__ import annotations

import pytest

from lightning_distopt.federated.metrics import over_clients
from lightning_distopt.federated.stopping import RoundStopping


def test_means_are_weighted_and_the_worst_tenth_is_at_the_bad_end() -> None:
    metrics = [{"val/accuracy": k / 20, "val/loss": k / 20} for k in range(20)]
    summary = over_clients(metrics, [1.0] * 19 + [19.0])
    assert summary["val/accuracy"] == pytest.approx((sum(range(19)) / 20 + 19 * 19 / 20) / 38)
    assert summary["val/accuracy/worst_10"] == pytest.approx(0.025)
    assert summary["val/loss/worst_10"] == pytest.approx(0.925)
    assert over_clients(metrics, [1.0] * 20, {"val/loss": "max"})["val/loss/worst_10"] == pytest.approx(0.025)


def test_a_metric_that_some_lack_is_averaged_over_the_others() -> None:
    assert over_clients([{"a": 1.0}, {"a": 3.0, "b": 5.0}], [1.0, 3.0])["b"] == 5.0


def test_stopping_counts_rounds_without_improvement() -> None:
    rule = RoundStopping("val/loss", patience=2)
    said = [rule.reason({"val/loss": value}) for value in (1.0, 0.5, 0.6, 0.5)]
    assert said[:3] == [None, None, None]
    assert "0.5" in str(said[3])
    assert RoundStopping("val/loss", patience=1).reason({}) is None


def test_a_target_ends_it_at_once() -> None:
    rule = RoundStopping("val/accuracy", target=0.9)
    assert rule.reason({"val/accuracy": 0.89}) is None
    assert "0.9" in str(rule.reason({"val/accuracy": 0.91}))


@pytest.mark.parametrize(
    "changes", [{}, {"patience": 0}, {"patience": 1, "mode": "most"}, {"patience": 1, "min_delta": -1.0}]
)
def test_bad_rules_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match="`"):
        RoundStopping("val/loss", **changes)
