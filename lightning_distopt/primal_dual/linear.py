"""What the estimators share: checks, problems solved one after another, fits on shards, histories."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.extmath import safe_sparse_dot
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from lightning_distopt.errors import DataError
from lightning_distopt.primal_dual.certificate import Row
from lightning_distopt.primal_dual.checkpoints import CheckpointFile, fingerprint_of
from lightning_distopt.primal_dual.config import (
    Config,
    check_density,
    check_positive,
    check_seed,
    check_tol,
    check_whole,
    preset,
)
from lightning_distopt.primal_dual.libsvm import read_libsvm
from lightning_distopt.primal_dual.losses import Loss, loss_named
from lightning_distopt.primal_dual.processes import Job, solve_on_processes
from lightning_distopt.primal_dual.progress import log_to, shown
from lightning_distopt.primal_dual.shard import Shard
from lightning_distopt.primal_dual.shards import Ranks, agreed, checkpoint_path, solve_on_ranks, these_ranks, widened
from lightning_distopt.primal_dual.single import solve_alone
from lightning_distopt.primal_dual.split import as_csr, make_shard

__all__ = ["Linear"]

Array = NDArray[np.float64]
_DENSE_BELOW = 512  # coordinates: a message of 5 % would be mostly header


class Linear(BaseEstimator):
    """Fits and predicts, given what a subclass knows of targets; the subclasses document the arguments."""

    loss: str
    lam: float
    n_workers: int
    group_size: int | None
    sync_period: int
    density: float | str
    local_steps: int | None
    C: float | None
    fit_intercept: bool
    warm_start: bool
    sigma: float | str | None
    gamma: float
    tol: float
    max_rounds: int
    seed: int
    algorithm: str
    verbose: bool
    on_worker_loss: str
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int
    timeout: float

    _losses: tuple[str, ...]
    n_features_in_: int
    coef_: Array
    intercept_: Any
    dual_: Array
    gap_: float
    primal_: float
    history_: list[dict[str, float]]
    n_iter_: int

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def plot_history(self, ax: Any = None) -> Any:
        """Draw the duality gap against seconds and, for several workers, against bytes; return matplotlib's axes.

        Args:
            ax: one pair of axes, or two where bytes are drawn too; ``None`` makes them.
        """
        check_is_fitted(self)
        import matplotlib.pyplot as plt

        quantities = [("seconds", "seconds")]
        if any(row["bytes_up"] for row in self.history_):
            quantities.append(("bytes", "bytes sent and received"))
        if ax is None:
            ax = plt.subplots(
                1, len(quantities), squeeze=False, layout="constrained", figsize=(5 * len(quantities), 3.5)
            )[1][0]
        for one, (quantity, label) in zip(np.atleast_1d(ax), quantities, strict=False):
            for problem in sorted({row["problem"] for row in self.history_}):
                rows = [row for row in self.history_ if row["problem"] == problem]
                at = [row["seconds"] if quantity == "seconds" else row["bytes_up"] + row["bytes_down"] for row in rows]
                one.semilogy(at, [max(row["gap"], 1e-16) for row in rows], marker=".")
            one.set(xlabel=label, ylabel="duality gap")
        return ax

    def _checked(self, workers: int, dim: int, ranks: Ranks | None = None) -> Config:
        """Return the engine's settings; every argument is looked at, also where one worker does not need it.

        Among processes of this machine a byte costs next to nothing, so "auto" sends all and waits for all.
        """
        if not isinstance(self.fit_intercept, bool | np.bool_):
            raise TypeError(f"`fit_intercept` must be True or False: got {self.fit_intercept!r}.")
        if self.on_worker_loss not in ("raise", "redistribute"):
            raise ValueError(f"`on_worker_loss` must be 'raise' or 'redistribute': got {self.on_worker_loss!r}.")
        check_tol(self.tol)
        check_whole("checkpoint_every", self.checkpoint_every, 1)
        named = str(self.algorithm)
        density: float | None = None
        if isinstance(self.density, str):
            if self.density != "auto":
                raise ValueError(f"`density` must be 'auto' or a number in (0, 1]: got {self.density!r}.")
            if named.startswith("acpd") and (dim < _DENSE_BELOW or ranks is None):
                density = 1.0
        else:
            density = check_density(self.density)
        if self.checkpoint is not None and workers == self.n_workers == 1:
            raise ValueError("`checkpoint` needs `n_workers` above 1: one worker keeps none. Use `warm_start`.")
        check_positive("timeout", self.timeout, "It is in seconds.", math.inf)
        group = self.group_size
        if group is not None and workers < self.n_workers:  # some are lost
            group = min(group, workers)
        if group is None and self.density == "auto" and ranks is None:
            group = workers
        given: dict[str, Any] = {"local_steps": self.local_steps, "sigma": self.sigma, "tol": self.tol}
        if named.startswith("acpd"):
            given.update(density=density, group_size=group, sync_period=self.sync_period, gamma=self.gamma)
        config = preset(self.algorithm, workers, max_rounds=self.max_rounds, seed=check_seed(self.seed), **given)
        if config.density < 1.0 or config.group_size < workers:
            return config
        # Every round is a full synchronisation, whatever the period: the gap may be taken when it is worth its time.
        lazy = None if self.checkpoint is None and self.on_worker_loss == "raise" else 1
        return config.but(sync_period=1, flush_every=0, certify_every=lazy)

    def _strength(self, loss: Loss, total: float) -> float:
        """Return lam, translated from C where that is given."""
        if self.C is None:
            check_positive("lam", self.lam, "The dual needs some regularisation.")
            return float(self.lam)
        check_positive("C", self.C, "None uses `lam`.")
        return 1.0 / (float(self.C) * total * loss.c_factor)

    def _solve(
        self,
        x: Any,
        targets: Array,
        weight: Array,
        loss: Loss,
        logger: Any,
        ranks: Ranks | None = None,
        total: float | None = None,
    ) -> None:
        """Solve one problem for each row of ``targets`` and set the fitted attributes.

        With ``ranks``, the samples are those of this rank and ``total`` is the weight of all.
        """
        total = float(weight.sum()) if total is None else total
        if not total > 0:
            raise DataError(f"`sample_weight` must have a positive sum: got {total}.")
        lam = self._strength(loss, total)
        workers, speaks = (self.n_workers, True) if ranks is None else (ranks.world, ranks.rank == 0)
        config = self._checked(workers, x.shape[1] + bool(self.fit_intercept), ranks)
        starts = self._starts(targets.shape)
        models, duals, self.history_ = [], [], []
        gap = primal = 0.0
        rounds, reached = 0, True
        for problem, (y, start) in enumerate(zip(targets, starts, strict=True)):
            name = "gap" if len(targets) == 1 else f"gap, problem {problem + 1} of {len(targets)}"
            prefix = "dual" if len(targets) == 1 else f"dual/{problem}"
            with shown(bool(self.verbose) and speaks, self.tol, name) as show:

                def on_row(row: Row, problem: int = problem, prefix: str = prefix, show: Any = show) -> None:
                    self.history_.append({**row.asdict(), "problem": problem})
                    show(row)
                    if logger is not None and speaks:
                        log_to(logger, row, prefix)

                if ranks is None:
                    model, alpha, found = self._solve_one(x, y, weight, loss, lam, config, start, on_row, problem)
                else:
                    shard = make_shard(x, y, loss, lam, total, weight, bool(self.fit_intercept))
                    model, alpha, found = self._solve_shard(x, shard, config, start, on_row, problem, ranks)
            models.append(model)
            duals.append(alpha)
            gap, primal = gap + found.gap, primal + found.primal
            rounds = max(rounds, int(self.history_[-1]["rounds"]))
            reached = reached and found.relative <= self.tol
        self.gap_, self.primal_, self.n_iter_, self.lam_ = gap, primal, rounds, lam
        self._set_models(np.array(models), np.array(duals))
        if not reached:
            warnings.warn(
                f"The relative gap is above `tol={self.tol}` after `max_rounds={self.max_rounds}` rounds: P - D = {gap:.3g} at "
                f"P = {primal:.6g}. Raise `max_rounds` or `lam`, or scale the features.",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _solve_one(
        self, x: Any, y: Array, weight: Array, loss: Loss, lam: float, config: Config, start: Array | None,
        on_row: Callable[[Row], None], problem: int,
    ) -> Any:  # fmt: skip
        if config.workers == 1:
            shard = make_shard(x, y, loss, lam, float(weight.sum()), weight, bool(self.fit_intercept))
            found = solve_alone(
                shard,
                config.tol,
                config.max_rounds,
                alpha=start,
                local_steps=config.local_steps,
                seed=config.seed,
                on_row=on_row,
            )
            return found[:3]
        bias = bool(self.fit_intercept)
        file = None
        if self.checkpoint is not None:
            mark = fingerprint_of(x, y, weight, loss.name, lam, bias)
            file = CheckpointFile(Path(self.checkpoint) / f"problem-{problem}.npz", mark)
        keeping = self.checkpoint is not None or self.on_worker_loss == "redistribute"
        job = Job(
            x, y, weight, loss, lam, bias, lambda workers: self._checked(workers, x.shape[1] + int(bias)),
            self.on_worker_loss, self.timeout, self.checkpoint_every if keeping else 0,
        )  # fmt: skip
        return solve_on_processes(job, config.workers, on_row, start, file)

    def _solve_shard(
        self,
        x: Any,
        shard: Shard,
        config: Config,
        start: Array | None,
        on_row: Callable[[Row], None],
        problem: int,
        ranks: Ranks,
    ) -> Any:
        file = None
        if self.checkpoint is not None:
            mark = fingerprint_of(x, shard.y, shard.weight, shard.loss.name, shard.lam, shard.bias)
            file = CheckpointFile(checkpoint_path(self.checkpoint, problem, ranks), mark)
        model, alpha, found, history = solve_on_ranks(
            shard, config, ranks, problem, on_row, alpha=start, file=file, checkpoint_every=self.checkpoint_every,
            timeout=self.timeout,
        )  # fmt: skip
        if ranks.rank:
            self.history_ += [{**row.asdict(), "problem": problem} for row in history]
        return model, alpha, found

    def _starts(self, shape: tuple[int, ...]) -> list[Array | None]:
        before = getattr(self, "dual_", None) if self.warm_start else None
        if before is None or np.atleast_2d(before).shape != shape:
            return [None] * shape[0]
        return [row.copy() for row in np.atleast_2d(before)]

    def _set_models(self, models: Array, duals: Array) -> None:
        raise NotImplementedError

    def _told(self, x: Any, y: NDArray[Any], weight: Array, classes: Any = None) -> dict[str, Any]:
        """Return what the other ranks have to know of a shard."""
        raise NotImplementedError

    def _targets(self, y: NDArray[Any], weight: Array, told: list[dict[str, Any]]) -> tuple[Array, Array, float]:
        """Return targets by problem, weights, and the weight of all samples of all ranks."""
        raise NotImplementedError

    def fit_shard(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        classes: Any = None,
        fabric: Any = None,
        logger: Any = None,
    ) -> Linear:
        """Fit on ranks that exist already, each calling this with its own samples; return the estimator.

        Started by ``torchrun``, by SLURM, or from a launched ``lightning.Fabric``. K is the number of ranks (``n_workers`` is
        not looked at), rank 0 serves and works. All ranks hold the same model at the end, and ``dual_`` of their own samples.
        Alone, this is :meth:`fit`.

        Args:
            X: this rank's samples; or the path of a LIBSVM file, of which rank r reads every K-th line, from the r-th on, as
                a stream.
            y: this rank's targets; ``None`` for a file.
            sample_weight: of this rank's samples.
            classes: all labels that may occur; ``None`` takes those that do. Regression does not look at it.
            fabric: a launched ``lightning.Fabric``; ``None`` uses the process group that exists.
            logger: loggers of Lightning, which rank 0 writes to.

        Raises:
            ValueError: with ``on_worker_loss="redistribute"``: a lost rank takes its samples with it.
            DataError: on all ranks, if the samples of one cannot be used.
            WorkerLostError: on rank 0, if a rank is lost; ProtocolError on the others.
        """
        ranks = these_ranks(fabric)
        if ranks is None:
            return cast("Linear", self.fit(X, y, sample_weight, logger=logger))
        if self.on_worker_loss == "redistribute":
            raise ValueError(
                "`on_worker_loss` must be 'raise' in `fit_shard`: a lost rank takes its samples with it. Use "
                "`checkpoint=<folder>` and start again."
            )
        loss = loss_named(self.loss, self._losses)
        own: list[Any] = []

        def read() -> dict[str, Any]:
            samples, targets = X, y
            if isinstance(X, str | os.PathLike):
                samples, targets = read_libsvm(X, shard=ranks.rank, shards=ranks.world)
            own.extend(self._samples(samples, targets, sample_weight))
            return self._told(own[0], own[1], own[2], classes)

        told = agreed(ranks, read)
        x, labels, weight = own
        self.n_features_in_ = max(one["columns"] for one in told)
        targets, weight, total = self._targets(labels, weight, told)
        self._solve(widened(x, self.n_features_in_), targets, weight, loss, logger, ranks, total)
        return self

    def _samples(self, X: Any, y: Any, sample_weight: Any, **checks: Any) -> tuple[Any, Any, Array]:
        if isinstance(X, str | os.PathLike):
            if y is not None:
                raise TypeError("`y` must be None where `X` is the path of a LIBSVM file: its first column holds them.")
            X, y = read_libsvm(X)
        x, y = validate_data(
            self, X, y, accept_sparse="csr", dtype=[np.float64, np.float32], ensure_all_finite=False, **checks
        )
        weight = _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)
        return as_csr(x), y, weight

    def _scores(self, X: Any) -> Array:
        check_is_fitted(self)
        if isinstance(X, str | os.PathLike):
            X, _ = read_libsvm(X, columns=self.n_features_in_)
        x = validate_data(self, X, accept_sparse="csr", reset=False)
        return np.asarray(safe_sparse_dot(x, self.coef_.T, dense_output=True) + self.intercept_)
