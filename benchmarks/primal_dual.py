"""What the primal-dual solver costs, and where ACPD pays: against LIBLINEAR, on two cores, on limited links, simulated.

    python -m benchmarks.primal_dual single a9a=<a9a.gz> w8a=<w8a.gz> ...     one worker against LIBLINEAR: time, memory
    python -m benchmarks.primal_dual two                                      two workers against one
    python -m benchmarks.primal_dual hosts subjectivity=<file.gz> --hosts 4   namespaces at 100 Mbit/s (root, Linux)
    python -m benchmarks.primal_dual floor subjectivity=<file.gz> --hosts 4   how far from the minimum few entries leave a model
    python -m benchmarks.primal_dual simulated                                virtual clock: stragglers, 64 and 256 workers
    python -m benchmarks.primal_dual --table                                  the tables of docs/primal_dual.md

A data set is `name=path` of a LIBSVM file, or `generated` (500,000 x 1,000,000 with 50 non-zeros a row; `--rows`, `--columns`
and `--nonzeros` make it smaller). Rows are appended to `benchmarks/results/primal_dual.csv`; what is there is not run again.

Times to a gap: for our solver the certificate says when it was reached. LIBLINEAR writes the dual objective that it ended at;
its time is that of the loosest tolerance of a grid for which P of its model less that is the same gap. Both times are of the
whole `fit`. Several runs are made in turn; the fastest is compared, and the spread is kept.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from benchmarks import primal_dual_problems as problems
from benchmarks.primal_dual_hosts import floor, hosts, server
from benchmarks.primal_dual_simulated import simulated
from benchmarks.results_file import wait_for_quiet
from lightning_distopt.primal_dual import LOSSES, ACPDClassifier
from lightning_distopt.primal_dual.split import make_shard, parts
from tests.ranks import run_ranks

Array = NDArray[np.float64]

# One worker against LIBLINEAR -------------------------------------------------------------------------------------------------


def single(given: argparse.Namespace) -> None:
    """Time to the same distance from the minimum, and memory above the data."""
    for text in given.data:
        name, x, y = problems.data_set(text, given)
        for loss in ("squared_hinge", "logistic", "hinge"):
            if problems.RESULTS.find(
                study="single", data=name, loss=loss, method="liblinear", setting=f"lam={given.lam}"
            ):
                continue
            wait_for_quiet(given.patience)
            _single(name, x, y, loss, given)


def _single(name: str, x: Any, y: Array, loss: str, given: argparse.Namespace) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    n, lam = len(y), given.lam
    shard = make_shard(x, y, LOSSES[loss], lam, n)
    common: dict[str, Any] = {"study": "single", "data": name, "loss": loss, "setting": f"lam={lam}"}

    def own(tol: float) -> ACPDClassifier:
        return ACPDClassifier(loss=loss, lam=lam, fit_intercept=False, tol=tol)

    def other(tol: float, verbose: int = 0) -> Any:
        c = 1.0 / (lam * n * LOSSES[loss].c_factor)
        arguments: dict[str, Any] = {"dual": True, "C": c, "fit_intercept": False, "tol": tol, "max_iter": 3000}
        if loss == "logistic":
            return LogisticRegression(solver="liblinear", verbose=verbose, **arguments)
        return LinearSVC(loss=loss, verbose=verbose, **arguments)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own(1.0).fit(x, y)  # compiled from here on
        for tol in (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4):
            fitted, said = _said(lambda tol=tol: other(tol, 1).fit(x, y))
            w = np.ascontiguousarray(fitted.coef_[0])
            primal = shard.primal_sum(w) / n + lam / 2 * float(w @ w)
            gap = primal + lam * float(
                re.findall(r"Objective value = (-?[0-9.]+)", said)[-1]
            )  # of the dual, negated, over lam
            if gap <= problems.TOL * max(1.0, primal):
                break
        ours, theirs = [], []  # in turn, so that what else the machine does disturbs both
        for _ in range(given.repeats):
            ours.append(_timed(own(problems.TOL).fit, x, y))
            theirs.append(_timed(other(tol).fit, x, y))
        fit = own(problems.TOL).fit(x, y)
        told = f"{problems.spread(ours)}, gap {fit.gap_:.1e}, {_memory(x, y, own)}"
        problems.row(**common, method="acpd, 1 worker", seconds=f"{min(ours):.4f}", rounds=fit.n_iter_, extra=told)
        problems.row(
            **common,
            method="liblinear",
            seconds=f"{min(theirs):.4f}",
            extra=f"{problems.spread(theirs)}, gap {gap:.1e}, tol {tol:g}",
        )


def _said(call: Callable[[], Any]) -> tuple[Any, str]:
    """Return what a call returns, and what C code wrote to the standard output meanwhile: LIBLINEAR tells its dual there."""
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    library.fflush(None)
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            found = call()
        finally:
            library.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return found, file.read().decode()


def _timed(call: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


def _memory(x: Any, y: Array, own: Callable[[float], ACPDClassifier]) -> str:
    """The samples and the most that a fit allocates beside them, over the samples."""
    size = x.data.nbytes + x.indices.nbytes + x.indptr.nbytes
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        own(problems.TOL).fit(x, y)
        return f"memory {1 + (tracemalloc.get_traced_memory()[1] - before) / size:.2f} x the data"
    finally:
        tracemalloc.stop()


# Real processes ---------------------------------------------------------------------------------------------------------------


def two(given: argparse.Namespace) -> None:
    """Two workers on two cores against one, to the same gap."""
    for text in given.data or ["generated"]:
        name, x, y = problems.data_set(text, given)
        for loss in ("squared_hinge", "logistic"):
            common: dict[str, Any] = {"study": "two", "data": name, "loss": loss, "setting": f"lam={given.lam}"}
            methods: dict[str, dict[str, Any]] = {
                "1 worker": {}, "2 workers": {"n_workers": 2}, "2 workers, sigma alone": {"n_workers": 2, "sigma": "alone"},
            }  # fmt: skip
            if all(problems.RESULTS.find(**common, method=method) for method in methods):
                continue
            wait_for_quiet(given.patience)
            _note_scaling(x, y, loss, given.lam, common)
            found: dict[str, list[tuple[float, float, int]]] = {method: [] for method in methods}
            for turn in range(given.repeats + 1):  # the first compiles
                for method, own in methods.items():
                    model = ACPDClassifier(loss=loss, lam=given.lam, fit_intercept=False, tol=problems.TOL, **own)
                    whole = _timed(model.fit, x, y)
                    last = next(r for r in model.history_ if r["gap"] <= problems.TOL * max(1.0, r["primal"]))
                    if turn:
                        found[method].append((last["seconds"], whole, int(last["rounds"])))
            for method, runs in found.items():
                seconds, wholes = [one[0] for one in runs], [one[1] for one in runs]
                told = f"{problems.spread(seconds)}; the whole fit {min(wholes):.3f}"
                problems.row(**common, method=method, seconds=f"{min(seconds):.3f}", rounds=runs[0][2], extra=told)


def _note_scaling(x: Any, y: Array, loss: str, lam: float, common: dict[str, Any]) -> None:
    """What two processes could gain if they had nothing to say to each other: half a pass each, at once, against a whole one."""
    for processes, method in ((1, "a pass, 1 process"), (2, "half a pass each, 2 processes at once")):
        seconds = max(run_ranks(processes, _passed, x, y, loss, lam, timeout=300.0))
        problems.row(**common, method=method, seconds=f"{seconds:.3f}")


def _passed(rank: int, world: int, x: Any, y: Array, loss: str, lam: float) -> float:
    shard = make_shard(x, y, LOSSES[loss], lam, float(len(y)), rows=parts(len(y), world, 0)[rank])
    alpha, m, times = np.zeros(shard.n), np.zeros(shard.dim), []
    for number in range(4):
        dist.barrier()
        times.append(_timed(shard.passes, alpha, m, float(world), [number]))
    return min(times[1:])


STUDIES: dict[str, Callable[[argparse.Namespace], None]] = {
    "single": single, "two": two, "hosts": hosts, "floor": floor, "server": server, "simulated": simulated,
}  # fmt: skip


def table() -> str:
    """The tables of the docs."""
    lines: list[str] = []
    rows = problems.RESULTS.rows()
    for study in STUDIES:
        own = [r for r in rows if r["study"] == study]
        if not own:
            continue
        lines += ["", f"### {study}", ""]
        if study in ("hosts", "floor", "server"):  # many methods: one line each
            lines += ["| data | setting | method | seconds | rounds | MB up | |", "|---" * 7 + "|"]
            for r in own:
                up = f"{int(r['bytes_up']) / 1e6:.2f}" if r["bytes_up"] else ""
                cells = (r["data"], r["setting"], r["method"], r["seconds"], r["rounds"], up, r["extra"])
                lines.append("| " + " | ".join(cells) + " |")
            continue
        names = list(dict.fromkeys(r["method"] for r in own))
        lines += ["| data | loss | setting | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
        for key in dict.fromkeys((r["data"], r["loss"], r["setting"]) for r in own):
            cells = ()
            for method in names:
                found = problems.RESULTS.find(study=study, data=key[0], loss=key[1], method=method, setting=key[2])
                up = f" ({int(found['bytes_up']) / 1e6:.2f} MB up)" if found and found["bytes_up"] else ""
                cells += ("" if found is None else f"{found['seconds']}{up}",)
            lines.append("| " + " | ".join((*key, *cells)) + " |")
    return "\n".join(lines[1:])


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.primal_dual", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("study", nargs="?", choices=tuple(STUDIES))
    parser.add_argument("data", nargs="*", help="name=path of a LIBSVM file, or generated")
    parser.add_argument("--table", action="store_true", help="print the tables of the docs")
    parser.add_argument("--lam", type=float, default=1e-3)
    parser.add_argument("--loss", choices=tuple(LOSSES), default="logistic", help="of the study hosts")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--bandwidth", default="100mbit")
    parser.add_argument(
        "--only", nargs="*", default=[], help="in the study hosts: methods with one of these in the name"
    )
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--columns", type=int, default=1_000_000)
    parser.add_argument("--nonzeros", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--simulated-workers", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds that a run on processes may take")
    given = parser.parse_args(args)
    if given.study is None and not given.table:
        parser.error("name a study, or --table")
    if given.study in ("single", "hosts", "floor") and not given.data:
        parser.error("name data sets, as name=path, or `generated`")
    if given.study is not None:
        {"single": single, "two": two, "hosts": hosts, "floor": floor, "server": server, "simulated": simulated}[
            given.study
        ](given)
    if given.table:
        print(table())


if __name__ == "__main__":
    main()
