"""Messages over torch.distributed, point to point: the header first, from any source, then its parts from that source.

    tag 1  header   int64[8]     [magic, run, kind, seq, version, encoding, entries, scalars]
    tag 2  indices  int32[entries], if sparse
    tag 3  values   float64[entries], if any
    tag 4  scalars  float64[scalars], if any

Parts are received from the source that the header came from, so messages of two workers cannot mix; sizes are compared
with what can be before anything is allocated. Receiving from any source is Gloo's.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lightning_distopt.errors import ProtocolError
from lightning_distopt.primal_dual.messages import Kind, Message

__all__ = ["Endpoint"]

_MAGIC = 0x4C444F41
_HEADER, _INDICES, _VALUES, _SCALARS = 1, 2, 3, 4
_NONE, _SPARSE, _DENSE = 0, 1, 2
_PURPOSES = ("update", "flush", "certificate", "setup")
_KINDS = {int(kind) for kind in Kind}


class Endpoint:
    """Sends and receives messages of one run.

    Args:
        group: a Gloo group; ``None`` is the default group.
        run: a number that all ranks of the run share.
        dim: coordinates of the model.

    Attributes:
        sent: bytes handed to the network.
        received: bytes taken from it.
    """

    def __init__(self, group: dist.ProcessGroup | None, run: int, dim: int) -> None:
        self._group, self._run, self._dim = group, run, dim
        self._sent: Counter[int] = Counter()
        self._seen: Counter[int] = Counter()
        self.sent = self.received = 0

    def send(self, message: Message, to: int) -> None:
        """Send a message to a rank; returns once it is on its way."""
        encoding = _NONE if not message.values.size else _DENSE if message.indices is None else _SPARSE
        self._sent[to] += 1
        header = np.array(
            [
                _MAGIC, self._run, int(message.kind), self._sent[to], message.version,
                encoding + 16 * _PURPOSES.index(message.purpose), message.values.size, message.scalars.size,
            ],
            np.int64,
        )  # fmt: skip
        self._send(header, to, _HEADER)
        if encoding == _SPARSE:
            assert message.indices is not None
            self._send(message.indices, to, _INDICES)
        if message.values.size:
            self._send(message.values, to, _VALUES)
        if message.scalars.size:
            self._send(message.scalars, to, _SCALARS)

    def receive(self, source: int | None = None) -> tuple[int, Message]:
        """Wait for a message from a rank, or from any, and return who sent it and what.

        Raises:
            ProtocolError: naming the sender, if it is not a message of this run.
            RuntimeError: if the backend fails or its time-out has passed.
        """
        header = torch.zeros(8, dtype=torch.int64)
        found = self._receive(header, source, _HEADER)
        magic, run, kind, seq, version, encoding, entries, scalars = header.tolist()
        self._seen[found] += 1
        code, purpose = encoding % 16, encoding // 16
        problem = None
        if magic != _MAGIC or run != self._run:
            problem = f"it is of run {run}, this is {self._run}"
        elif kind not in _KINDS or not 0 <= purpose < len(_PURPOSES) or code not in (_NONE, _SPARSE, _DENSE):
            problem = f"kind {kind} with encoding {encoding} is unknown"
        elif seq != self._seen[found]:
            problem = f"it is number {seq}, {self._seen[found]} was expected"
        elif not 0 <= entries <= self._dim or not 0 <= scalars <= self._dim + 1 or (code == _NONE) != (entries == 0):
            problem = f"{entries} entries and {scalars} scalars do not fit {self._dim} coordinates"
        if problem is not None:
            raise ProtocolError(
                f"Rank {found} sent what is no message of this run: {problem}. It is broken, or another program uses the "
                "group.",
                found,
            )
        indices = self._part(found, entries, torch.int32, _INDICES) if code == _SPARSE else None
        values = self._part(found, entries, torch.float64, _VALUES)
        extra = self._part(found, scalars, torch.float64, _SCALARS)
        return found, Message(
            Kind(kind),
            version,
            None if indices is None else indices.numpy(),
            values.numpy(),
            extra.numpy(),
            _PURPOSES[purpose],
        )

    def _part(self, source: int, size: int, dtype: torch.dtype, tag: int) -> Tensor:
        part = torch.empty(size, dtype=dtype)
        if size:
            self._receive(part, source, tag)
        return part

    def _send(self, array: NDArray[np.generic], to: int, tag: int) -> None:
        self.sent += array.nbytes
        dist.send(torch.from_numpy(np.ascontiguousarray(array)), to, group=self._group, tag=tag)

    def _receive(self, tensor: Tensor, source: int | None, tag: int) -> int:
        found = dist.recv(tensor, source, group=self._group, tag=tag)
        self.received += tensor.nbytes
        return int(found)
