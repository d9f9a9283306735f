"""Buckets, the parameters that are compressed and exchanged together, and groups, the buckets whose rounds end together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import Parameter

from lightning_distopt.compressors.base import wide
from lightning_distopt.data_parallel.fragments import Flight
from lightning_distopt.error_feedback import FlatViews

__all__ = ["Bucket", "Group", "make_buckets"]


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

    def parts(self, memory: FlatViews, whole: bool) -> tuple[list[str], list[Tensor]]:
        """Return names and flat tensors of what a compressor is handed: all of the bucket as one, or its parameters."""
        return (["+".join(self.names)], [memory.flat]) if whole else (self.names, memory.flats)

    @property
    def direct(self) -> bool:
        """Whether means can be added to the parameters themselves: flat views of them are as fine as the anchors."""
        return all(param.is_contiguous() and param.dtype is self.anchor.flat.dtype for param in self.params)

    def restore(self) -> None:
        """Write ``x`` back into the parameters."""
        for param, x in zip(self.data, self.anchor.views, strict=True):
            param.copy_(x)


@dataclass
class Group:
    """The parameters that the same optimizers step, or a fragment of them: their rounds begin and end together.

    Args:
        owners: numbers of these optimizers.
        buckets: in the order of their collectives.
        fragment: its number.
        last: there is no later fragment.
        rounds: rounds that have ended.
        local_steps: optimizer steps since the last exchange began.
        begun: a micro-batch of this round has been seen, and its averaging of residuals is done.
        away: the parameters hold ``y`` or ``z``, and the anchors hold ``x``.
        stash: ``z``, while ``x`` is shown in the middle of a round.
        bad: local step, from 1, and index of the first parameter that was not finite after a step inside the round.
        mixed: the round began with parameters that are not the common ones.
        flight: the averaged displacement, on its way.
    """

    owners: tuple[int, ...]
    buckets: list[Bucket]
    fragment: int = 0
    last: bool = True
    rounds: int = 0
    local_steps: int = 0
    begun: bool = False
    away: bool = False
    stash: list[Tensor] = field(default_factory=list)
    bad: tuple[int, int] | None = None
    mixed: bool = False
    flight: Flight | None = None

    @property
    def key(self) -> str:
        """The owners and the fragment as text, the group's name in checkpoints."""
        return "+".join(map(str, self.owners)) + (f"/{self.fragment}" if self.fragment else "")

    @property
    def inside(self) -> bool:
        """Whether the parameters hold more than the common model, between steps too."""
        return self.local_steps > 0 or self.mixed or self.flight is not None

    @property
    def names(self) -> list[str]:
        """Names of all parameters."""
        return [name for bucket in self.buckets for name in bucket.names]

    @property
    def data(self) -> list[Tensor]:
        """All parameters without autograd."""
        return [param for bucket in self.buckets for param in bucket.data]

    def restore(self) -> None:
        """Drop what happened since the last exchange: the parameters hold ``x``."""
        if self.away:
            for bucket in self.buckets:
                bucket.restore()
        self.away = False
        self.local_steps = 0
        self.stash = []
        self.bad = None
        self.mixed = False
        self.flight = None

    def show_common(self) -> None:
        """Swap ``x`` in, in the middle of a round."""
        self.stash = [param.clone() for param in self.data]
        for bucket in self.buckets:
            bucket.restore()

    def hide_common(self) -> None:
        """Swap ``z`` back in, if ``x`` is shown."""
        if self.stash:
            for param, local in zip(self.data, self.stash, strict=True):
                param.copy_(local)
            self.stash = []


def make_buckets(params: Mapping[str, Parameter], max_bytes: float) -> list[Bucket]:
    """Cut parameters, in order, into buckets whose memory takes at most ``max_bytes``; a larger one is alone in its own."""
    buckets: list[Bucket] = []
    for same in _by_kind(params):
        names: list[str] = []
        size = 0
        for name in same:
            nbytes = params[name].numel() * wide(params[name].dtype).itemsize
            if names and size + nbytes > max_bytes:
                buckets.append(Bucket(names, [params[n] for n in names]))
                names, size = [], 0
            names.append(name)
            size += nbytes
        buckets.append(Bucket(names, [params[n] for n in names]))
    return buckets


def _by_kind(params: Mapping[str, Parameter]) -> Iterable[list[str]]:
    kinds: dict[object, list[str]] = {}
    for name, param in params.items():
        kinds.setdefault((param.dtype, param.device), []).append(name)
    return kinds.values()
