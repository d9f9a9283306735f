"""Every way to start processes: fork is used by all other tests, so spawn and scripts remain."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_distopt import CompressedDDPStrategy
from tests.strategies.fits import Agree, compressed, distance, fit, sidecar, trainer
from tests.strategies.models import Net

PROJECT = Path(__file__).parents[2]


@pytest.mark.timeout(170)
def test_spawned_processes_train_as_forked_ones() -> None:
    # the strategy, a compressor object and everything in them travel as pickles
    strategy = CompressedDDPStrategy("topk:0.1", start_method="spawn")
    spawned = fit(Net(), strategy, 3, callbacks=[Agree()])
    assert distance(spawned, fit(Net(), compressed(compressor="topk:0.1"), 3)) == 0


SCRIPT = """
import sys
import torch
from lightning.pytorch import Trainer
import lightning_distopt
from lightning_distopt.callbacks import CommunicationMonitor
from tests.strategies.fits import Agree, trainer
from tests.strategies.models import Net

module = Net()
fitting = trainer("compressed_ddp", 3, callbacks=[Agree(), CommunicationMonitor()])
fitting.fit(module)
fitting.save_checkpoint(sys.argv[1] + "/after.ckpt")
(result,) = trainer("compressed_ddp", limit_val_batches=1).validate(module, verbose=False)
if fitting.is_global_zero:
    torch.save(module.state_dict(), sys.argv[1] + "/state.pt")
"""


@pytest.mark.timeout(170)
def test_a_script_starts_itself_on_every_device(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=150, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert distance(torch.load(tmp_path / "state.pt"), fit(Net(), compressed(), 3)) == 0
    assert done.stdout.count("Communication of rank 0 (CompressedDDPStrategy, 3 steps)") == 1
    # saved after the fit, with the residuals of both ranks
    for rank in (0, 1):
        saved = torch.load(sidecar(tmp_path / "after.ckpt", rank), weights_only=True)
        assert any(bool(residual.any()) for residual in saved["state"]["residuals"].values())


@pytest.mark.parametrize("start_method", ["thread", "popn"])
def test_an_unknown_start_method_is_refused_by_lightning(start_method: str) -> None:
    with pytest.raises(ValueError, match=start_method):
        trainer(CompressedDDPStrategy(start_method=start_method))
