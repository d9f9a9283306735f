"""Results that grow run by run in a CSV file, so that a benchmark may be stopped and resumed."""

from __future__ import annotations

import csv
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning
import torch

__all__ = ["ResultsFile", "load", "machine", "versions", "wait_for_quiet"]


class ResultsFile:
    """A CSV file of finished runs, one row each.

    Args:
        path: of the file; made with the first row.
        columns: of every row.
        key: the columns that tell runs apart.
    """

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str]) -> None:
        self.path, self.columns, self.key = path, tuple(columns), tuple(key)

    def rows(self) -> list[dict[str, str]]:
        """Return all rows, in the order of the runs; a later row of the same run replaces an earlier one."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            found = {self._key(row): row for row in csv.DictReader(file)}
        return list(found.values())

    def find(self, **run: object) -> dict[str, str] | None:
        """Return the row of a run, ``None`` if it has not been made."""
        wanted = self._key({column: str(value) for column, value in run.items()})
        return next((row for row in self.rows() if self._key(row) == wanted), None)

    def append(self, row: Mapping[str, object]) -> None:
        """Add a run, at once on the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def record(self, **row: object) -> None:
        """Add a run with what it depends on: machine, versions and load; empty where nothing is said, short numbers."""
        filled = {column: row.get(column, "") for column in self.columns}
        filled |= {"machine": machine(), "versions_of": versions(), "load": load()}
        self.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in filled.items()})

    def _key(self, row: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(row[column] for column in self.key)


def versions() -> str:
    """Return what the figures depend on, in words."""
    return f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}"


def machine() -> str:
    """Return the kind of machine, in words: cores and processor."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        model = next((value.strip() for name, _, value in lines if name.strip() == "model name"), model)
    return f"{os.cpu_count()} cores, {model}"


def load() -> str:
    """Return how many processes want to run, on average over the last minute: what else disturbs a run."""
    return f"{os.getloadavg()[0]:.1f}"


def wait_for_quiet(seconds: float) -> None:
    """Wait until no other program wants to run, for at most ``seconds``; returns at once where the kernel does not say."""
    loadavg, deadline = Path("/proc/loadavg"), time.monotonic() + seconds
    while loadavg.exists() and time.monotonic() < deadline:
        running = []
        for _ in range(10):
            running.append(int(loadavg.read_text().split()[3].partition("/")[0]) - 1)  # but this process
            time.sleep(0.05)
        if sum(running) <= 2:
            return
