"""Error feedback: what a compressor leaves out is remembered and sent later.

A residual ``e`` is kept by parameter name, in parameter units (it contains the learning rate). One round of a replica:

    y = x - coefficient * e                      step ahead; local, nothing is sent
    z = y after the local optimizer step(s)
    D = (x - z) + (1 - coefficient) * e          = e + the steps taken
    c = C(D);  e <- D - c;  send c               D == c + e, bit for bit what the receiver decodes

The point ``x - mean(e) - s`` (``s``: the server's residual) moves as if nothing had been compressed, whatever the
coefficient, the compressor and the number of local steps; averaging residuals over the ranks leaves it where it is.

Source: arXiv:1901.09847 (coefficient 0), arXiv:2008.05823 (coefficient 1, averaging), arXiv:2004.05298v3 and
arXiv:2601.20738 (between).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.compressors import Compressor, Payload
from lightning_distopt.compressors.base import wide
from lightning_distopt.compressors.kernels import kernels_for
from lightning_distopt.exchange import Meter

__all__ = [
    "FlatViews",
    "average_",
    "compensate_",
    "compress_",
    "displacements",
    "refuse_unless_contractive",
    "step_ahead_",
]


class FlatViews:
    """One flat buffer and its views, shaped like given tensors: the memory of a bucket's anchor or residual.

    Half-precision tensors get float32 memory, so that small residuals are not rounded away.

    Args:
        like: tensors of one dtype on one device.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        numels = [tensor.numel() for tensor in like]
        self.flat = torch.zeros(sum(numels), dtype=wide(like[0].dtype), device=like[0].device)
        self.flats: list[Tensor] = list(torch.split(self.flat, numels))
        self.views = [flat.view(tensor.shape) for flat, tensor in zip(self.flats, like, strict=True)]


def step_ahead_(params: Sequence[Tensor], anchor: FlatViews, residual: FlatViews, coefficient: float) -> None:
    """Keep ``x`` in ``anchor`` and move the parameters to ``y = x - coefficient * e``."""
    for param, x, e in zip(params, anchor.views, residual.views, strict=True):
        x.copy_(param)
        if coefficient:
            if param.dtype is x.dtype:
                param.sub_(e, alpha=coefficient)
            else:
                param.copy_(torch.sub(x, e, alpha=coefficient))


def compensate_(params: Iterable[Tensor], anchor: FlatViews, residual: FlatViews, coefficient: float) -> None:
    """Turn the residual into the displacement ``D = (x - z) + (1 - coefficient) * e``, with ``z`` in the parameters.

    ``x - z`` is taken first: it is small and nearly exact, while ``e + x`` would round ``e`` to the precision of ``x``.
    The parameters hold ``x`` again afterwards.
    """
    for _ in displacements(params, anchor, residual, coefficient):
        pass


def displacements(
    params: Iterable[Tensor], anchor: FlatViews, residual: FlatViews, coefficient: float, weight: float = 1.0
) -> Iterator[Tensor]:
    """Do what :func:`compensate_` does, and yield each displacement, 1-D, while the processor's cache still holds it.

    With a ``weight`` the local steps ``y - z`` count that much: ``D = weight (x - z) + (1 - weight * coefficient) e``.
    """
    for param, x, e, flat in zip(params, anchor.views, residual.views, residual.flats, strict=True):
        kernel = getattr(kernels_for(param), "displace_", None)  # a device's kernels may lack it
        if weight != 1.0:
            e.mul_(1.0 - weight * coefficient).add_(x - param, alpha=weight)
            param.copy_(x)
        elif kernel is not None and param.is_contiguous():
            kernel(param.view(-1), x.view(-1), flat, 1.0 - coefficient)
        else:
            if coefficient == 1.0:
                torch.sub(x, param, out=e)
            elif param.dtype is x.dtype:
                torch.sub(x, param, out=param)
                torch.add(param, e, alpha=1.0 - coefficient, out=e)
            else:
                e.mul_(1.0 - coefficient).add_(x - param)
            param.copy_(x)
        yield flat


def compress_(compressor: Compressor, tensors: Iterable[Tensor], keys: Sequence[int]) -> list[Payload]:
    """Compress each tensor and leave its residual in place."""
    return [compressor.compress_(t, k, assume_finite=True) for t, k in zip(tensors, keys, strict=True)]


def average_(residuals: Sequence[FlatViews], meter: Meter, group: dist.ProcessGroup | None, world: int) -> None:
    """Replace every rank's residuals by their mean over ranks: a dense all-reduce in the residuals' own dtype."""
    if world == 1:
        return
    works = []
    for residual in residuals:
        meter.all_reduce("averaging", residual.flat.nbytes, world)
        works.append(dist.all_reduce(residual.flat, group=group, async_op=True))
    for residual, work in zip(residuals, works, strict=True):
        with meter.timed("exchange"):
            work.wait()
        residual.flat.div_(world)


def refuse_unless_contractive(compressor: Compressor, error_feedback: str, allow: bool = False) -> None:
    """Raise a ``ValueError``, or warn if ``allow``, if residuals of this compressor could grow without bound."""
    if compressor.contractive:
        return
    needs = (
        f"`error_feedback={error_feedback!r}` needs a contractive compressor, whose residual stays bounded: {compressor} "
        "is not."
    )
    if allow:
        warnings.warn(f"{needs} `allow_noncontractive=True`: watch `feedback/residual_norm`.", stacklevel=2)
    else:
        raise ValueError(
            f"{needs} Use `error_feedback='none'`, or a compressor such as 'sign' or 'topk:0.01'; or, to try it all the "
            "same, `allow_noncontractive=True`."
        )
