"""A module's buffers under local updates: averaged when a round ends, never given momentum, common where one looks.

    floating point (BatchNorm's statistics)    Σ p_k b_k, with shares of the round that add up to 1, in float32 at least
    integers (counters), booleans              the maximum

Between two averages every rank's forwards change its own. Who looks at the common model then sees the last average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.compressors.base import wide
from lightning_distopt.exchange import Meter

__all__ = ["CommonBuffers"]


class CommonBuffers:
    """The buffers of one rank.

    Args:
        named: returns the module's buffers by name.
        meter: counts what travels.
        group: process group; the default one if ``None``.

    Attributes:
        changed: a forward may have changed them since the last average.
    """

    def __init__(
        self, named: Callable[[], Iterable[tuple[str, Tensor]]], meter: Meter, group: dist.ProcessGroup | None = None
    ) -> None:
        self._named = named
        self._meter = meter
        self._group = group
        self._common: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}  # while the common ones are shown
        self.changed = False

    def enter(self) -> None:
        """Be about to run a forward: hold the rank's own, and keep the common ones."""
        self.hide()
        if not self.changed:
            self._common = self._copies()
            self.changed = True

    @torch.no_grad()
    def average(self, share: float) -> None:
        """Make them common, a collective; ``share`` is this rank's, 0 of one that sits the round out."""
        self.hide()
        if share == 0.0:
            self._write(self._common)
        if dist.is_initialized() and dist.get_world_size(self._group) > 1:
            kinds: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
            for _, buffer in self._named():
                if buffer.numel():
                    values = torch.view_as_real(buffer) if buffer.is_complex() else buffer
                    averaged = values.is_floating_point()
                    kinds.setdefault((wide(values.dtype) if averaged else torch.int64, averaged), []).append(values)
            for (dtype, averaged), same in kinds.items():
                self._reduce(same, dtype, share if averaged else None)
        self.changed = False

    def _reduce(self, buffers: list[Tensor], dtype: torch.dtype, share: float | None) -> None:
        flat = torch.cat([buffer.reshape(-1).to(dtype) for buffer in buffers])
        if share is not None:
            flat.mul_(share)
        with self._meter.timed("exchange"):
            dist.all_reduce(flat, dist.ReduceOp.MAX if share is None else dist.ReduceOp.SUM, group=self._group)
        self._meter.all_reduce("buffers", flat.nbytes, dist.get_world_size(self._group))
        for buffer, values in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
            buffer.copy_(values.view(buffer.shape))

    def show(self) -> bool:
        """Let the module hold the common ones; return whether it did not before."""
        if not self.changed or self._own:
            return False
        self._own = self._copies()
        self._write(self._common)
        return True

    def hide(self) -> None:
        """Let it hold the rank's own again."""
        self._write(self._own)
        self._own = {}

    def drop(self) -> None:
        """Forget what happened since the last average."""
        if self.changed:
            self._write(self._common)
        self._own, self.changed = {}, False

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's own; empty where they are common."""
        return (dict(self._own) or self._copies()) if self.changed else {}

    def load_state_dict(self, own: Mapping[str, Any]) -> None:
        """Take them over; the module holds, and goes on showing, the common ones until the next :meth:`enter`."""
        self.hide()
        self.changed = bool(own)
        self._common = self._copies()
        self._own = {
            name: own[name].to(buffer.device, copy=True)
            for name, buffer in self._named()
            if self.changed and name in own and own[name].shape == buffer.shape
        }

    def _copies(self) -> dict[str, Tensor]:
        return {name: buffer.detach().clone() for name, buffer in self._named()}

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        if values:
            for name, buffer in self._named():
                if name in values:
                    buffer.copy_(values[name])
