"""What the studies of the primal-dual solver share: data, the file of results, when a gap is reached."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from benchmarks.results_file import ResultsFile, load, machine, versions
from lightning_distopt.primal_dual import Row, read_libsvm

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


def spread(seconds: Sequence[float]) -> str:
    return f"median {np.median(seconds):.4f}, worst {max(seconds):.4f} of {len(seconds)}"


def reached(history: Sequence[Row]) -> Row | None:
    return next((found for found in history if found.gap <= TOL * max(1.0, abs(found.primal))), None)
