"""What the primal-dual solver costs, and where ACPD pays: against LIBLINEAR, on two cores, on limited links, simulated.

    python -m benchmarks.primal_dual single a9a=<a9a.gz> w8a=<w8a.gz> ...     one worker against LIBLINEAR: time, memory
    python -m benchmarks.primal_dual two                                      two workers against one
    python -m benchmarks.primal_dual hosts subjectivity=<file.gz> --hosts 4   namespaces at 100 Mbit/s (root, Linux)
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
import functools
import os
import re
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch.distributed as dist
from numpy.typing import NDArray

from benchmarks.hosts import bits_per_second, enter, network, why_not
from benchmarks.results_file import ResultsFile, load, machine, versions, wait_for_quiet
from lightning_distopt.primal_dual import (
    LOSSES,
    ACPDClassifier,
    Cluster,
    Config,
    Row,
    Server,
    Worker,
    preset,
    read_libsvm,
    shards_of,
    simulate,
)
from lightning_distopt.primal_dual.ranks import Hooks, Rank, run_rank
from lightning_distopt.primal_dual.split import make_shard, parts
from tests.ranks import run_ranks

Array = NDArray[np.float64]
RESULTS = ResultsFile(
    Path(__file__).parent / "results" / "primal_dual.csv",
    (
        "study", "data", "loss", "method", "setting", "seconds", "rounds", "bytes_up", "bytes_down", "extra", "load", "machine",
        "versions",
    ),
    ("study", "data", "loss", "method", "setting"),
)  # fmt: skip
TOL = 1e-4


def generated(rows: int, columns: int, nonzeros: int, seed: int = 0) -> tuple[Any, Array]:
    """Sparse rows of unit length, and the signs of a linear model of them with noise."""
    rng = np.random.default_rng(seed)
    indices = np.sort(
        rng.integers(0, columns // nonzeros, (rows, nonzeros)) + np.arange(nonzeros) * (columns // nonzeros), 1
    )
    data = rng.standard_normal((rows, nonzeros))
    data /= np.linalg.norm(data, axis=1, keepdims=True)
    bounds = np.arange(rows + 1, dtype=np.int32) * nonzeros
    x = sp.csr_matrix((data.ravel(), indices.ravel().astype(np.int32), bounds), shape=(rows, columns))
    y = x @ rng.standard_normal(columns) + 0.1 * rng.standard_normal(rows)
    return x, np.where(y > 0, 1.0, -1.0)


def data_set(text: str, given: argparse.Namespace) -> tuple[str, Any, Array]:
    """Return name, samples and labels of ``name=path`` or ``generated``."""
    if text == "generated":
        return (f"generated {given.rows}x{given.columns}", *generated(given.rows, given.columns, given.nonzeros))
    name, _, path = text.partition("=")
    x, y = read_libsvm(path)
    return name, x, np.where(y > 0, 1.0, -1.0)


def row(**figures: Any) -> None:
    """Append a row and show it."""
    whole = dict.fromkeys(RESULTS.columns, "") | {"machine": machine(), "versions": versions(), "load": load()}
    RESULTS.append(whole | figures)
    print("  ".join(f"{key}={value}" for key, value in figures.items()), flush=True)


# One worker against LIBLINEAR -------------------------------------------------------------------------------------------------


def single(given: argparse.Namespace) -> None:
    """Time to the same distance from the minimum, and memory above the data."""
    for text in given.data:
        name, x, y = data_set(text, given)
        for loss in ("squared_hinge", "logistic", "hinge"):
            if RESULTS.find(study="single", data=name, loss=loss, method="liblinear", setting=f"lam={given.lam}"):
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
            if gap <= TOL * max(1.0, primal):
                break
        ours, theirs = [], []  # in turn, so that what else the machine does disturbs both
        for _ in range(given.repeats):
            ours.append(_timed(own(TOL).fit, x, y))
            theirs.append(_timed(other(tol).fit, x, y))
        fit = own(TOL).fit(x, y)
        told = f"{_spread(ours)}, gap {fit.gap_:.1e}, {_memory(x, y, own)}"
        row(**common, method="acpd, 1 worker", seconds=f"{min(ours):.4f}", rounds=fit.n_iter_, extra=told)
        row(
            **common,
            method="liblinear",
            seconds=f"{min(theirs):.4f}",
            extra=f"{_spread(theirs)}, gap {gap:.1e}, tol {tol:g}",
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


def _spread(seconds: Sequence[float]) -> str:
    return f"median {np.median(seconds):.4f}, worst {max(seconds):.4f} of {len(seconds)}"


def _memory(x: Any, y: Array, own: Callable[[float], ACPDClassifier]) -> str:
    """The samples and the most that a fit allocates beside them, over the samples."""
    size = x.data.nbytes + x.indices.nbytes + x.indptr.nbytes
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        own(TOL).fit(x, y)
        return f"memory {1 + (tracemalloc.get_traced_memory()[1] - before) / size:.2f} x the data"
    finally:
        tracemalloc.stop()


# Real processes ---------------------------------------------------------------------------------------------------------------


def two(given: argparse.Namespace) -> None:
    """Two workers on two cores against one, to the same gap."""
    for text in given.data or ["generated"]:
        name, x, y = data_set(text, given)
        for loss in ("squared_hinge", "logistic"):
            common: dict[str, Any] = {"study": "two", "data": name, "loss": loss, "setting": f"lam={given.lam}"}
            methods: dict[str, dict[str, Any]] = {
                "1 worker": {}, "2 workers": {"n_workers": 2}, "2 workers, sigma alone": {"n_workers": 2, "sigma": "alone"},
            }  # fmt: skip
            if all(RESULTS.find(**common, method=method) for method in methods):
                continue
            wait_for_quiet(given.patience)
            found: dict[str, list[tuple[float, float, int]]] = {method: [] for method in methods}
            for turn in range(given.repeats + 1):  # the first compiles
                for method, own in methods.items():
                    model = ACPDClassifier(loss=loss, lam=given.lam, fit_intercept=False, tol=TOL, **own)
                    whole = _timed(model.fit, x, y)
                    last = next(r for r in model.history_ if r["gap"] <= TOL * max(1.0, r["primal"]))
                    if turn:
                        found[method].append((last["seconds"], whole, int(last["rounds"])))
            for method, runs in found.items():
                seconds, wholes = [one[0] for one in runs], [one[1] for one in runs]
                told = f"{_spread(seconds)}; the whole fit {min(wholes):.3f}"
                row(**common, method=method, seconds=f"{min(seconds):.3f}", rounds=runs[0][2], extra=told)


def candidates(workers: int, rows: int) -> dict[str, Config]:
    """What the study of hosts compares: some settings of each method, so that each is tuned alike."""
    passes = {1: -(-rows // workers), 3: -(-3 * rows // workers)}
    half = max(1, workers // 2)
    found = {f"CoCoA+ H={p}": preset("cocoa_plus", workers, local_steps=h) for p, h in passes.items()}
    for group, period, density in ((workers, 3, 0.05), (workers, 5, 0.02), (workers, 10, 0.05), (half, 10, 0.02)):
        for p in (1, 3):
            found[f"ACPD B={group} T={period} rho={density} H={p}"] = preset(
                "acpd", workers, group_size=group, sync_period=period, density=density, local_steps=passes[p]
            )
    return found


def hosts(given: argparse.Namespace) -> None:
    """ACPD against CoCoA+ on hosts whose links are limited, without stragglers and with random ones."""
    reason = why_not()
    if reason is not None:
        raise SystemExit(f"Hosts cannot be made: {reason}.")
    for text in given.data:
        name, x, y = data_set(text, given)
        for stragglers in (0.0, 0.1):
            setting = f"{given.hosts} hosts, {given.bandwidth}, {stragglers:.0%} of solves 10 x slower, lam={given.lam}"
            with network(given.hosts, bits_per_second(given.bandwidth)) as names:
                for method, config in candidates(given.hosts, len(y)).items():
                    common = {"study": "hosts", "data": name, "loss": given.loss, "method": method, "setting": setting}
                    if RESULTS.find(**common) or (given.only and not any(text in method for text in given.only)):
                        continue
                    wait_for_quiet(given.patience)
                    job = (x, y, given.loss, given.lam, config.but(tol=TOL, max_rounds=200), stragglers, given.repeats)
                    runs = run_ranks(
                        given.hosts, _solve, *job, timeout=given.limit, before=functools.partial(enter, names)
                    )[0]
                    _note_hosts([run[0] for run in runs], [run[1] for run in runs], common)


def _note_hosts(histories: list[list[Row]], solves: list[float], common: dict[str, Any]) -> None:
    ends = [_reached(history) for history in histories]
    reached = sorted((end for end in ends if end is not None), key=lambda end: end.seconds)
    if len(reached) < len(ends):
        row(**common, seconds="inf", rounds=histories[0][-1].rounds, extra=f"gap {histories[0][-1].gap:.1e}")
        return
    middle = reached[len(reached) // 2]
    told = f"{_spread([end.seconds for end in reached])}, a local solve {1e3 * float(np.median(solves)):.2f} ms"
    row(
        **common, seconds=f"{middle.seconds:.4f}", rounds=middle.rounds, bytes_up=middle.bytes_up,
        bytes_down=middle.bytes_down, extra=told,
    )  # fmt: skip


def _solve(
    rank: int, world: int, x: Any, y: Array, loss: str, lam: float, config: Config, stragglers: float, repeats: int
) -> list[tuple[list[Row], float]]:
    rows = parts(len(y), world, config.seed)[rank]
    shard = make_shard(x, y, LOSSES[loss], lam, float(len(y)), rows=rows)
    scratch = np.zeros(shard.dim)  # compiled, and in the cache, before the clock runs
    shard.draws(np.zeros(shard.n), scratch, 1.0, 0, 0, 0, min(10, shard.n))
    shard.primal_sum(scratch)
    spent = _slow_down(stragglers, rank)
    found = []
    for run in range(repeats):
        dist.barrier()
        spent.clear()
        _, _, server = run_rank(shard, config, Rank(rank, world, run=run), Hooks())
        found.append(([] if server is None else server.history, float(np.median(spent))))
    return found


def _slow_down(probability: float, rank: int) -> list[float]:
    """Let some of this process's local solves take ten times as long; return a list that will hold the seconds of each."""
    whole, rng, spent = Worker._update, np.random.default_rng(rank), list[float]()

    def update(self: Worker) -> Any:
        start = time.perf_counter()
        message = whole(self)
        spent.append(time.perf_counter() - start)
        if rng.random() < probability:
            time.sleep(9 * spent[-1])
        return message

    Worker._update = update  # type: ignore[method-assign]
    return spent


