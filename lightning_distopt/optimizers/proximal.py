"""Proximal operators: the step of a non-smooth term that has no gradient.

    prox(z, step) = argmin_x  value(x) + |x - z|^2 / (2 step)

With ``S(z, t) = sign(z) max(|z| - t, 0)``:

==================  =============================  =====================================================
class               value(x)                       prox(z, step), e = step
==================  =============================  =====================================================
``Zero``            0                              z
``L1``              lam |x|_1                      S(z, e lam)
``ElasticNet``      lam1 |x|_1 + (lam2/2) |x|^2    S(z, e lam1) / (1 + e lam2)
``GroupLasso``      lam sum_g |x_g|                z_g max(0, 1 - e lam / |z_g|)
``NuclearNorm``     lam sum of singular values     U S(Sigma, e lam) V^T
``Box``             0 inside, infinite outside     clip(z, lo, hi)
``L1Box``           both                           clip(S(z, e lam), lo, hi)
``L0``              lam (entries that are not 0)   z where |z| > sqrt(2 e lam), else 0 (not convex)
``L1MinusL2``       lam (|x|_1 - a |x|)            see the class (not convex)
==================  =============================  =====================================================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softshrink
from torch.optim import Optimizer

__all__ = [
    "L0", "L1", "Box", "ElasticNet", "GroupLasso", "L1Box", "L1MinusL2", "NuclearNorm", "Proximal", "ProximalStep", "Zero",
]  # fmt: skip


class Proximal(ABC):
    """A term of the objective that is added by its proximal operator instead of by a gradient.

    Attributes:
        elementwise: each entry can be treated by itself, so that a large tensor may be treated piece by piece.
        convex: the operator is then firmly non-expansive, ``|p - q|^2 <= (p - q) . (x - y)``.
    """

    elementwise: ClassVar[bool] = True
    convex: ClassVar[bool] = True

    def __call__(self, tensor: Tensor, step: float) -> Tensor:
        """Return ``argmin_x value(x) + |x - tensor|^2 / (2 step)``; ``tensor`` is not changed.

        Args:
            tensor: floating point, any shape that the term allows.
            step: the step size of the gradient step before it, above 0.

        Raises:
            ValueError: if ``step`` is not above 0.
            TypeError: if ``tensor`` is not floating point.
        """
        if not step > 0 or math.isinf(step):
            raise ValueError(f"`step` must be above 0: got {step!r}. Pass the learning rate of the step before it.")
        if not tensor.is_floating_point():
            raise TypeError(f"`tensor` must be floating point: got {tensor.dtype}. Convert it with `.float()`.")
        return self.prox(tensor.detach(), float(step))

    @abstractmethod
    def prox(self, z: Tensor, step: float) -> Tensor:
        """Return the operator's value, a new tensor or ``z`` itself; see the table above."""

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """Return the term's value at ``x``, a scalar."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items() if isinstance(v, (float, str)))})"


def soft_threshold(z: Tensor, threshold: float) -> Tensor:
    """Return ``sign(z) max(|z| - threshold, 0)``."""
    return softshrink(z, threshold)


class Zero(Proximal):
    """No term: the operator is the identity."""

    def prox(self, z: Tensor, step: float) -> Tensor:
        return z

    def value(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


class L1(Proximal):
    """``lam |x|_1``: small entries become 0.

    Args:
        lam: weight, at least 0.
    """

    def __init__(self, lam: float) -> None:
        self.lam = _weight("lam", lam)

    def prox(self, z: Tensor, step: float) -> Tensor:
        return soft_threshold(z, step * self.lam)

    def value(self, x: Tensor) -> Tensor:
        return self.lam * x.abs().sum()


class ElasticNet(Proximal):
    """``lam1 |x|_1 + (lam2 / 2) |x|^2``. Papers that write ``lam2 |x|^2`` mean twice this ``lam2``.

    Args:
        lam1: weight of the absolute values, at least 0.
        lam2: weight of half the squares, at least 0.
    """

    def __init__(self, lam1: float, lam2: float) -> None:
        self.lam1, self.lam2 = _weight("lam1", lam1), _weight("lam2", lam2)

    def prox(self, z: Tensor, step: float) -> Tensor:
        return soft_threshold(z, step * self.lam1) / (1 + step * self.lam2)

    def value(self, x: Tensor) -> Tensor:
        return self.lam1 * x.abs().sum() + self.lam2 / 2 * x.square().sum()


class GroupLasso(Proximal):
    """``lam sum_g |x_g|``: whole groups become 0.

    Args:
        lam: weight, at least 0.
        groups: lists of places in the flattened tensor, no place twice (places in no list are left alone); or a 1-D tensor
            or list with the group's number of each entry; or ``"rows"``, ``"columns"`` of a matrix (dimensions 0, 1).
    """

    elementwise = False

    def __init__(
        self, lam: float, groups: Sequence[Sequence[int]] | Sequence[int] | Tensor | Literal["rows", "columns"]
    ) -> None:
        self.lam = _weight("lam", lam)
        self.groups: Literal["rows", "columns"] | tuple[Tensor, int]
        if isinstance(groups, str):
            if groups not in ("rows", "columns"):
                raise ValueError(f"`groups` must be lists of places, numbers, 'rows' or 'columns': got {groups!r}.")
            self.groups = groups
        else:
            self.groups = _labels(groups)

    def prox(self, z: Tensor, step: float) -> Tensor:
        norms = self._norms(z)
        shrink = (1 - step * self.lam / norms.where(norms > 0, 1.0)).clamp(min=0.0)
        return z * self._spread(shrink, z)

    def value(self, x: Tensor) -> Tensor:
        return self.lam * self._norms(x).sum()

    def _norms(self, z: Tensor) -> Tensor:
        if isinstance(self.groups, str):
            if z.dim() < 2:
                raise ValueError(
                    f"`groups={self.groups!r}` needs a tensor of 2 dimensions: got the shape {tuple(z.shape)}. Give lists of "
                    "places, or a parameter group of its own."
                )
            dim = 0 if self.groups == "rows" else 1
            return z.square().sum([d for d in range(z.dim()) if d != dim], keepdim=True).sqrt()
        labels, count = self._labels_for(z)
        sums = torch.zeros(count + 1, dtype=z.dtype, device=z.device)
        return sums.index_add_(0, labels, z.reshape(-1).square())[:-1].sqrt()

    def _spread(self, shrink: Tensor, z: Tensor) -> Tensor:
        if isinstance(self.groups, str):
            return shrink
        labels, _ = self._labels_for(z)
        return torch.cat([shrink, shrink.new_ones(1)])[labels].view(z.shape)

    def _labels_for(self, z: Tensor) -> tuple[Tensor, int]:
        assert not isinstance(self.groups, str)
        labels, count = self.groups
        if labels.numel() > z.numel():
            raise ValueError(
                f"`groups` must name places of the tensor: got places up to {labels.numel() - 1} for {z.numel()} entries. "
                "Groups are of one tensor; give each parameter its own group and operator."
            )
        rest = labels.new_full((z.numel() - labels.numel(),), count)
        return torch.cat([labels, rest]).to(z.device), count


class NuclearNorm(Proximal):
    """``lam`` times the sum of the singular values of a matrix: the rank falls.

    Tensors of more than two dimensions are taken as ``(first dimension, the rest)``.

    Args:
        lam: weight, at least 0.
    """

    elementwise = False

    def __init__(self, lam: float) -> None:
        self.lam = _weight("lam", lam)

    def prox(self, z: Tensor, step: float) -> Tensor:
        u, sigma, v = torch.linalg.svd(self._matrix(z), full_matrices=False)
        found: Tensor = u * soft_threshold(sigma, step * self.lam) @ v
        return found.view(z.shape)

    def value(self, x: Tensor) -> Tensor:
        value: Tensor = self.lam * torch.linalg.svdvals(self._matrix(x)).sum()
        return value

    def _matrix(self, z: Tensor) -> Tensor:
        if z.dim() < 2:
            raise ValueError(
                f"`NuclearNorm` needs a matrix: got the shape {tuple(z.shape)}. Put vectors such as biases into a parameter "
                "group of their own, with another operator."
            )
        return z.flatten(1)


class Box(Proximal):
    """Entries stay in ``[lo, hi]``.

    Args:
        lo: smallest value allowed; may be ``-inf``.
        hi: largest value allowed; may be ``inf``; at least ``lo``.
    """

    def __init__(self, lo: float, hi: float) -> None:
        self.lo, self.hi = _interval(lo, hi)

    def prox(self, z: Tensor, step: float) -> Tensor:
        return z.clamp(self.lo, self.hi)

    def value(self, x: Tensor) -> Tensor:
        outside = bool(((x < self.lo) | (x > self.hi)).any())
        return x.new_full((), math.inf if outside else 0.0)


class L1Box(Proximal):
    """``lam |x|_1`` with entries in ``[lo, hi]``; 0 need not be inside.

    Args:
        lam: weight, at least 0.
        lo: as in :class:`Box`.
        hi: as in :class:`Box`.
    """

    def __init__(self, lam: float, lo: float, hi: float) -> None:
        self.lam = _weight("lam", lam)
        self.lo, self.hi = _interval(lo, hi)

    def prox(self, z: Tensor, step: float) -> Tensor:
        return soft_threshold(z, step * self.lam).clamp_(self.lo, self.hi)

    def value(self, x: Tensor) -> Tensor:
        return self.lam * x.abs().sum() + Box(self.lo, self.hi).value(x)


class L0(Proximal):
    """``lam`` times the number of entries that are not 0; not convex.

    Args:
        lam: weight, at least 0.
    """

    convex = False

    def __init__(self, lam: float) -> None:
        self.lam = _weight("lam", lam)

    def prox(self, z: Tensor, step: float) -> Tensor:
        return z.where(z.abs() > math.sqrt(2 * step * self.lam), 0.0)

    def value(self, x: Tensor) -> Tensor:
        return self.lam * (x != 0).sum().to(x.dtype)


class L1MinusL2(Proximal):
    """``lam (|x|_1 - a |x|)``: sparser than ``L1``; not convex.

    With ``t = step lam`` and ``y = S(z, t)``: ``y (|y| + a t) / |y|`` if the largest ``|z|`` is above ``t``; else, if it is
    above ``(1 - a) t``, only that entry remains, as ``sign(z) (|z| + (a - 1) t)``; else 0.

    Args:
        lam: weight, at least 0.
        a: share of the Euclidean norm, in [0, 1].
    """

    elementwise = False
    convex = False

    def __init__(self, lam: float, a: float = 1.0) -> None:
        self.lam = _weight("lam", lam)
        if not 0.0 <= a <= 1.0:
            raise ValueError(f"`a` must be in [0, 1]: got {a!r}. Write for example `a=1.0`.")
        self.a = float(a)

    def prox(self, z: Tensor, step: float) -> Tensor:
        t = step * self.lam
        largest = z.abs().max() if z.numel() else z.new_zeros(())
        if largest > t:
            y = soft_threshold(z, t)
            norm: Tensor = torch.linalg.vector_norm(y)
            return y * (1 + self.a * t / norm)
        out = torch.zeros_like(z)
        if largest > (1 - self.a) * t:
            place = z.abs().argmax()
            out.view(-1)[place] = z.reshape(-1)[place].sign() * (largest + (self.a - 1) * t)
        return out

    def value(self, x: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x)
        return self.lam * (x.abs().sum() - self.a * norm)


class ProximalStep(Optimizer):
    """Any optimizer of torch, followed by a proximal operator on every parameter, at the group's present ``lr``.

        x <- prox(x after the optimizer's step, lr)

    This is proximal SGD for SGD without momentum; for momentum and adaptive optimizers it is the customary combination
    (sparse and constrained solutions stay exact), not the proximal step in the optimizer's own metric. Groups, states and
    checkpoints are the optimizer's, so learning-rate schedulers and Lightning take either.

    Args:
        optimizer: whose parameter groups have ``lr``.
        proximal: the operator; a group with an entry ``"proximal"`` has its own.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if a parameter group has no ``lr``.

    Example::

        optimizer = ProximalStep(torch.optim.SGD(model.parameters(), lr=0.1), L1(1e-4))
    """

    def __init__(self, optimizer: Optimizer, proximal: Proximal) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` must be a torch.optim.Optimizer: got {type(optimizer).__name__}.")
        if not isinstance(proximal, Proximal):
            raise TypeError(f"`proximal` must be a Proximal such as L1(1e-4): got {proximal!r}.")
        if any("lr" not in group for group in optimizer.param_groups):
            raise ValueError("`optimizer` must have `lr` in every parameter group: the operator's step is the rate.")
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer, self.proximal = optimizer, proximal
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the optimizer, then apply the operator in place; return what the optimizer returned."""
        loss = self.optimizer.step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                proximal = group.get("proximal", self.proximal)
                for parameter in group["params"]:
                    if parameter.grad is not None:  # what the optimizer left alone stays as it is
                        parameter.copy_(proximal(parameter, float(group["lr"])))
        return loss

    def state_dict(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        # Operators are settings of the program, not state, and would not load with `weights_only=True`.
        groups = [{k: v for k, v in group.items() if k != "proximal"} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = [group.get("proximal") for group in self.param_groups]
        self.optimizer.load_state_dict(state_dict)
        for group, proximal in zip(self.optimizer.param_groups, own, strict=True):
            if proximal is not None:
                group["proximal"] = proximal
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "optimizer"):
            self.optimizer.add_param_group(param_group)
        else:  # called by the base class's constructor
            super().add_param_group(param_group)


def _weight(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number >= 0: got {value!r}. Write for example `{name}=1e-4`.")
    if not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be a number >= 0: got {value}. Write for example `{name}=1e-4`.")
    return float(value)


def _interval(lo: float, hi: float) -> tuple[float, float]:
    if not lo <= hi:  # NaN too
        raise ValueError(f"`lo` must not be above `hi`: got lo={lo!r}, hi={hi!r}. Exchange them, or use -inf and inf.")
    return float(lo), float(hi)


def _labels(groups: Sequence[Sequence[int]] | Sequence[int] | Tensor) -> tuple[Tensor, int]:
    """Return the group's number of each entry (the last number for none) and how many groups there are."""
    if isinstance(groups, Tensor) or all(isinstance(group, int) for group in groups):
        labels = torch.as_tensor(groups).reshape(-1)
        if labels.is_floating_point() or (labels.numel() and int(labels.min()) < 0):
            raise ValueError("`groups` as numbers must be integers >= 0, one for each entry of the tensor.")
        return labels.long(), int(labels.max()) + 1 if labels.numel() else 0
    places = [torch.as_tensor(list(group)).long() for group in groups]  # type: ignore[arg-type]
    flat = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
    if len(torch.unique(flat)) != len(flat) or (len(flat) and int(flat.min()) < 0):
        raise ValueError(f"`groups` must hold no place twice and none below 0: got {[p.tolist() for p in places][:4]}.")
    labels = torch.full((int(flat.max()) + 1 if len(flat) else 0,), len(places))
    for number, where in enumerate(places):
        labels[where] = number
    return labels, len(places)
