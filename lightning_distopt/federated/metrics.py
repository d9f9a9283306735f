"""Numbers over clients: weighted mean, spread, and how the worst tenth fares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

__all__ = ["higher_is_better", "over_clients"]

_HIGHER = ("acc", "auc", "f1", "precision", "recall", "r2", "iou", "dice", "bleu")


def higher_is_better(name: str) -> bool:
    """Whether a metric of this name is one of which more is better (accuracy, AUC, F1, ...); else it is a loss."""
    last = name.lower().rsplit("/", 1)[-1]
    return any(word in last for word in _HIGHER)


def over_clients(
    metrics: Sequence[Mapping[str, float]], weights: Sequence[float], modes: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Return for each metric its mean over clients, weighted; and, from two clients on, two figures of fairness.

    ``<name>``: mean weighted by examples, over the clients that report it. ``<name>/std``: standard deviation over clients,
    each counted once. ``<name>/worst_10``: plain mean over the worst tenth of the clients, at least one.

    Args:
        metrics: of each client.
        weights: of each client, above 0.
        modes: ``"max"`` or ``"min"`` by name, where :func:`higher_is_better` guesses wrong.
    """
    summary: dict[str, float] = {}
    for name in sorted({name for one in metrics for name in one}):
        told = [(one[name], weight) for one, weight in zip(metrics, weights, strict=True) if name in one]
        values = [value for value, _ in told]
        summary[name] = math.fsum(value * weight for value, weight in told) / math.fsum(weight for _, weight in told)
        if len(values) < 2:
            continue
        plain = math.fsum(values) / len(values)
        mode = (modes or {}).get(name) or ("max" if higher_is_better(name) else "min")
        worst = sorted(values, reverse=mode == "min")[: max(1, math.ceil(round(len(values) / 10, 9)))]
        summary[f"{name}/std"] = math.sqrt(math.fsum((value - plain) ** 2 for value in values) / len(values))
        summary[f"{name}/worst_10"] = math.fsum(worst) / len(worst)
    return summary
