"""The server: adds what the first B of K workers send, waits for all every T rounds, and holds the certificate. Pure.

    gather, t < T-1:   first B messages    w += F_k, sorted by worker     reply to those B             (S1-S3)
    gather, t = T-1:   all K messages      w += F_k                       full synchronisation:
        SYNC      -> RESIDUAL     v = w + sum r_k; where all r_k are sent (flush) or are 0, w = v
        EVALUATE  -> LOSSES       certificate at v; stop, or reply to all
    stop:   FINISH -> FINAL       v from the dual variables, anew, for D; P is that of the tracked w;  STOP

``receive`` is the only entry: whoever delivers messages, a simulator or a network, hands over one at a time and sends what
it returns. A worker has at most one message outstanding, so no update is older than T rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lightning_distopt.errors import CertificateError, ProtocolError
from lightning_distopt.exchange.meter import Meter
from lightning_distopt.primal_dual import kernels
from lightning_distopt.primal_dual.certificate import ROUNDING, Certificate, Row, certify, rounds_ahead
from lightning_distopt.primal_dual.changes import Assigned, Largest
from lightning_distopt.primal_dual.checkpoints import Start
from lightning_distopt.primal_dual.config import Config
from lightning_distopt.primal_dual.messages import Kind, Message

__all__ = ["Server"]

Array = NDArray[np.float64]
Outgoing = list[tuple[int, Message]]
_DRIFT = 1e-6  # relative; rounding reaches some 1e-12 in 500 rounds


class Server:
    """The state machine of the server.

    Args:
        config: of the run.
        dim: coordinates of the model, the constant feature included.
        lam: strength of the regulariser.
        total: N, the weight of all samples.
        clock: seconds, for the rows of the history.
        on_row: called with every row of the history.
        checkpoint_every: certified synchronisations between checkpoints; 0 is none.
        on_checkpoint: called as ``on_checkpoint(version, certificate)`` once every worker has kept its part.
        start: where a run is continued; its ``alpha`` is not looked at.

    Attributes:
        model: w.
        version: server rounds done.
        history: one row a certificate.
        certificate: the last one.
        finished: whether STOP has been sent to all.
        meter: bytes by purpose; "certificate" and "setup" are not part of the method.
    """

    def __init__(
        self,
        config: Config,
        dim: int,
        lam: float,
        total: float,
        clock: Callable[[], float] | None = None,
        on_row: Callable[[Row], None] | None = None,
        checkpoint_every: int = 0,
        on_checkpoint: Callable[[int, Certificate], None] | None = None,
        start: Start | None = None,
    ) -> None:
        began, start = time.perf_counter(), start or Start()
        self.config, self.dim, self.lam, self.total = config, dim, lam, total
        self.model = np.zeros(dim) if start.model is None else start.model.copy()
        self.version, self._before = 0, start.rounds
        self.history: list[Row] = []
        self.certificate: Certificate | None = None
        self.finished = False
        self.meter = Meter()
        self.inbox: dict[int, Message] = {}
        self.sigma = start.sigma or config.sigma
        self._clock = clock or (lambda: time.perf_counter() - began)
        self._on_row, self._checkpoint_every, self._on_checkpoint = on_row, checkpoint_every, on_checkpoint
        self._expected = Kind.HELLO
        self._changes: Assigned | Largest = (
            Assigned(config.workers) if config.downlink == "assign" else Largest(config.workers, dim, config.density)
        )
        self._closing = self._final = self._flushing = self._settled = False
        self._certified, self._exact_at, self._keeping = 0, start.rounds // config.exact_every, -1
        self._resumed = start.model is not None
        self._point, self._dual_sum, self._primal_sum = self.model, 0.0, 0.0
        self._next = 0  # version from which the gap is taken again, where its rate decides
        self._reference, self._kept = 0.0, self.model.copy()

    def close(self) -> None:
        """End the run at the next round, which all workers take part in: a budget is spent."""
        self._closing = True

    @property
    def waiting_for(self) -> tuple[int, ...]:
        """Workers without a message here."""
        return tuple(k for k in range(self.config.workers) if k not in self.inbox)

    def receive(self, worker: int, message: Message) -> Outgoing:
        """Take one message and return what is to be sent now: nothing until a group is complete.

        Raises:
            ProtocolError: if the message is not what this worker may send now; nothing of it was used.
            CertificateError: see :func:`lightning_distopt.primal_dual.certificate.certify`.
        """
        self._check(worker, message)
        self.meter.message(message.purpose, received=message.nbytes)
        self.inbox[worker] = message
        enough = self.config.workers if self._expected is not Kind.UPDATE or self._full else self.config.group_size
        if len(self.inbox) < enough:
            return []
        senders = sorted(self.inbox)
        messages = [self.inbox[k] for k in senders]
        self.inbox = {}
        outgoing = {
            Kind.HELLO: self._begin,
            Kind.UPDATE: self._advance,
            Kind.RESIDUAL: self._synchronise,
            Kind.LOSSES: self._conclude,
            Kind.FINAL: self._finish,
        }[self._expected](senders, messages)
        for _, answer in outgoing:
            self.meter.message(answer.purpose, sent=answer.nbytes)
        return outgoing

    @property
    def _full(self) -> bool:
        """Whether this round waits for all."""
        last = self.version % self.config.sync_period == self.config.sync_period - 1
        return last or self._closing or self._rounds + 1 >= self.config.max_rounds

    @property
    def _rounds(self) -> int:
        """Rounds done, those of an interrupted run included."""
        return self._before + self.version

    @property
    def _synchronised(self) -> int:
        """Full synchronisations done: every T-th round is one."""
        return -(-self._rounds // self.config.sync_period)

    def _check(self, worker: int, message: Message) -> None:
        def wrong(what: str) -> ProtocolError:
            return ProtocolError(
                f"Worker {worker} sent a {message.kind.name} that cannot be used: {what}. It is broken, or not of this run.",
                worker,
            )

        if self.finished or not 0 <= worker < self.config.workers or worker in self.inbox:
            raise wrong("nothing was asked of it")
        if message.kind is not self._expected:
            raise wrong(f"{self._expected.name} was expected")
        if not 0 <= self.version - message.version <= self.config.sync_period:
            raise wrong(f"its model has version {message.version}, the server's {self.version}")
        size, places = message.values.size, message.indices
        if places is None:
            if size not in (0, self.dim):
                raise wrong(f"{size} values for {self.dim} coordinates")
        elif places.size != size or (
            size and (places[0] < 0 or places[-1] >= self.dim or not bool((places[1:] > places[:-1]).all()))
        ):
            raise wrong(f"its places are not ascending numbers below {self.dim}, one a value")
        expected = {Kind.HELLO: (3,), Kind.UPDATE: (0,), Kind.RESIDUAL: (1, 1 + self.dim)}.get(message.kind, (1,))
        if message.scalars.size not in expected:
            raise wrong(f"{message.scalars.size} scalars")
        if not (_finite(message.values) and _finite(message.scalars)):
            raise wrong("a number is not finite; it has diverged, or its data is broken")

    def _begin(self, senders: list[int], messages: list[Message]) -> Outgoing:
        marks = {float(message.scalars[0]) for message in messages}
        if len(marks) > 1:
            raise ProtocolError("All workers must have the same settings: got different ones. Start them alike.")
        for message in messages:
            if message.values.size:
                self.model += message.values
        # D where the run starts: what the guard compares with first.
        half = 0.5 * self.lam * float(self.model @ self.model)
        self._reference = sum(float(message.scalars[2]) for message in messages) / self.total - half
        self._kept = self.model.copy()
        self._expected = Kind.UPDATE
        held = self._resumed or not self.model.any()  # by the workers, already
        start = np.empty(0) if held else self.model.copy()
        return [(k, Message(Kind.MODEL, 0, None, start, purpose="setup")) for k in senders]

    def _advance(self, senders: list[int], messages: list[Message]) -> Outgoing:
        full = self._full
        self._closing = self._closing or self._rounds + 1 >= self.config.max_rounds
        for message in messages:
            if message.indices is not None:
                self.model[message.indices] += message.values
            elif message.values.size:
                self.model += message.values
        self.version += 1
        self._changes.record(self.version, messages, self.dim)
        if full:
            every = self.config.flush_every
            self._flushing = bool(every) and self._synchronised % every == 0
            exact = self._rounds // self.config.exact_every > self._exact_at
            if self._flushing or self._certifying or exact:
                if exact:
                    self._exact_at = self._rounds // self.config.exact_every
                self._expected = Kind.RESIDUAL
                asked = np.array([self._flushing, exact], np.float64)
                return self._to_all(Kind.SYNC, np.empty(0), asked, "flush" if self._flushing else "certificate")
        return self._replies(senders)

    @property
    def _certifying(self) -> bool:
        """Whether this full synchronisation takes the gap."""
        every = self.config.certify_every
        due = self.version >= self._next if every is None else self._synchronised % every == 0
        return due or self._closing

    def _synchronise(self, senders: list[int], messages: list[Message]) -> Outgoing:
        point, unsent = self.model.copy(), False
        for message in messages:
            unsent = unsent or bool(message.values.size)
            if message.indices is not None:
                point[message.indices] += message.values
            elif message.values.size:
                point += message.values
        if messages[0].scalars.size > 1:
            exact = np.sum([message.scalars[1:] for message in messages], axis=0)
            self._refuse_drift(point, exact)
            self.model += exact - point
            point = exact
        self._dual_sum = sum(float(message.scalars[0]) for message in messages)
        self._settled = self._flushing or not unsent
        if self._settled:
            self.model[:] = point
            self._changes.forget(self.version)
        self._point = point
        purpose = "flush" if self._flushing else "update" if self._settled else "certificate"
        if self._certifying:
            self._certified += 1
            keep = -1
            if self._checkpoint_every and self._certified % self._checkpoint_every == 0:
                keep = self.version
            return self._evaluate(keep, self._settled, purpose)
        self._expected = Kind.UPDATE
        return self._to_all(Kind.MODEL, point, np.empty(0), purpose) if self._settled else self._replies(senders)

    def _evaluate(self, keep: int, adopt: bool, purpose: str) -> Outgoing:
        self._keeping, self._expected = keep, Kind.LOSSES
        return self._to_all(Kind.EVALUATE, self._point.copy(), np.array([keep, adopt], np.float64), purpose)

    def _conclude(self, senders: list[int], messages: list[Message]) -> Outgoing:
        self._primal_sum = sum(float(message.scalars[0]) for message in messages)
        self.certificate = certify(self._primal_sum, self._dual_sum, self._point, self.lam, self.total)
        self._note(self.certificate)
        if self._final:
            return self._stop()
        self._next = self.version + rounds_ahead(self.history, self.config.tol)
        guard = self._guard(self.certificate.dual) if self.config.guard else np.empty(0)
        went_back = bool(guard.size and guard[1])
        if went_back:
            self._next = self.version + 1
        elif self._keeping >= 0 and self._on_checkpoint is not None:
            self._on_checkpoint(self._keeping, self.certificate)
        if not went_back and (self._closing or self.certificate.relative <= self.config.tol):
            self._expected = Kind.FINAL
            self.model[:] = self._point  # workers take it too, and forget their residuals
            return self._to_all(Kind.FINISH, np.empty(0), np.empty(0), "setup")
        self._expected = Kind.UPDATE
        if self._settled or went_back:
            return self._to_all(Kind.REPLY, np.empty(0), guard, "certificate")  # they hold the model already
        return self._replies(senders, guard)

    def _guard(self, dual: float) -> Array:
        """Return what workers are told: sigma', and whether all go back to the last certified state."""
        if dual >= self._reference or self.sigma >= self.config.safe_sigma:
            self._reference, self._kept = dual, self.model.copy()
            return np.array([self.sigma, 0.0])
        self.sigma = min(2.0 * self.sigma, self.config.safe_sigma)
        self.model[:] = self._kept
        self._changes.forget(self.version)
        return np.array([self.sigma, 1.0])

    def _finish(self, senders: list[int], messages: list[Message]) -> Outgoing:
        exact = np.sum([message.values for message in messages], axis=0)
        self._dual_sum = sum(float(message.scalars[0]) for message in messages)
        if self._refuse_drift(self._point, exact) <= ROUNDING:
            self.certificate = certify(self._primal_sum, self._dual_sum, exact, self.lam, self.total, self._point)
            self._note(self.certificate)
            return self._stop()
        self.model[:] = exact
        self._point = self.model
        self._final, self._flushing = True, True
        return self._evaluate(-1, True, "flush")  # no checkpoint: the run ends here

    def _stop(self) -> Outgoing:
        self.finished = True
        return self._to_all(Kind.STOP, np.empty(0), np.empty(0), "setup")

    def _refuse_drift(self, tracked: Array, exact: Array) -> float:
        """Return how far the model is from that of the dual variables, of its largest coordinate; refuse what is lost."""
        off, size = kernels.apart(exact, tracked)
        drift = off / max(size, 1e-300) if off > 1e-12 else 0.0
        if drift > _DRIFT:
            raise CertificateError(
                f"The model must equal that of the dual variables to {_DRIFT:g}: it is off by {drift:.3g}. An update was lost; "
                "please report this."
            )
        return drift

    def _replies(self, receivers: list[int], scalars: Array | None = None) -> Outgoing:
        extra = np.empty(0) if scalars is None else scalars
        answers = []
        for k in receivers:
            places, values = self._changes.since_last(k, self.version, self.model)
            answers.append((k, Message(Kind.REPLY, self.version, places, values, extra)))
        return answers

    def _to_all(self, kind: Kind, values: Array, scalars: Array, purpose: str) -> Outgoing:
        message = Message(kind, self.version, None, values, scalars, purpose)
        return [(k, message) for k in range(self.config.workers)]

    def _note(self, certificate: Certificate) -> None:
        apart = ("certificate", "setup")
        up = sum(n for purpose, n in self.meter.received.items() if purpose not in apart)
        down = sum(n for purpose, n in self.meter.sent.items() if purpose not in apart)
        row = Row(self._clock(), self.version, certificate.primal, certificate.dual, certificate.gap, up, down)
        self.history.append(row)
        if self._on_row is not None:
            self._on_row(row)


def _finite(array: Array) -> bool:
    """Whether all of it is finite: their sum says so at once, unless it overflows."""
    return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())
