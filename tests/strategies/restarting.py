"""A script that ``torchrun --max-restarts`` starts again.

``python -m tests.strategies.restarting <row> <folder> <steps to die at>``

The documented pattern: ``save_last=True`` and ``ckpt_path="last"``.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_distopt import ResumableLoader
from tests.strategies.fits import State, trainer
from tests.strategies.models import BATCH, Layered, Net, data
from tests.strategies.rows import build, kind


class Resuming(Net):
    """A net whose data know their place."""

    def __init__(self, batches: int = 5) -> None:
        super().__init__(batches=batches, dropout=0.5, step_size=3)

    def train_dataloader(self) -> Any:
        return ResumableLoader(data(self.global_rank, self.batches), batch_size=BATCH, shuffle=True)


class ResumingLayers(Layered):
    """The same in a pipeline."""

    def __init__(self, batches: int = 5) -> None:
        super().__init__(batches=batches, dropout=0.5, step_size=3)

    def train_dataloader(self) -> Any:
        return ResumableLoader(data(0, self.batches, size=24), batch_size=24, shuffle=True)


def resuming(row: str, batches: int = 5) -> Any:
    """Return the model of a row."""
    return (Resuming if kind(row) == "replicas" else ResumingLayers)(batches)


class Dies(Callback):
    """Ends rank 1 by SIGKILL in these steps, one in each attempt."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if attempt < len(self.steps) and trainer.global_step == self.steps[attempt] and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def run(row: str, folder: Path, steps: list[int], start_method: str = "fork", epochs: int = 2) -> State:
    """Fit from the last checkpoint, if there is one; return the weights."""
    warnings.simplefilter("ignore")
    torch.manual_seed(5)
    saving = ModelCheckpoint(folder, "{step}", save_last=True, every_n_train_steps=1)
    settings = {"max_epochs": epochs, "enable_checkpointing": True, "callbacks": [saving, Dies(steps)]}
    module = resuming(row)
    fitting = trainer(build(row, start_method=start_method), -1, **settings)
    fitting.fit(module, ckpt_path="last")
    if fitting.is_global_zero:
        torch.save(module.state_dict(), folder / "weights.pt")
    return {name: value.clone() for name, value in module.state_dict().items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], Path(sys.argv[2]), [int(step) for step in sys.argv[3].split(",")], "popen")
