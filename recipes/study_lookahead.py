"""Lookahead of `pytorch-optimizer` (``pip install -e ".[study]"``) over SGD, by class path with flat arguments."""

from collections.abc import Iterable
from typing import Any

from pytorch_optimizer import Lookahead

from recipes.study_optimizers import base_optimizer


class LookaheadSGD(Lookahead):
    """The library's optimizer.

    Args:
        params: of the model.
        lr: learning rate, at least 0.
        momentum: of SGD, in [0, 1).
        weight_decay: at least 0.
        k: steps between moves of the slow weights, at least 1.
        alpha: how far they move, in [0, 1].
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        k: int = 5,
        alpha: float = 0.5,
    ) -> None:
        super().__init__(base_optimizer(params, "sgd", lr, momentum, weight_decay), k=k, alpha=alpha)