def _reached(history: Sequence[Row]) -> Row | None:
    return next((found for found in history if found.gap <= TOL * max(1.0, abs(found.primal))), None)


# The virtual clock ------------------------------------------------------------------------------------------------------------

SCENARIOS: dict[str, Callable[[int, int], Cluster]] = {
    "one worker 10 x slower, free network": lambda k, d: Cluster.straggler(k, 10.0),
    "one worker 10 x slower, a dense message costs 5": lambda k, d: Cluster.straggler(k, 10.0, bandwidth=8 * d / 5),
    "10 % of solves 10 x slower, free network": lambda k, d: Cluster(slow_probability=0.1),
    "10 % of solves 10 x slower, a dense message costs 5": lambda k, d: Cluster(
        slow_probability=0.1, bandwidth=8 * d / 5
    ),
    "no straggler, a dense message costs 20": lambda k, d: Cluster(bandwidth=8 * d / 20),
}


def methods(workers: int, local_steps: int | None) -> dict[str, Config]:
    """What the simulated tables compare."""
    common: dict[str, Any] = {"tol": 0.0, "local_steps": local_steps, "max_rounds": 600, "downlink": "assign"}
    half = max(1, workers // 2)
    return {
        "CoCoA+": preset("cocoa_plus", workers, **common),
        "ACPD T=10": preset("acpd", workers, group_size=half, **common),
        "ACPD T=30": preset("acpd", workers, group_size=half, sync_period=30, **common),
        "ACPD T=10, no flush": preset("acpd", workers, group_size=half, flush_every=0, **common),
        "ACPD T=10, top-k down": preset("acpd", workers, group_size=half, **{**common, "downlink": "topk"}),
        "top entries of all": preset("acpd", workers, group_size=workers, sync_period=1, flush_every=0, **common),
    }


def simulated(given: argparse.Namespace) -> None:
    """Virtual time to a gap of 1e-4: the specification's straggler table, then 64 and 256 workers."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 500)) * (rng.random((2000, 500)) < 0.05)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    y = np.where(x @ rng.standard_normal(500) + 0.1 * rng.standard_normal(2000) > 0, 1.0, -1.0)
    _simulated("Gaussian 2000x500", x, y, 8, 250)
    for workers in given.simulated_workers:
        wide, signs = generated(100 * workers, 5000, 50)
        _simulated(f"generated {100 * workers}x5000", wide, signs, workers, None)


def _simulated(name: str, x: Any, y: Array, workers: int, local_steps: int | None) -> None:
    shards = shards_of(x, y, workers, loss="smoothed_hinge", lam=1e-2)
    for scenario, cluster in SCENARIOS.items():
        for method, config in methods(workers, local_steps).items():
            common = {
                "study": "simulated",
                "data": name,
                "loss": "smoothed_hinge",
                "method": method,
                "setting": scenario,
            }
            if RESULTS.find(**common):
                continue
            with _served() as spent:
                run = simulate(shards, config.but(tol=TOL), cluster(workers, shards[0].dim))
            each = 1e3 * spent[0] / run.server.version
            per_byte = 1e9 * spent[0] / max(1, run.server.meter.bytes_received)
            last = _reached(run.history)
            if last is None:
                row(**common, seconds="inf", extra=f"gap {run.history[-1].gap:.1e}")
                continue
            row(
                **common, seconds=f"{last.seconds:.1f}", rounds=last.rounds, bytes_up=last.bytes_up, bytes_down=last.bytes_down,
                extra=f"{workers} workers, server {each:.2f} ms a round, {per_byte:.2f} ns a byte received",
            )  # fmt: skip


@contextmanager
def _served() -> Iterator[list[float]]:
    """Measure the real time that the server's state machine takes."""
    whole, spent = Server.receive, [0.0]

    def receive(self: Server, worker: int, message: Any) -> Any:
        start = time.perf_counter()
        try:
            return whole(self, worker, message)
        finally:
            spent[0] += time.perf_counter() - start

    Server.receive = receive  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Server.receive = whole  # type: ignore[method-assign]


def table() -> str:
    """The tables of the docs."""
    lines: list[str] = []
    rows = RESULTS.rows()
    for study in ("single", "two", "hosts", "simulated"):
        own = [r for r in rows if r["study"] == study]
        if not own:
            continue
        names = list(dict.fromkeys(r["method"] for r in own))
        lines += [
            "",
            f"### {study}",
            "",
            "| data | loss | setting | " + " | ".join(names) + " |",
            "|---" * (3 + len(names)) + "|",
        ]
        for key in dict.fromkeys((r["data"], r["loss"], r["setting"]) for r in own):
            cells = []
            for method in names:
                found = RESULTS.find(study=study, data=key[0], loss=key[1], method=method, setting=key[2])
                up = f" ({int(found['bytes_up']) / 1e6:.2f} MB up)" if found and found["bytes_up"] else ""
                cells.append("" if found is None else f"{found['seconds']}{up}")
            lines.append("| " + " | ".join((*key, *cells)) + " |")
    return "\n".join(lines[1:])


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.primal_dual", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("study", nargs="?", choices=("single", "two", "hosts", "simulated"))
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
    if given.study in ("single", "hosts") and not given.data:
        parser.error("name data sets, as name=path, or `generated`")
    if given.study is not None:
        {"single": single, "two": two, "hosts": hosts, "simulated": simulated}[given.study](given)
    if given.table:
        print(table())


if __name__ == "__main__":
    main()
