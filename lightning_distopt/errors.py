"""The errors that this package raises for reasons of its own; bad arguments are plain ``ValueError`` and ``TypeError``."""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CertificateError",
    "CheckpointError",
    "DataError",
    "DistoptError",
    "ExchangeError",
    "NonDeterministicError",
    "NonFiniteError",
    "PayloadError",
    "PipelineError",
    "ProtocolError",
    "QueryError",
    "QueryShapeError",
    "RankMismatchError",
    "ReplyError",
    "SidecarError",
    "WorkerLostError",
]


class DistoptError(RuntimeError):
    """Base class of the errors below."""


class CheckpointError(DistoptError):
    """A checkpoint could not be written on some rank, or is no checkpoint that can be read safely.

    Attributes:
        path: of the file.
    """

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message, path)
        self.path = path

    def __str__(self) -> str:
        return str(self.args[0])


class CertificateError(DistoptError):
    """A duality gap is negative or not finite: the model and its dual variables do not belong together, or diverged."""


class DataError(DistoptError, ValueError):
    """Samples or labels that a solver cannot use: not finite, a feature named twice, a line that cannot be read.

    Attributes:
        path: of the file, if they come from one.
        line: its line, from 1; 0 if that does not apply.
    """

    def __init__(self, message: str, path: str = "", line: int = 0) -> None:
        super().__init__(message, path, line)
        self.path, self.line = path, line

    def __str__(self) -> str:
        return str(self.args[0])


class BudgetError(DistoptError, ValueError):
    """The queries that are left do not suffice for the next step; nothing was asked, the last iterate is in place.

    Attributes:
        needed: queries of the next step.
        left: queries that may still be asked.
    """

    def __init__(self, message: str, needed: int = 0, left: int = 0) -> None:
        super().__init__(message, needed, left)
        self.needed, self.left = needed, left

    def __str__(self) -> str:
        return str(self.args[0])


class ExchangeError(DistoptError):
    """A collective failed or timed out: a peer has stopped, is too slow, or the network between them is broken.

    Attributes:
        rank: the rank that raises it.
        step: number of the exchange, from 0.
        bucket: names of the parameters that travelled; empty if none did.
        peer: the other end, where the backend's message names it.
        culprits: ranks that the roll-call found silent, late or ended; empty if it could not tell.
    """

    def __init__(
        self,
        message: str,
        rank: int = 0,
        step: int = 0,
        bucket: tuple[str, ...] = (),
        peer: str | None = None,
        culprits: tuple[int, ...] = (),
    ) -> None:
        super().__init__(message, rank, step, bucket, peer, culprits)  # all, so that a pickled error arrives whole
        self.rank = rank
        self.step = step
        self.bucket = bucket
        self.peer = peer
        self.culprits = culprits

    def __str__(self) -> str:
        return str(self.args[0])


class NonFiniteError(DistoptError, ValueError):
    """A NaN or an infinity would have entered a payload, a residual or the common model."""


class PayloadError(DistoptError, ValueError):
    """Bytes from elsewhere are not a payload: damaged, cut off, too long, of another version, or of another tensor."""


class QueryError(DistoptError):
    """A black box did not answer, or its answer cannot be used."""


class NonDeterministicError(QueryError):
    """The same query gave two answers, so that a difference of answers says nothing of the parameters."""


class QueryShapeError(QueryError, ValueError):
    """A query did not return one value a sample."""


class PipelineError(DistoptError):
    """A stage could not hand a batch to its neighbour or take one from it: it is gone, too slow, or sent something else.

    Attributes:
        stage: the stage that raises it.
        peer: rank of the neighbour.
        batch: the batch that was waited for or sent.
        rank: the rank that raises it.
        culprits: ranks that the roll-call found silent, late or ended; empty if it could not tell.
    """

    def __init__(
        self,
        message: str,
        stage: int = 0,
        peer: int = 0,
        batch: int = 0,
        rank: int = 0,
        culprits: tuple[int, ...] = (),
    ) -> None:
        super().__init__(message, stage, peer, batch, rank, culprits)  # all, so that a pickled error arrives whole
        self.stage = stage
        self.peer = peer
        self.batch = batch
        self.rank = rank
        self.culprits = culprits

    def __str__(self) -> str:
        return str(self.args[0])


class ProtocolError(DistoptError):
    """A message of the primal-dual solver is not what its receiver may expect.

    Attributes:
        worker: who sent it.
    """

    def __init__(self, message: str, worker: int = 0) -> None:
        super().__init__(message, worker)
        self.worker = worker

    def __str__(self) -> str:
        return str(self.args[0])


class WorkerLostError(DistoptError):
    """A worker of the primal-dual solver was killed, hangs, or sends what is no message.

    Attributes:
        worker: its number.
        rounds: server rounds done before.
    """

    def __init__(self, message: str, worker: int = 0, rounds: int = 0) -> None:
        super().__init__(message, worker, rounds)
        self.worker, self.rounds = worker, rounds

    def __str__(self) -> str:
        return str(self.args[0])


class RankMismatchError(DistoptError):
    """The ranks do not hold the same parameters in the same order, so no collective can be matched."""


class ReplyError(DistoptError, ValueError):
    """A client's reply cannot be used; the federation goes on without it.

    Attributes:
        reason: ``error``, ``malformed``, ``stale``, ``non_finite``, ``norm``, ``no_examples`` or ``duplicate``.
    """

    def __init__(self, message: str, reason: str = "malformed") -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class SidecarError(DistoptError):
    """A checkpoint and its per-rank files do not belong together; or one is lost, and ``strict_sidecars=True``."""
