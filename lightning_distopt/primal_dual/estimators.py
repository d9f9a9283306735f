"""Estimators of scikit-learn: linear models with L2, solved to a duality gap, on one worker or many.

    P(w) = 1/N sum_i c_i phi(x_i.w, y_i) + lam/2 |w|^2          c: sample weight times class weight; N = sum_i c_i

Source: arXiv:1910.04235 (ACPD); one worker is plain stochastic dual coordinate ascent.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils import compute_class_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets

from lightning_distopt.errors import DataError
from lightning_distopt.primal_dual.linear import Linear
from lightning_distopt.primal_dual.losses import CLASSIFICATION, REGRESSION, loss_named

__all__ = ["ACPDClassifier", "ACPDRegressor"]

Array = NDArray[np.float64]


class ACPDClassifier(ClassifierMixin, Linear):
    """Linear classifier with L2, solved to a duality gap; several classes are one against the rest.

    ``P(w) = 1/N sum_i c_i phi(x_i.w, y_i) + lam/2 |w|^2`` with y in {-1, 1}, c the sample weight times the class weight, and
    N their sum. With ``fit_intercept`` the samples get one more feature, 1, whose weight is regularised like the others; with
    ``fit_intercept=False`` nothing is added.

    Args:
        loss: "logistic", "hinge", "smoothed_hinge", "squared_hinge" (1/2 max(0, 1 - yz)^2) or "squared" (1/2 (z - y)^2).
        lam: strength of the regulariser, above 0.
        n_workers: K, processes on this machine; 1 solves in this process.
        group_size: B, answers that the server waits for; ``None`` is half of K, or K where ``density`` is "auto" among
            processes of one machine.
        sync_period: T; every T-th round waits for all workers (every round does where all answer with all they have).
        density: rho, the share of the coordinates that a message carries; "auto" is 0.05 over ranks, and 1 among processes
            of one machine, where a byte costs next to nothing, or below 512 coordinates.
        local_steps: H, coordinate steps of a worker in a round; ``None`` is one pass over its samples.
        C: LIBLINEAR's; ``None`` uses ``lam``. ``lam = 1/(C N)``, and half of that for the squared hinge, which LIBLINEAR
            writes without 1/2.
        fit_intercept: append the constant feature.
        class_weight: "balanced", or weights by class; they multiply sample weights.
        warm_start: begin at the dual variables of the last fit, where there are as many samples.
        sigma: the safety factor of local problems; ``None`` is the safe ``gamma K``; under a guard, "group" starts at
            ``gamma B`` and "alone" at ``gamma``, which is faster where workers share few features.
        gamma: share of each local step that is taken, in (0, 1].
        tol: the fit ends when ``(P - D) / max(1, |P|)`` is at most this.
        max_rounds: server rounds at most; passes, with one worker.
        seed: of the orders of samples and of the partition.
        algorithm: "acpd", "acpd_authors", "cocoa", "cocoa_plus" or "disdca"; the latter three have their own group size,
            period, density and gamma.
        verbose: show a bar with gap and bytes.
        on_worker_loss: "raise", or "redistribute": the others take over its samples from the last checkpoint.
        checkpoint: folder for checkpoints, from which an interrupted fit with the same data goes on; ``None`` keeps
            none that outlives the fit.
        checkpoint_every: certified full synchronisations between checkpoints.
        timeout: seconds after which a worker that neither answers nor shows life counts as lost.

    Attributes:
        coef_: ``(1, d)``, or ``(classes, d)``.
        intercept_: ``(1,)`` or ``(classes,)``.
        classes_: labels, sorted.
        dual_: alpha, ``(n,)`` or ``(classes, n)``.
        gap_: P - D, absolute; the sum over the problems of several classes, as is ``primal_``.
        primal_: P.
        lam_: the strength that was used.
        history_: a dictionary a certificate: seconds, rounds, primal, dual, gap, bytes_up, bytes_down, problem.
        n_iter_: rounds, of the problem that took most.

    Raises:
        ValueError, TypeError: for arguments outside their range.
        DataError: for samples that cannot be used.
        WorkerLostError: if a worker is lost and ``on_worker_loss="raise"``.

    Example:
        >>> import numpy as np
        >>> x = np.array([[0.0], [1.0], [2.0], [3.0]])
        >>> ACPDClassifier(lam=1e-3).fit(x, ["low", "low", "high", "high"]).predict([[0.2], [2.7]]).tolist()
        ['low', 'high']
    """

    _losses = CLASSIFICATION

    def __init__(
        self,
        loss: str = "logistic",
        lam: float = 1e-4,
        n_workers: int = 1,
        group_size: int | None = None,
        sync_period: int = 10,
        density: float | str = "auto",
        local_steps: int | None = None,
        C: float | None = None,
        fit_intercept: bool = True,
        class_weight: dict[Any, float] | str | None = None,
        warm_start: bool = False,
        sigma: float | str | None = None,
        gamma: float = 1.0,
        tol: float = 1e-4,
        max_rounds: int = 10_000,
        seed: int = 0,
        algorithm: str = "acpd",
        verbose: bool = False,
        on_worker_loss: str = "raise",
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 1,
        timeout: float = 30.0,
    ) -> None:
        self.loss, self.lam, self.n_workers, self.group_size = loss, lam, n_workers, group_size
        self.sync_period, self.density, self.local_steps, self.C = sync_period, density, local_steps, C
        self.fit_intercept, self.class_weight, self.warm_start = fit_intercept, class_weight, warm_start
        self.sigma, self.gamma, self.tol, self.max_rounds, self.seed = sigma, gamma, tol, max_rounds, seed
        self.algorithm, self.verbose, self.on_worker_loss = algorithm, verbose, on_worker_loss
        self.checkpoint, self.checkpoint_every, self.timeout = checkpoint, checkpoint_every, timeout

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, *, logger: Any = None) -> ACPDClassifier:
        """Fit and return the estimator.

        Args:
            X: CSR or dense, ``(n, d)``; or the path of a LIBSVM file, with ``y=None``.
            y: labels, ``(n,)``.
            sample_weight: ``(n,)``, from 0.
            logger: loggers of Lightning that get a row for every certificate.
        """
        loss = loss_named(self.loss, CLASSIFICATION)
        x, labels, weight = self._samples(X, y, sample_weight)
        targets, weight, _ = self._targets(labels, weight, [self._told(x, labels, weight)])
        self._solve(x, targets, weight, loss, logger)
        return self

    def _told(self, x: Any, y: NDArray[Any], weight: Array, classes: Any = None) -> dict[str, Any]:
        check_classification_targets(y)
        labels = np.unique(y)
        places = np.searchsorted(labels, y)
        if classes is not None and not np.isin(labels, classes).all():
            outside = labels[~np.isin(labels, classes)]
            raise DataError(
                f"`y` must hold labels of `classes={list(classes)}` only: got {list(outside)}. Add or remove them."
            )
        sums = np.bincount(places, weights=weight, minlength=len(labels))
        return {"columns": x.shape[1], "labels": labels, "counts": np.bincount(places), "weights": sums}

    def _targets(self, y: NDArray[Any], weight: Array, told: list[dict[str, Any]]) -> tuple[Array, Array, float]:
        self.classes_ = np.unique(np.concatenate([one["labels"] for one in told]))
        if len(self.classes_) < 2:
            raise ValueError(f"`y` must hold at least 2 classes: got 1 class, {self.classes_[0]}.")
        counts, sums = np.zeros(len(self.classes_)), np.zeros(len(self.classes_))
        for one in told:
            counts[np.searchsorted(self.classes_, one["labels"])] += one["counts"]
            sums[np.searchsorted(self.classes_, one["labels"])] += one["weights"]
        places = np.searchsorted(self.classes_, y)
        if self.class_weight is not None:
            every = (
                np.repeat(self.classes_, counts.astype(np.int64)) if self.class_weight == "balanced" else self.classes_
            )
            factors = compute_class_weight(self.class_weight, classes=self.classes_, y=every)
            if not (np.isfinite(factors) & (factors >= 0)).all():
                raise ValueError(f"`class_weight` must hold finite numbers from 0: got {self.class_weight}.")
            weight, sums = weight * factors[places], sums * factors
        chosen = [1] if len(self.classes_) == 2 else range(len(self.classes_))
        return np.array([np.where(places == c, 1.0, -1.0) for c in chosen]), weight, float(sums.sum())

    def decision_function(self, X: Any) -> Array:
        """Return ``x.w``: ``(n,)``, or ``(n, classes)``; above 0 speaks for the class."""
        scores = self._scores(X)
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the label of each sample, ``(n,)``."""
        scores = self.decision_function(X)
        return np.asarray(self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)])

    @available_if(lambda self: self.loss == "logistic")  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> Array:
        """Return probabilities, ``(n, classes)``, for the logistic loss; one-against-rest ones are scaled to sum 1."""
        scores = self.decision_function(X)
        positive = 0.5 * (1.0 + np.tanh(0.5 * scores))
        if scores.ndim == 1:
            return np.stack([1.0 - positive, positive], axis=1)
        return np.asarray(positive / np.maximum(positive.sum(1, keepdims=True), np.finfo(float).tiny))

    def _set_models(self, models: Array, duals: Array) -> None:
        self.coef_ = models[:, :-1] if self.fit_intercept else models
        self.intercept_ = models[:, -1] if self.fit_intercept else np.zeros(len(models))
        self.dual_ = duals[0] if len(duals) == 1 else duals


