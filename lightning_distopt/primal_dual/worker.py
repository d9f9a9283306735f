"""A worker: local steps on its shard, the largest entries sent, the rest kept. Pure: messages in, messages out.

    base = w_k + weight r                                    (W1)
    (delta, u) = local SDCA from base, H steps
    alpha += gamma delta                                     (W2) the whole step
    r += gamma u                                             (W3)
    F = the largest entries of r;  r -= F                    (W4)
    send F; apply the reply to w_k                           (W5)

F itself is in general no combination of the shard's samples, so delta is never scaled or cut to fit it: what was not sent
is in r. The invariant, over all workers: ``w + sum r_k + sum F in flight == v(alpha)``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lightning_distopt.errors import CertificateError, ProtocolError
from lightning_distopt.primal_dual import kernels
from lightning_distopt.primal_dual.checkpoints import Start
from lightning_distopt.primal_dual.config import Config
from lightning_distopt.primal_dual.filter import take_largest
from lightning_distopt.primal_dual.messages import Kind, Message, is_dense, vector
from lightning_distopt.primal_dual.shard import Shard, pass_key

__all__ = ["Worker", "fingerprint"]

Array = NDArray[np.float64]
Keep = Callable[[int, "Worker"], None]


def fingerprint(config: Config, shard: Shard) -> float:
    """Return a number that is equal on workers with equal settings."""
    text = repr((config, shard.loss, shard.lam, shard.total, shard.bias, shard.dim))
    return float(zlib.crc32(text.encode()))


class Worker:
    """The state machine of worker ``number``.

    Args:
        shard: its samples.
        config: of the run, alike on all workers.
        number: from 0.
        alpha: dual variables to start from, ``(n,)``, copied; ``None`` is 0.
        start: where a run is continued: see there; ``alpha`` is looked at where this has none.
        keep: called as ``keep(version, worker)`` when the server asks for a checkpoint, with the dual variables in place.

    Attributes:
        alpha: dual variables, all steps taken included.
        model: w_k.
        residual: r_k, what has not been sent.
        drawn: samples visited.
        settled: whether ``model`` was all of the model, and nothing unsent, at the last certificate.
    """

    def __init__(
        self,
        shard: Shard,
        config: Config,
        number: int,
        alpha: Array | None = None,
        start: Start | None = None,
        keep: Keep | None = None,
    ) -> None:
        start = start or Start()
        alpha = alpha if start.alpha is None else start.alpha
        self.shard, self.config, self.number = shard, config, number
        self.alpha = np.zeros(shard.n) if alpha is None else shard.loss.feasible(np.array(alpha, np.float64), shard.y)
        self.model, self.residual = np.zeros(shard.dim), np.zeros(shard.dim)
        self.sigma, self.drawn, self.version = start.sigma or config.sigma, start.drawn, 0
        self.settled = False
        self._resumed = start.model is not None
        if start.model is not None:
            self.model[:] = start.model
        self._keep = keep
        self._buffers = (np.empty(shard.dim), np.empty(shard.dim))
        self._evaluated = np.empty(0)  # the model of the last certificate
        self._certified: tuple[Array, Array, Array] | None = None
        if config.guard:
            self._remember()

    def hello(self) -> Message:
        """Return the first message: who this is, and its part of the model to start from."""
        scalars = np.array([fingerprint(self.config, self.shard), self.shard.n, self.shard.dual_sum(self.alpha)])
        known = self._resumed or not self.alpha.any()
        values = np.empty(0) if known else self.shard.contribution(self.alpha)
        return Message(Kind.HELLO, values=values, scalars=scalars, purpose="setup")

    def handle(self, message: Message) -> Message | None:
        """Return the answer to a message of the server; ``None`` to STOP.

        Raises:
            CertificateError: if the run has diverged.
            ProtocolError: if the server reports an error, or sends what is not for workers.
        """
        self.version = message.version
        if message.kind is Kind.REPLY:
            self._apply(message)
            return self._update()
        if message.kind is Kind.MODEL:
            if message.values.size:  # otherwise it holds the model already
                self.model[:] = message.values
            if self._certified is not None and message.version == 0:
                self._remember()
            return self._update()
        if message.kind is Kind.SYNC:
            return self._rest(flush=bool(message.scalars[0]), exact=bool(message.scalars[1]), purpose=message.purpose)
        if message.kind is Kind.EVALUATE:
            return self._losses(message)
        if message.kind is Kind.FINISH:
            self.residual[:] = 0.0
            self.model[:] = self._evaluated
            dual = np.array([self.shard.dual_sum(self.alpha)])
            return self._message(Kind.FINAL, None, self.shard.contribution(self.alpha), dual, "flush")
        if message.kind is Kind.STOP:
            return None
        raise ProtocolError(
            f"The server ended the run, or sent worker {self.number} what is not for workers: {message.kind.name}. "
            "Look at the server's error."
        )

    def _update(self) -> Message:
        base, m = self._buffers
        kernels.begin(self.model, self.residual, self.config.residual_weight, base, m)
        before = self.alpha.copy() if self.config.gamma != 1.0 else None
        self._steps(m, self.config.local_steps or self.shard.n)
        finite = kernels.end(m, base, self.config.gamma / self.sigma, self.residual)
        if not finite:
            raise CertificateError(
                f"The steps of worker {self.number} must be finite: they are not, the run has diverged. Use `sigma=None` (the "
                "safe gamma K), or scale the features."
            )
        if before is not None:
            self.alpha = before + self.config.gamma * (self.alpha - before)
        if self.config.density >= 1.0 and is_dense(int(np.count_nonzero(self.residual)), self.shard.dim):
            values = self.residual.copy()
            self.residual[:] = 0.0
            return self._message(Kind.UPDATE, None, values, np.empty(0), "update")
        places, values = take_largest(self.residual, self.config.density)
        return self._message(Kind.UPDATE, places, values, np.empty(0), "update")

    def _steps(self, m: Array, count: int) -> None:
        """Take the local steps from ``m``, which becomes base + sigma u."""
        if self.shard.n == 0:
            return
        if self.config.draws == "permutation":
            self.shard.draws(self.alpha, m, self.sigma, self.config.seed, self.number, self.drawn, count)
        else:
            key = pass_key(self.config.seed, self.number, self.drawn) & (2**64 - 1)
            order = np.random.Generator(np.random.Philox(key)).integers(0, self.shard.n, count, dtype=np.int32)
            self.shard.visit(self.alpha, m, self.sigma, order)
        self.drawn += count

    def _apply(self, message: Message) -> None:
        if message.scalars.size:  # the guard's: sigma', and whether to go back
            self.sigma = float(message.scalars[0])
            if message.scalars[1]:
                assert self._certified is not None
                self.alpha, self.residual, self.model = (kept.copy() for kept in self._certified)
                return
        if self.config.downlink == "assign":
            if message.indices is not None:
                self.model[message.indices] = message.values
            elif message.values.size:
                self.model[:] = message.values
        elif message.indices is not None:
            self.model[message.indices] += message.values
        elif message.values.size:
            self.model += message.values
        if message.scalars.size:
            self._remember()

    def _remember(self) -> None:
        self._certified = (self.alpha.copy(), self.residual.copy(), self.model.copy())

    def _rest(self, flush: bool, exact: bool, purpose: str) -> Message:
        dual = np.array([self.shard.dual_sum(self.alpha)])
        scalars = np.concatenate([dual, self.shard.contribution(self.alpha)]) if exact else dual
        places = np.flatnonzero(self.residual).astype(np.int32)
        answer = self._message(Kind.RESIDUAL, places, self.residual[places], scalars, purpose)
        if flush:
            self.residual[:] = 0.0
        return answer

    def _losses(self, message: Message) -> Message:
        keep, adopt = message.scalars
        self._evaluated, self.settled = message.values, bool(adopt)
        if adopt:
            self.model[:] = message.values
        if keep >= 0 and self._keep is not None:
            self._keep(int(keep), self)
        return self._message(
            Kind.LOSSES, None, np.empty(0), np.array([self.shard.primal_sum(message.values)]), "certificate"
        )

    def _message(
        self, kind: Kind, places: NDArray[np.int32] | None, values: Array, scalars: Array, purpose: str
    ) -> Message:
        if places is not None:
            places, values = vector(places, values, self.shard.dim)
        return Message(kind, self.version, places, values, scalars, purpose)
