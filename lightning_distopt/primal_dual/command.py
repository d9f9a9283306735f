"""``distopt solve``: a linear model from a LIBSVM file, without Python."""

from __future__ import annotations

import argparse
import csv
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_distopt.primal_dual.config import PRESETS
from lightning_distopt.primal_dual.estimators import ACPDClassifier, ACPDRegressor
from lightning_distopt.primal_dual.libsvm import read_libsvm
from lightning_distopt.primal_dual.losses import LOSSES

__all__ = ["run"]


def run(args: Sequence[str]) -> int:
    """Solve and print objective, gap, rounds, bytes and score; return the exit code.

    Started by ``torchrun``, every rank reads its own lines of the file.

    Args:
        args: what follows ``distopt solve``.

    Raises:
        ValueError, OSError, DistoptError: see the estimators.
    """
    given = _parser().parse_args(args)
    estimator = _estimator(given)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        if alone:
            x, y = read_libsvm(given.data, given.features)
            estimator.fit(x, y)
        else:
            estimator.fit_shard(given.data)
    if not alone and int(os.environ.get("RANK", "0")):
        return 0
    last = estimator.history_[-1]
    print(f"objective {estimator.primal_:.10g}, duality gap {estimator.gap_:.3g}, lam {estimator.lam_:.6g}")
    print(
        f"{estimator.n_iter_} rounds in {last['seconds']:.2f} s; {(last['bytes_up'] + last['bytes_down']) / 1e6:.2f} MB sent"
    )
    what = "accuracy" if isinstance(estimator, ACPDClassifier) else "R2"
    if alone:
        print(f"{what} on {given.data}: {estimator.score(x, y):.4f}")
    if given.test is not None:
        x, y = read_libsvm(given.test, estimator.n_features_in_)
        print(f"{what} on {given.test}: {estimator.score(x, y):.4f}")
    if given.output is not None:
        classes = getattr(estimator, "classes_", np.empty(0))
        np.savez(given.output, coef=estimator.coef_, intercept=estimator.intercept_, classes=classes)
        print(f"model in {given.output}: arrays coef, intercept, classes")
    if given.history is not None:
        with open(given.history, "w", newline="") as file:
            writer = csv.DictWriter(file, list(last), lineterminator="\n")
            writer.writeheader()
            writer.writerows(estimator.history_)
        print(f"history in {given.history}")
    return 0


def _estimator(given: argparse.Namespace) -> Any:
    kind = ACPDRegressor if not LOSSES[given.loss].labels and not given.classify else ACPDClassifier
    return kind(
        loss=given.loss, lam=given.lam, C=given.c, n_workers=given.workers, algorithm=given.algorithm,
        group_size=given.group_size, sync_period=given.sync_period, density=given.density, local_steps=given.local_steps,
        sigma=given.sigma, gamma=given.gamma, fit_intercept=not given.no_intercept, tol=given.tol,
        max_rounds=given.max_rounds, seed=given.seed, verbose=not given.quiet, on_worker_loss=given.on_worker_loss,
        checkpoint=given.checkpoint,
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distopt solve",
        description="Solve a linear model with L2 to a duality gap, over one or many workers.",
        epilog="example: distopt solve --data a9a.gz --loss logistic --workers 4 --output model.npz",
    )
    parser.add_argument("--data", required=True, help="LIBSVM file to fit on, plain or gzip")
    parser.add_argument("--test", help="LIBSVM file to score")
    parser.add_argument("--loss", choices=tuple(LOSSES), default="logistic", help="squared losses are regression")
    parser.add_argument("--classify", action="store_true", help="with a squared loss, labels are classes all the same")
    parser.add_argument("--lam", type=float, default=1e-4, help="strength of the regulariser (1e-4)")
    parser.add_argument("--c", type=float, help="LIBLINEAR's C, instead of lam")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine (1); torchrun brings its own")
    parser.add_argument("--algorithm", choices=tuple(PRESETS), default="acpd")
    parser.add_argument("--group-size", type=int, help="answers that the server waits for (half of the workers)")
    parser.add_argument("--sync-period", type=int, default=10, help="every such round waits for all (10)")
    parser.add_argument(
        "--density", type=_number_or_word, default="auto", help="share of the coordinates sent, or auto"
    )
    parser.add_argument("--local-steps", type=int, help="coordinate steps a round (one pass over the worker's samples)")
    parser.add_argument(
        "--sigma",
        type=_number_or_word,
        help="safety factor: a number, group (gamma B) or alone (gamma), both guarded; the safe gamma K if not given",
    )
    parser.add_argument("--gamma", type=float, default=1.0, help="share of each local step that is taken (1)")
    parser.add_argument("--no-intercept", action="store_true", help="do not append the constant feature")
    parser.add_argument("--features", type=int, help="number of features (the largest index of the file)")
    parser.add_argument("--tol", type=float, default=1e-4, help="relative duality gap to end at (1e-4)")
    parser.add_argument("--max-rounds", type=int, default=10_000, help="rounds at most (10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--on-worker-loss", choices=("raise", "redistribute"), default="raise")
    parser.add_argument("--checkpoint", help="folder; an interrupted run with the same data goes on from there")
    parser.add_argument("--output", help="file for the model, .npz")
    parser.add_argument("--history", help="file for the history, .csv")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
