"""Any optimizer of torch as outer optimizer: the averaged displacement takes the place of the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_distopt.data_parallel.fed_mom import FedMom
from lightning_distopt.data_parallel.outer_optimizer import Memory, OuterOptimizer, Plain

__all__ = ["TorchOuter", "as_outer_optimizer"]


class TorchOuter(OuterOptimizer):
    """Steps the common model by an optimizer of torch whose gradient is the pseudo-gradient (FedOpt, arXiv:2003.00295).

    ``torch.optim.SGD`` with ``momentum`` is FedAvgM (heavy ball), with ``nesterov=True`` FedMom at a constant rate; the
    adaptive ones are relatives of FedAdam with torch's own bias correction. The rate is constant; to change it from round to
    round use :class:`~lightning_distopt.data_parallel.FedMom`.

    Args:
        optimizer: class path in ``torch.optim``, such as "torch.optim.Adam", or any optimizer's class.
        arguments: for the class, without the parameters.

    Raises:
        ValueError: if the path leads to no optimizer, it does not take the arguments, or it needs a closure.

    Example:
        >>> TorchOuter("torch.optim.SGD", {"lr": 0.7, "momentum": 0.9, "nesterov": True})
        TorchOuter(torch.optim.sgd.SGD, lr=0.7, momentum=0.9, nesterov=True)
    """

    def __init__(self, optimizer: str | type[Optimizer], arguments: Mapping[str, Any] | None = None) -> None:
        self.optimizer = _found(optimizer) if isinstance(optimizer, str) else optimizer
        if not (isinstance(self.optimizer, type) and issubclass(self.optimizer, Optimizer)):
            raise ValueError(
                f"`optimizer` must be a torch optimizer: got {optimizer!r}. Use for example 'torch.optim.Adam'."
            )
        self.arguments = dict(arguments or {})
        try:  # now, not in the workers at the end of the first round
            self.step_([torch.zeros(2, 2)], [torch.ones(2, 2)], [{}], 0)
        except Exception as error:  # optimizers raise what they will
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"`arguments` must suit {self.optimizer.__name__}, which must step without a closure: got {self.arguments} "
                f"({reason}). Use for example `arguments={{'lr': 0.1}}` with 'torch.optim.Adam'."
            ) from None

    def step_(self, x: Sequence[Tensor], g: Sequence[Tensor], memory: Sequence[Memory], round: int) -> None:
        params = [Parameter(model) for model in x]  # the same memory
        stepping = self.optimizer(params, **self.arguments)
        for param, displacement, kept in zip(params, g, memory, strict=True):
            param.grad = displacement
            if kept:
                stepping.state[param].update(kept)
        stepping.step()
        for param, kept in zip(params, memory, strict=True):
            kept.clear()
            kept.update({name: value for name, value in stepping.state[param].items() if value is not None})

    def __repr__(self) -> str:
        words = [f"{self.optimizer.__module__}.{self.optimizer.__name__}"]
        return f"TorchOuter({', '.join(words + [f'{name}={value!r}' for name, value in self.arguments.items()])})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TorchOuter) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


def as_outer_optimizer(outer: OuterOptimizer | str) -> OuterOptimizer:
    """Return an outer optimizer from its name ("plain", "fedmom"), a torch optimizer's class path, or as it is.

    Raises:
        TypeError: for something else than text or an outer optimizer.
        ValueError: for a name that is not known.
    """
    if isinstance(outer, OuterOptimizer):
        return outer
    if not isinstance(outer, str):
        raise TypeError(
            f"`outer_optimizer` must be text or an `OuterOptimizer`: got {outer!r}. Use for example `FedMom(0.7, 0.9)`, or "
            "`TorchOuter('torch.optim.Adam', {'lr': 0.1})`."
        )
    named: dict[str, type[OuterOptimizer]] = {"plain": Plain, "fedmom": FedMom}
    if outer in named:
        return named[outer]()
    if "." in outer:
        return TorchOuter(outer)
    raise ValueError(
        f"`outer_optimizer` must be 'plain', 'fedmom' or the class path of a torch optimizer: got {outer!r}. Use for example "
        "'torch.optim.Adam', or `FedMom(0.7, 0.9)`."
    )


def _found(path: str) -> Any:
    # looked up, not imported: a word from a configuration loads no module
    name = path.removeprefix("torch.optim.")
    found = getattr(torch.optim, name, None) if name != path else None
    if found is None:
        raise ValueError(
            f"`optimizer` must be the class path of an optimizer in `torch.optim`: {path!r} was not found there. Use for example "
            "'torch.optim.SGD', or pass the class itself."
        )
    return found
