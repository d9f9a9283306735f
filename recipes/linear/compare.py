"""Which method would reach a gap first on a cluster that you describe: one LIBSVM file, a virtual clock, a picture.

python -m recipes.linear.compare --data <a9a.gz> --workers 8 --slow 0.1 --dense-message 5
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from lightning_distopt.primal_dual import Cluster, Row, preset, read_libsvm, shards_of, simulate

__all__ = ["compare", "main"]

METHODS = ("acpd", "acpd_authors", "cocoa_plus", "cocoa")


def compare(
    path: str, workers: int, cluster: Cluster, dense_message: float, loss: str, lam: float, tol: float
) -> dict[str, list[Row]]:
    """Return the history of every method on the same shards and cluster."""
    x, y = read_libsvm(path)
    shards = shards_of(x, np.where(y > 0, 1.0, -1.0), workers, loss=loss, lam=lam, bias=True)
    link = 8 * shards[0].dim / dense_message if dense_message else float("inf")
    shaped = Cluster(**{**vars(cluster), "bandwidth": link})
    return {name: simulate(shards, preset(name, workers, tol=tol, max_rounds=2000), shaped).history for name in METHODS}


def main(args: Sequence[str] | None = None) -> None:
    """Print a table, and draw the histories if asked to."""
    parser = argparse.ArgumentParser(prog="recipes.linear.compare", description="Methods on a described cluster.")
    parser.add_argument("--data", required=True, help="LIBSVM file with two classes, plain or gzip")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--loss", default="logistic")
    parser.add_argument("--lam", type=float, default=1e-3)
    parser.add_argument("--tol", type=float, default=1e-4)
    parser.add_argument("--slow", type=float, default=0.0, help="share of local solves that take ten times as long")
    parser.add_argument("--dense-message", type=float, default=0.0, help="what a dense message costs, in local solves")
    parser.add_argument("--picture", help="file for a picture of the gap against time")
    given = parser.parse_args(args)
    cluster = Cluster(slow_probability=given.slow)
    histories = compare(given.data, given.workers, cluster, given.dense_message, given.loss, given.lam, given.tol)
    print(f"{'method':<14}{'time':>10}{'rounds':>8}{'gap':>10}{'MB up':>10}{'MB down':>10}")
    for name, rows in histories.items():
        last = rows[-1]
        sent = f"{last.bytes_up / 1e6:>10.2f}{last.bytes_down / 1e6:>10.2f}"
        print(f"{name:<14}{last.seconds:>10.1f}{last.rounds:>8}{last.gap:>10.1e}{sent}")
    if given.picture:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(layout="constrained")
        for name, rows in histories.items():
            axes.semilogy([row.seconds for row in rows], [max(row.gap, 1e-16) for row in rows], label=name)
        axes.set(xlabel="time, in local solves", ylabel="duality gap")
        axes.legend()
        figure.savefig(given.picture)
        plt.close(figure)


if __name__ == "__main__":
    main()
