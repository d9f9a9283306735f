"""What part of its residual the exploit point takes in a step: the schemes ``S`` of RSGD.

With exploit point ``x``, the path ``z`` of the base optimizer and ``D = x - z``, a scheme moves ``x <- x - S(D)``.

==================  ================================================  ================================================
text                ``S(D)``                                          the exploit point is
==================  ================================================  ================================================
``ema:0.9``         ``(1 - beta) D``                                  an exponential average of the base path
``average``         ``D / t`` in step t = 1, 2, ...                   the mean of the base path
``sparsify:0.1``    the largest tenth of each tensor of ``D``         refreshed where it lags most
``sign``            ``sgn(D)`` times the mean of all ``|D|``          moved by one length in every coordinate
``periodic:5:0.5``  0, but every k-th step ``a D``, and ``z <- x``    Lookahead's slow weights
==================  ================================================  ================================================

Source: arXiv:2004.05298, versions 1 and 2. Which scheme the paper means is not known to us: ``sign`` and ``sparsify`` are
those of the authors' first public code; ``ema``, ``average`` and ``periodic`` are our reconstruction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_distopt.compressors import ScaledSign, TopK

__all__ = ["Average", "Ema", "Periodic", "ResidualScheme", "Sign", "Sparsify", "as_scheme"]


class ResidualScheme(ABC):
    """Base class of the schemes."""

    @abstractmethod
    def advance_(self, exploit: list[Tensor], path: list[Tensor], step: int) -> bool:
        """Move ``exploit`` to ``exploit - S(exploit - path)`` in place; ``path`` is not changed.

        Args:
            exploit: the points ``x``, one a parameter.
            path: the points ``z``, of the same shapes and dtypes.
            step: number of this step, from 1.

        Returns:
            Whether what is left of the residual is dropped: the path then goes on from ``exploit``.
        """


class Ema(ResidualScheme):
    """``x <- beta x + (1 - beta) z``.

    Args:
        beta: in [0, 1); 0 makes ``x`` the base optimizer's point, bit for bit.
    """

    def __init__(self, beta: float = 0.9) -> None:
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"`beta` must be in [0, 1): got {beta}. At 1 the exploit point would never move; use 0.9.")
        self.beta = beta

    def advance_(self, exploit: list[Tensor], path: list[Tensor], step: int) -> bool:
        _approach_(exploit, path, 1.0 - self.beta)
        return False

    def __repr__(self) -> str:
        return f"ema:{self.beta:g}"


class Average(ResidualScheme):
    """``x <- x + (z - x) / t``: the mean of the base optimizer's points, without the initial one."""

    def advance_(self, exploit: list[Tensor], path: list[Tensor], step: int) -> bool:
        _approach_(exploit, path, 1.0 / step)
        return False

    def __repr__(self) -> str:
        return "average"


class Sparsify(ResidualScheme):
    """``S(D)`` keeps the ``max(1, int(n * ratio))`` largest magnitudes of each tensor.

    Args:
        ratio: fraction kept, in (0, 1].
    """

    def __init__(self, ratio: float = 0.1) -> None:
        self._top = TopK(ratio)

    def advance_(self, exploit: list[Tensor], path: list[Tensor], step: int) -> bool:
        for x, z in zip(exploit, path, strict=True):
            self._top.decompress_add_(self._top.compress(x - z), x, alpha=-1.0)
        return False

    def __repr__(self) -> str:
        return f"sparsify:{self._top.ratio:g}"


class Sign(ResidualScheme):
    """``S(D) = (|D|_1 / n) sgn(D)`` over the whole model as one vector (one a dtype and device)."""

    def __init__(self) -> None:
        self._sign = ScaledSign()

    def advance_(self, exploit: list[Tensor], path: list[Tensor], step: int) -> bool:
        alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index, x in enumerate(exploit):
            alike.setdefault((x.dtype, x.device), []).append(index)
        for indices in alike.values():
            points = [exploit[index] for index in indices]
            residual = torch.cat([(exploit[index] - path[index]).view(-1) for index in indices])
            moved = self._sign.decompress(self._sign.compress(residual))
            parts = torch.split(moved, [x.numel() for x in points])
            for x, part in zip(points, parts, strict=True):
                x.sub_(part.view(x.shape))
        return False

    def __repr__(self) -> str:
        return "sign"


class Periodic(ResidualScheme):
    """Every ``period``-th step ``x <- x + share (z - x)``, and the path goes on from there: Lookahead(k, a).

    Args:
        period: steps, at least 1.
        share: in (0, 1].
    """

    def __init__(self, period: int = 5, share: float = 0.5) -> None:
        if isinstance(period, bool) or int(period) != period or period < 1:
            raise ValueError(f"`period` must be an integer >= 1: got {period}. Lookahead uses 5.")
        if not 0.0 < share <= 1.0:
            raise ValueError(f"`share` must be in (0, 1]: got {share}. Lookahead uses 0.5.")
        self.period, self.share = int(period), share

    def advance_(self, exploit: list[Tensor], path: list[Tensor], step: int) -> bool:
        if step % self.period:
            return False
        _approach_(exploit, path, self.share)
        return True

    def __repr__(self) -> str:
        return f"periodic:{self.period}:{self.share:g}"


def _approach_(exploit: list[Tensor], path: list[Tensor], share: float) -> None:
    for x, z in zip(exploit, path, strict=True):
        x.lerp_(z, share)


_EXAMPLES = "'ema:0.9', 'average', 'sparsify:0.1', 'sign' or 'periodic:5:0.5'"


def as_scheme(scheme: ResidualScheme | str) -> ResidualScheme:
    """Return the scheme that a text names; a scheme is returned as it is.

    Raises:
        ValueError: for an unknown name, or numbers that are not the scheme's.
        TypeError: for anything but a text and a :class:`ResidualScheme`.
    """
    if isinstance(scheme, ResidualScheme):
        return scheme
    if not isinstance(scheme, str):
        raise TypeError(f"`scheme` must be a text or a ResidualScheme: got {scheme!r}. Write for example {_EXAMPLES}.")
    name, *words = scheme.split(":")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"`scheme` takes numbers after the colon: got {scheme!r}. Write {_EXAMPLES}.") from None
    match name, len(numbers):
        case "ema", 0 | 1:
            return Ema(*numbers)
        case "average", 0:
            return Average()
        case "sparsify", 0 | 1:
            return Sparsify(*numbers)
        case "sign", 0:
            return Sign()
        case "periodic", 0 | 1 | 2:
            return Periodic(*numbers)  # type: ignore[arg-type]  # it checks that the first is whole
    raise ValueError(f"`scheme` must name a residual scheme: got {scheme!r}. Write {_EXAMPLES}.")
