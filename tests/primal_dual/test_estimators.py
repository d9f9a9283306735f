"""The estimators: scikit-learn's own checks, its solvers as references, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator

from lightning_distopt.primal_dual import ACPDClassifier, ACPDRegressor
from tests.primal_dual.problems import sparse_problem


@pytest.mark.parametrize("estimator", [ACPDClassifier(), ACPDRegressor()], ids=lambda e: type(e).__name__)
def test_scikit_learns_checks_pass(estimator: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_estimator(estimator, on_skip=None)
    assert all(check["status"] in ("passed", "skipped") for check in found)
    assert sum(check["status"] == "passed" for check in found) > 50


def test_logistic_equals_scikit_learns() -> None:
    x, y = sparse_problem("logistic", 200, 40)
    own = ACPDClassifier(C=0.7, tol=1e-12, fit_intercept=False).fit(x, y)
    other = LogisticRegression(C=0.7, tol=1e-10, fit_intercept=False, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(own.coef_, other.coef_, atol=1e-5)
    np.testing.assert_allclose(own.predict_proba(x), other.predict_proba(x), atol=1e-5)


@pytest.mark.parametrize("loss", ["hinge", "squared_hinge"])
def test_c_is_that_of_liblinear(loss: str) -> None:
    x, y = sparse_problem("logistic", 200, 40)
    own = ACPDClassifier(loss=loss, C=0.5, tol=1e-9, class_weight={-1.0: 2.0}).fit(x, y)
    other = LinearSVC(loss=loss, C=0.5, tol=1e-9, class_weight={-1.0: 2.0}, max_iter=100_000, random_state=0).fit(x, y)
    np.testing.assert_allclose(own.coef_, other.coef_, atol=1e-3)
    np.testing.assert_allclose(own.intercept_, other.intercept_, atol=1e-3)  # regularised in both


def test_squared_is_ridge() -> None:
    x, y = sparse_problem("squared", 300, 40)
    weight = np.random.default_rng(0).uniform(0, 2, 300)
    own = ACPDRegressor(C=0.5, tol=1e-12, fit_intercept=False).fit(sp.csr_matrix(x), y, sample_weight=weight)
    other = Ridge(alpha=2.0, fit_intercept=False).fit(x, y, sample_weight=weight)
    np.testing.assert_allclose(own.coef_, other.coef_, atol=1e-6)


def test_the_objective_is_the_one_that_is_documented() -> None:
    x, y = sparse_problem("logistic", 100, 20)
    weight = np.random.default_rng(0).uniform(0, 2, 100)
    fit = ACPDClassifier(lam=1e-2).fit(x, y, sample_weight=weight)
    z = y * (x @ fit.coef_[0] + fit.intercept_[0])
    squares = fit.coef_[0] @ fit.coef_[0] + fit.intercept_[0] ** 2
    primal = weight @ np.logaddexp(0, -z) / weight.sum() + 0.5e-2 * squares
    assert fit.primal_ == pytest.approx(primal, abs=1e-12)
    assert 0 <= fit.gap_ <= 1e-4 * max(1.0, primal)
    assert fit.history_[-1]["gap"] == fit.gap_


def test_several_classes_are_one_against_the_rest() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((150, 5)) + 3 * np.eye(5)[np.repeat([0, 1, 2], 50)]
    labels = np.repeat(["a", "b", "c"], 50)
    fit = ACPDClassifier(lam=1e-3).fit(x, labels)
    assert fit.coef_.shape == (3, 5)
    assert fit.dual_.shape == (3, 150)
    assert fit.score(x, labels) > 0.9
    np.testing.assert_allclose(fit.predict_proba(x).sum(1), 1.0)
    alone = ACPDClassifier(lam=1e-3).fit(x, labels == "b")
    np.testing.assert_array_equal(fit.coef_[1], alone.coef_[0])


def test_a_warm_start_needs_no_pass() -> None:
    x, y = sparse_problem("logistic")
    fit = ACPDClassifier(lam=1e-3, tol=1e-6).fit(x, y)
    again = clone(fit).set_params(warm_start=True)
    again.fit(x, y).fit(x, y)
    assert again.n_iter_ == 0
    np.testing.assert_allclose(again.coef_, fit.coef_, atol=1e-12)


def test_pipelines_and_grid_search() -> None:
    x, y = sparse_problem("logistic", 120, 20)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), ACPDClassifier()), {"acpdclassifier__lam": [1e-1, 1e-3]}, cv=2
    )
    assert search.fit(x, y).best_score_ > 0.6


@pytest.mark.parametrize("values", [np.float32, np.float64])
@pytest.mark.parametrize("places", [np.int32, np.int64])
def test_every_kind_of_matrix_is_taken(values: type, places: type) -> None:
    x, y = sparse_problem("logistic", 60, 20)
    csr = sp.csr_matrix(x.astype(values))
    csr.indices, csr.indptr = csr.indices.astype(places), csr.indptr.astype(places)
    assert ACPDClassifier(lam=1e-2).fit(csr, y).score(csr, y) > 0.8


def test_too_few_rounds_warn() -> None:
    x, y = sparse_problem("hinge")
    with pytest.warns(ConvergenceWarning, match=r"after `max_rounds=2` rounds"):
        ACPDClassifier("hinge", lam=1e-6, max_rounds=2, tol=1e-12).fit(x, y)


def test_a_logger_of_lightning_gets_every_row(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    x, y = sparse_problem("logistic", 60, 20)
    logger = CSVLogger(tmp_path)
    fit = ACPDClassifier(lam=1e-2).fit(x, y, logger=logger)
    logger.save()
    text = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "dual/gap" in text
    assert len(text.splitlines()) == 1 + len(fit.history_)


@pytest.mark.slow
def test_weights_and_biases_gets_every_row(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    x, y = sparse_problem("logistic", 60, 20)
    logger = WandbLogger(project="distopt", save_dir=tmp_path, offline=True)
    fit = ACPDClassifier(lam=1e-2).fit(x, y, logger=logger)
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert summary["dual/gap"] == fit.gap_
    assert summary["dual/seconds"] == fit.history_[-1]["seconds"]


def test_the_history_is_drawn() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    x, y = sparse_problem("logistic", 60, 20)
    axes = ACPDClassifier(lam=1e-2).fit(x, y).plot_history()
    assert axes[0].get_ylabel() == "duality gap"


def test_progress_shows_gap_and_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = sparse_problem("logistic", 60, 20)
    ACPDClassifier(lam=1e-2, verbose=True).fit(x, y)
    assert "gap" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"loss": "huber"}, "`loss` must be one of"),
        ({"lam": 0.0}, "`lam` must be a finite number above 0"),
        ({"lam": np.inf}, "`lam` must be a finite number above 0"),
        ({"lam": "strong"}, "`lam` must be a finite number above 0"),
        ({"C": -1.0}, "`C` must be a finite number above 0"),
        ({"C": np.inf}, "`C` must be a finite number above 0"),
        ({"algorithm": "sdca"}, "`algorithm`"),
        ({"algorithm": None}, "`algorithm`"),
        ({"gamma": "all"}, "`gamma`"),
        ({"sigma": [1.0]}, "`sigma`"),
        ({"seed": None}, "`seed` must be a whole number"),
        ({"timeout": None}, "`timeout` must be a number above 0"),
        ({"checkpoint_every": 0}, "`checkpoint_every`"),
        ({"class_weight": {-1.0: 1.0, 1.0: -1.0}}, "`class_weight` must hold finite numbers from 0"),
        ({"density": "some"}, "`density`"),
        ({"tol": -1.0}, "`tol`"),
        ({"n_workers": 0}, "`n_workers`"),
        ({"on_worker_loss": "ignore"}, "`on_worker_loss`"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], says: str) -> None:
    x, y = sparse_problem("logistic", 20, 5)
    with pytest.raises(ValueError, match=says):
        ACPDClassifier(**arguments).fit(x, y)


def test_numbers_of_numpy_are_taken_as_those_of_python() -> None:
    x, y = sparse_problem("logistic", 60, 20)
    own: dict[str, Any] = {"n_workers": 1, "group_size": 1, "local_steps": 7, "seed": 3}
    theirs = {name: np.int32(value) for name, value in own.items()}
    left, right = ACPDClassifier(**own).fit(x, y), ACPDClassifier(**theirs, tol=np.float32(1e-4)).fit(x, y)
    assert np.array_equal(left.coef_, right.coef_)


def test_processes_of_one_machine_send_all_unless_told_otherwise() -> None:
    own = ACPDClassifier(n_workers=4)._checked(4, 10_000)
    assert (own.density, own.group_size, own.sync_period) == (1.0, 4, 1)
    told = ACPDClassifier(n_workers=4, density=0.1)._checked(4, 10_000)
    assert (told.density, told.group_size, told.sync_period) == (0.1, 2, 10)
