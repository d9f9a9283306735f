"""Black-box binary classification with a sparse penalty (arXiv:1902.06158): a loss that is smooth and not convex."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_distopt.optimizers.proximal import ElasticNet
from lightning_distopt.zeroth_order import BlackBoxModule, Estimator
from lightning_distopt.zeroth_order.black_box import Method


class SparseClassifier(BlackBoxModule):
    """``f_i(x) = 1 / (1 + exp(y_i a_i . x))``, plus ``lam1 |x|_1 + lam2 |x|^2``; starts at 0.

    Args:
        features: number of features.
        method: "sgd", "svrg" or "saga".
        estimator: ``null`` is the coordinate estimator.
        lr: ``null`` estimates it.
        lam1: weight of the absolute values.
        lam2: weight of the squares.
        max_queries: budget.
        seed: of samples and directions.
        evaluate_every: steps between evaluations of the objective.
        evaluation_samples: ``null`` takes all.
        options: further arguments of the method.
    """

    def __init__(
        self,
        features: int,
        method: Method = "svrg",
        estimator: Estimator | None = None,
        lr: float | None = None,
        lam1: float = 1e-5,
        lam2: float = 1e-5,
        max_queries: int | None = None,
        seed: int = 0,
        evaluate_every: int = 10,
        evaluation_samples: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            method, lr, estimator=estimator, proximal=ElasticNet(lam1, 2 * lam2), max_queries=max_queries, seed=seed,
            functional=True, evaluate_every=evaluate_every, evaluation_samples=evaluation_samples, options=options,
        )  # fmt: skip
        self.x = nn.Parameter(torch.zeros(features, dtype=torch.float64))

    def query(self, batch: Any) -> Tensor:
        """Return the sigmoid loss of each sample."""
        features, labels = batch
        return torch.sigmoid(-labels * (features @ self.x))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the accuracy on the test samples, and the share of parameters that are 0."""
        features, labels = batch
        accuracy = ((features @ self.x) * labels > 0).double().mean()
        self.log("val/accuracy", accuracy, prog_bar=True, batch_size=len(labels))
        self.log("val/zeros", (self.x == 0).double().mean(), batch_size=len(labels))
