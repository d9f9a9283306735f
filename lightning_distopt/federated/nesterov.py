"""FedMom's server step: Nesterov momentum on the averaged displacement of the clients.

    v' = w - lr g                 g = sum_k p_k (w - y_k), old minus new
    w' = v' + momentum (v' - v)   v = w before the first round

Source: arXiv:2002.02090. In this form a learning rate that changes from round to round is right; the buffer of
``torch.optim.SGD(nesterov=True)`` would be rescaled by it.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["nesterov_step"]


def nesterov_step(w: Tensor, v: Tensor, g: Tensor, lr: float, momentum: float) -> tuple[Tensor, Tensor]:
    """Return ``(w', v')``; the arguments are not changed.

    With ``momentum=0`` it is FedAvg; with a constant ``lr``, ``torch.optim.SGD(nesterov=True)`` on ``g``.

    Args:
        w: the server's model, as the clients received it in this round.
        v: ``v'`` of the last round; ``w`` in the first one.
        g: averaged displacement, same shape.
        lr: server step; 1.0 where ``g`` is a mean over the clients that answered.
        momentum: in [0, 1).
    """
    new = w - lr * g
    return new + momentum * (new - v), new