class ACPDRegressor(RegressorMixin, Linear):
    """Linear regression with L2 (ridge), solved to a duality gap.

    ``P(w) = 1/N sum_i c_i 1/2 (x_i.w - y_i)^2 + lam/2 |w|^2``, with c the sample weights and N their sum: ridge regression
    with ``alpha = lam N``, or ``1/C``. With ``fit_intercept`` the samples get one more feature, 1, whose weight is regularised
    like the others.

    Args:
        loss: "squared", or "twice_squared", which has no 1/2.
        lam: as for :class:`ACPDClassifier`, and so are the others.
        n_workers: K.
        group_size: B.
        sync_period: T.
        density: rho.
        local_steps: H.
        C: ``lam = 1/(C N)``.
        fit_intercept: append the constant feature.
        warm_start: begin at the dual variables of the last fit.
        sigma: the safety factor.
        gamma: share of each local step.
        tol: of the relative gap.
        max_rounds: at most.
        seed: of the orders of samples.
        algorithm: as there.
        verbose: show a bar.
        on_worker_loss: "raise" or "redistribute".
        checkpoint: folder for checkpoints.
        checkpoint_every: certified synchronisations between them.
        timeout: seconds without life.

    Attributes:
        coef_: ``(d,)``.
        intercept_: a number.
        dual_: alpha, ``(n,)``.
        gap_: P - D, absolute.
        primal_: P.
        lam_: the strength that was used.
        history_: a dictionary a certificate.
        n_iter_: rounds.

    Example:
        >>> import numpy as np
        >>> x = np.arange(6.0)[:, None] / 5
        >>> round(float(ACPDRegressor(lam=1e-3, tol=1e-9).fit(x, 2 * x[:, 0]).predict([[0.5]])[0]), 2)
        1.0
    """

    _losses = REGRESSION

    def __init__(
        self,
        loss: str = "squared",
        lam: float = 1e-4,
        n_workers: int = 1,
        group_size: int | None = None,
        sync_period: int = 10,
        density: float | str = "auto",
        local_steps: int | None = None,
        C: float | None = None,
        fit_intercept: bool = True,
        warm_start: bool = False,
        sigma: float | str | None = None,
        gamma: float = 1.0,
        tol: float = 1e-4,
        max_rounds: int = 10_000,
        seed: int = 0,
        algorithm: str = "acpd",
        verbose: bool = False,
        on_worker_loss: str = "raise",
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 1,
        timeout: float = 30.0,
    ) -> None:
        self.loss, self.lam, self.n_workers, self.group_size = loss, lam, n_workers, group_size
        self.sync_period, self.density, self.local_steps, self.C = sync_period, density, local_steps, C
        self.fit_intercept, self.warm_start = fit_intercept, warm_start
        self.sigma, self.gamma, self.tol, self.max_rounds, self.seed = sigma, gamma, tol, max_rounds, seed
        self.algorithm, self.verbose, self.on_worker_loss = algorithm, verbose, on_worker_loss
        self.checkpoint, self.checkpoint_every, self.timeout = checkpoint, checkpoint_every, timeout

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, *, logger: Any = None) -> ACPDRegressor:
        """Fit and return the estimator; see :meth:`ACPDClassifier.fit`."""
        loss = loss_named(self.loss, REGRESSION)
        x, y, weight = self._samples(X, y, sample_weight, y_numeric=True)
        self._solve(x, np.asarray(y, np.float64)[None], weight, loss, logger)
        return self

    def _told(self, x: Any, y: NDArray[Any], weight: Array, classes: Any = None) -> dict[str, Any]:
        return {"columns": x.shape[1], "weights": float(weight.sum())}

    def _targets(self, y: NDArray[Any], weight: Array, told: list[dict[str, Any]]) -> tuple[Array, Array, float]:
        return np.asarray(y, np.float64)[None], weight, float(sum(one["weights"] for one in told))

    def predict(self, X: Any) -> Array:
        """Return ``x.w``, ``(n,)``."""
        return self._scores(X)

    def _set_models(self, models: Array, duals: Array) -> None:
        self.coef_ = models[0, :-1] if self.fit_intercept else models[0]
        self.intercept_ = float(models[0, -1]) if self.fit_intercept else 0.0
        self.dual_ = duals[0]
