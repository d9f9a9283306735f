"""A bucket: the parameters that are compressed and exchanged together, with their memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.error_feedback import FlatViews

__all__ = ["Bucket", "make_buckets"]


@dataclass
class Bucket:
    """Parameters of one dtype on one device.

    Args:
        names: full parameter names.
        params: the parameters; between steps they hold the common model ``x``.
        anchor: ``x`` while the parameters hold ``y`` or ``z``.
        residual: ``e``, what this rank has not sent yet.
        server: ``s``, what a replicated server has not sent yet; ``None`` without one.
    """

    names: list[str]
    params: list[Parameter]
    anchor: FlatViews = field(init=False)
    residual: FlatViews = field(init=False)
    server: FlatViews | None = None

    def __post_init__(self) -> None:
        self.anchor = FlatViews(self.params)
        self.residual = FlatViews(self.params)

    @property
    def data(self) -> list[Tensor]:
        """The parameters without autograd."""
        return [param.detach() for param in self.params]

    def restore(self) -> None:
        """Write ``x`` back into the parameters."""
        for param, x in zip(self.data, self.anchor.views, strict=True):
            param.copy_(x)


def make_buckets(params: Mapping[str, Parameter], max_bytes: float) -> list[Bucket]:
    """Cut parameters, in order, into buckets of at most ``max_bytes``; a larger parameter gets one of its own."""
    buckets: list[Bucket] = []
    for same in _by_kind(params):
        names: list[str] = []
        size = 0
        for name in same:
            nbytes = params[name].numel() * 4
            if names and size + nbytes > max_bytes:
                buckets.append(Bucket(names, [params[n] for n in names]))
                names, size = [], 0
            names.append(name)
            size += nbytes
        buckets.append(Bucket(names, [params[n] for n in names]))
    return buckets


def _by_kind(params: Mapping[str, Parameter]) -> Sequence[list[str]]:
    kinds: dict[object, list[str]] = {}
    for name, param in params.items():
        kinds.setdefault((param.dtype, param.device), []).append(name)
    return list(kinds.values())
