"""The log of a federation: one line of JSON a round, beside the server's state."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["HISTORY_FILE", "History"]

HISTORY_FILE = "rounds.jsonl"


class History:
    """Rounds as they happened: cohort, weights, norms, refusals, metrics, epsilon.

    Args:
        folder: where the file is; ``None``: keep the rounds in memory only.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.path = None if folder is None else Path(folder) / HISTORY_FILE

    def read(self) -> list[dict[str, Any]]:
        """Return the rounds in the file; a last line that was cut off is left out."""
        if self.path is None or not self.path.is_file():
            return []
        rounds = []
        for line in self.path.read_text().splitlines():
            try:
                rounds.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rounds

    def keep(self, last: int) -> list[dict[str, Any]]:
        """Forget what came after round ``last``, which will be run again; return the rest."""
        kept = [record for record in self.read() if record["round"] <= last]
        if self.path is not None and self.path.is_file():
            part = self.path.with_suffix(".part")
            part.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(part, self.path)
        return kept

    def add(self, record: dict[str, Any]) -> None:
        """Append a round."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
