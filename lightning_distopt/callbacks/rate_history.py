"""What every layer's rate did over a fit, and the picture of it beside the ramp of gradual warm-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn

__all__ = ["RateHistory"]

_COLUMNS = 512
_WARMUP_EPOCHS = 5  # of arXiv:1706.02677, for comparison


class RateHistory:
    """Keeps at most 512 moments: when they are full, every second one is dropped, and from then on only so many are noted."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._steps: list[int] = []
        self._rows: list[list[float]] = []
        self._every = 1
        self._rho = True

    def add(self, step: int, names: Sequence[str], values: Sequence[float], rho: bool) -> None:
        """Note the values of one step.

        Args:
            step: number of the optimizer step.
            names: of the parameters.
            values: one a parameter.
            rho: whether they are ``rho_k``, or ``s_k`` where that is not known.
        """
        if step % self._every:
            return
        if list(names) != self._names:  # parameters were frozen or unfrozen: their columns cannot be joined
            self._names, self._steps, self._rows = list(names), [], []
        self._rho = rho
        self._steps.append(step)
        self._rows.append(list(values))
        if len(self._rows) >= _COLUMNS:
            self._every *= 2
            kept = [place for place, noted in enumerate(self._steps) if noted % self._every == 0]
            self._steps, self._rows = [self._steps[i] for i in kept], [self._rows[i] for i in kept]

    def draw(self, path: str, rule: str, steps_per_epoch: float) -> None:
        """Write the picture, if anything was noted and matplotlib is there.

        Args:
            path: of the PNG; its folder is made.
            rule: for the title.
            steps_per_epoch: optimizer steps, for the ramp.
        """
        if not self._rows:
            return
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            rank_zero_warn(
                "`LayerwiseRateScaling` could not draw `heat_map`: matplotlib is not installed. "
                "`pip install matplotlib`, or pass `heat_map=False`."
            )
            return
        values = torch.tensor(self._rows).T
        label = "rho = |g| / n" if self._rho else "s"
        figure = Figure(figsize=(9, 3.2 + 0.13 * min(len(values), 80)), layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        edges = [*self._steps, 2 * self._steps[-1] - self._steps[-2] if len(self._steps) > 1 else self._steps[-1] + 1]
        top = None if not self._rho else 1.0
        drawn = above.pcolormesh(edges, range(len(values) + 1), values, cmap="viridis", vmin=0.0, vmax=top)
        figure.colorbar(drawn, ax=[above, below], label=label)
        every = -(-len(values) // 40)
        above.set_yticks([i + 0.5 for i in range(0, len(values), every)], self._names[::every], fontsize=6)
        above.invert_yaxis()
        above.set_title(f"{rule}: {label} of each tensor, first layer on top")
        below.plot(self._steps, values.mean(0), label=f"mean of {label.split(' ')[0]} over tensors")
        ramp = [min(1.0, step / (_WARMUP_EPOCHS * steps_per_epoch)) for step in self._steps]
        below.plot(self._steps, ramp, "--", label=f"gradual warm-up, {_WARMUP_EPOCHS} epochs")
        below.set_xlabel("optimizer step")
        below.legend(fontsize=7)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        rank_zero_info(f"`LayerwiseRateScaling` drew the rates of {len(values)} tensors into {path}.")

    def state_dict(self) -> dict[str, Any]:
        """Return everything, so that the picture of a resumed fit begins at the beginning."""
        rows = torch.tensor(self._rows)
        return {"names": self._names, "steps": self._steps, "rows": rows, "every": self._every, "rho": self._rho}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._names, self._steps, self._rows = list(state["names"]), list(state["steps"]), state["rows"].tolist()
        self._every, self._rho = int(state["every"]), bool(state["rho"])
