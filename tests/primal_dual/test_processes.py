"""Local processes: the same minimum as one worker, and what happens when one of them is lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_distopt.errors import CertificateError, CheckpointError, WorkerLostError
from lightning_distopt.primal_dual import ACPDClassifier, ACPDRegressor, Worker
from lightning_distopt.primal_dual.messages import Kind, Message
from tests.primal_dual.problems import sparse_problem

X, Y = sparse_problem("logistic", 300, 600)
LAM = 5e-2
ARGUMENTS: dict[str, Any] = {"lam": LAM, "n_workers": 3, "density": 0.2, "tol": 1e-6, "sync_period": 3}


def test_processes_reach_what_one_worker_reaches() -> None:
    alone = ACPDClassifier(lam=LAM, tol=1e-9).fit(X, Y)
    fit = ACPDClassifier(**ARGUMENTS).fit(X, Y)
    np.testing.assert_allclose(fit.coef_, alone.coef_, atol=1e-2)
    assert fit.gap_ <= 1e-6
    total = len(Y)
    full = np.hstack([X, np.ones((total, 1))])
    model = full.T @ fit.dual_ / (LAM * total)  # w = v(alpha), with alpha by sample
    np.testing.assert_allclose(np.append(fit.coef_[0], fit.intercept_), model, atol=1e-10)
    assert fit.history_[-1]["bytes_up"] > 0
    assert not multiprocessing.active_children()


def once(path: Path) -> bool:
    """Whether this is the first call, in any process."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def broken_after(monkeypatch: pytest.MonkeyPatch, flag: Path, updates: int, number: int, how: str) -> None:
    """Let worker ``number`` break in its given update, the first time that happens."""
    whole = Worker._update
    done = [0]

    def update(self: Worker) -> Message:
        done[0] += 1
        if self.number == number and done[0] == updates and once(flag):
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "hung":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif how == "raises":
                raise MemoryError("no more")
            elif how == "malformed":
                return Message(Kind.UPDATE, self.version, np.array([5, 2], np.int32), np.ones(2))
            elif how == "nan":
                return Message(Kind.UPDATE, self.version, np.array([5], np.int32), np.array([np.nan]))
        return whole(self)

    monkeypatch.setattr(Worker, "_update", update)


FAULTS = [
    ("killed", 1, "SIGKILL"),
    ("killed", 0, "SIGKILL"),
    pytest.param("raises", 2, "MemoryError: no more", marks=pytest.mark.slow),
    ("malformed", 1, "ascending numbers"),
    pytest.param("nan", 2, "not finite", marks=pytest.mark.slow),
    ("hung", 1, "no life for 1 s"),
]


@pytest.mark.parametrize(("how", "number", "says"), FAULTS)
def test_a_lost_worker_raises(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, number: int, says: str
) -> None:
    broken_after(monkeypatch, tmp_path / "flag", 8, number, how)
    with pytest.raises(WorkerLostError, match=says) as caught:
        ACPDClassifier(**{**ARGUMENTS, "tol": 1e-12, "timeout": 1.0 if how == "hung" else 20.0}).fit(X, Y)
    assert caught.value.worker == number
    assert "redistribute" in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("how", "number", "says"), [FAULTS[1], FAULTS[5]])
def test_the_others_take_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, number: int, says: str
) -> None:
    broken_after(monkeypatch, tmp_path / "flag", 8, number, how)
    timeout = 1.0 if how == "hung" else 20.0
    with pytest.warns(UserWarning, match=rf"{says}.*Going on from round \d+ with 2 workers"):
        fit = ACPDClassifier(**ARGUMENTS, on_worker_loss="redistribute", timeout=timeout).fit(X, Y)
    alone = ACPDClassifier(lam=LAM, tol=1e-9).fit(X, Y)
    assert fit.gap_ <= 1e-6
    assert alone.primal_ - 1e-8 <= fit.primal_ <= alone.primal_ + 1e-6
    rounds = [row["rounds"] for row in fit.history_]
    assert rounds == sorted(rounds)
    gaps = [row["gap"] for row in fit.history_]
    assert gaps[rounds.index(max(rounds))] < gaps[0]


def test_an_interrupted_fit_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with monkeypatch.context() as patched:
        broken_after(patched, tmp_path / "flag", 14, 1, "killed")
        with pytest.raises(WorkerLostError) as caught:
            ACPDClassifier(**{**ARGUMENTS, "tol": 1e-9}, checkpoint=folder).fit(X, Y)
    assert caught.value.rounds >= 6
    kept = dict(np.load(folder / "problem-0.npz"))
    with pytest.raises(CheckpointError, match="same samples"):
        ACPDClassifier(**ARGUMENTS, checkpoint=folder).fit(X, -Y)
    fit = ACPDClassifier(**{**ARGUMENTS, "tol": 1e-9, "n_workers": 2}, checkpoint=folder).fit(X, Y)
    assert fit.history_[0]["rounds"] > int(kept["rounds"])
    assert fit.history_[0]["dual"] > 0.3 * fit.history_[-1]["dual"]
    assert fit.gap_ <= 1e-9
    assert not (folder / "problem-0.npz").exists()


@pytest.mark.parametrize("sigma", [None, "alone"])
def test_a_resumed_fit_is_the_uninterrupted_one_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sigma: str | None
) -> None:
    # All workers answer in every round: otherwise the order of arrivals decides, and no two runs are alike.
    arguments = {**ARGUMENTS, "tol": 1e-9, "group_size": 3, "density": 0.1, "sigma": sigma}
    whole = ACPDClassifier(**arguments).fit(X, Y)
    with monkeypatch.context() as patched:
        broken_after(patched, tmp_path / "flag", 14, 1, "killed")
        with pytest.raises(WorkerLostError):
            ACPDClassifier(**arguments, checkpoint=tmp_path).fit(X, Y)
    fit = ACPDClassifier(**arguments, checkpoint=tmp_path).fit(X, Y)
    assert fit.history_[0]["rounds"] > 6
    np.testing.assert_array_equal(fit.coef_, whole.coef_)
    np.testing.assert_array_equal(fit.dual_, whole.dual_)
    assert (fit.gap_, fit.n_iter_) == (whole.gap_, whole.n_iter_)


def test_a_run_that_diverges_says_so() -> None:
    x, y = np.tile(X[:40], (3, 1)), np.tile(Y[:40], 3)
    with pytest.raises(CertificateError, match="diverged"):
        ACPDRegressor(
            lam=1e-9, n_workers=3, sigma=1e-3, density=1.0, sync_period=200, tol=1e-12, fit_intercept=False, local_steps=4000
        ).fit(x * 10, y)  # fmt: skip


@pytest.mark.slow
def test_faults_at_any_time_never_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for at in range(1, 30, 3):
        with monkeypatch.context() as patched:
            broken_after(patched, tmp_path / f"flag{at}", at, at % 3, "killed")
            started = time.monotonic()
            with pytest.warns(UserWarning, match="Going on"):
                fit = ACPDClassifier(**{**ARGUMENTS, "tol": 1e-9}, on_worker_loss="redistribute").fit(X, Y)
            assert fit.gap_ <= 1e-9
            assert time.monotonic() - started < 60
