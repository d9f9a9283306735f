"""Short fits on forked processes, and checks that run inside of them.

After a fit with a fork strategy the parent process has the weights and nothing else, so what concerns a rank is asserted
in callbacks, which raise in the worker and thereby in the test.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException

from lightning_distopt import CompressedDDPStrategy

State = dict[str, Tensor]


_ROOT = tempfile.TemporaryDirectory(prefix="fits-")


def compressed(**arguments: Any) -> CompressedDDPStrategy:
    """Return the strategy under test, on forked processes."""
    return CompressedDDPStrategy(start_method="fork", **arguments)


def trainer(strategy: Any, steps: int = 10, devices: int = 2, **arguments: Any) -> Trainer:
    """Return a quiet trainer for ``steps`` optimizer steps."""
    quiet = {
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
        "default_root_dir": _ROOT.name,  # of the checkpoints that Lightning adds by itself
    }
    return Trainer(accelerator="cpu", devices=devices, strategy=strategy, **{**quiet, **arguments})


def fit(module: pl.LightningModule, strategy: Any, steps: int = 10, ckpt_path: Any = None, **arguments: Any) -> State:
    """Fit and return the state that the module has afterwards."""
    trainer(strategy, steps, **arguments).fit(module, ckpt_path=ckpt_path)
    return {name: value.clone() for name, value in module.state_dict().items()}


def sidecar(checkpoint: Path, rank: int) -> Path:
    """Return the file of a rank beside a checkpoint that was saved once."""
    (save,) = Path(f"{checkpoint}.ranks").iterdir()
    return save / f"{rank}.pt"


def distance(a: State, b: State) -> float:
    """Return the largest difference between two states with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def flat(module: torch.nn.Module) -> Tensor:
    """Return all parameters as one tensor."""
    return torch.cat([p.detach().double().reshape(-1) for p in module.parameters()])


def gathered(tensor: Tensor) -> list[Tensor]:
    """Return every rank's tensor."""
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(every, tensor.contiguous())
    return every


def assert_same_on_all_ranks(tensor: Tensor) -> None:
    for other in gathered(tensor):
        assert torch.equal(tensor, other), (tensor - other).abs().max()


class At(Callback):
    """Call functions of (trainer, module) in hooks: ``At(train_batch_end=check)``."""

    def __init__(self, **checks: Callable[[Trainer, Any], None]) -> None:
        for name, check in checks.items():
            assert hasattr(self, f"on_{name}")
            setattr(self, f"on_{name}", lambda trainer, module, *args, check=check: check(trainer, module))


class Agree(Callback):
    """After every batch all ranks hold the same parameters, bit for bit, and none is away from the common model.

    In a round of several local steps they need not, until it ends.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        sync = getattr(trainer.strategy, "update_sync", None)
        if sync is not None and sync.config.sync_every > 1 and sync.away:
            return
        assert_same_on_all_ranks(flat(pl_module))
        assert sync is None or not sync.away


class Failures:
    """Notes the exception of every rank in a folder, before the launcher ends the processes that still run.

    Lightning calls ``on_exception`` in the parent process only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fit(self, module: pl.LightningModule, strategy: Any, **arguments: Any) -> list[str]:
        """Fit until all ranks have failed; return their exceptions."""
        watched = trainer(strategy, **arguments)
        launch = watched.strategy.launcher.launch
        watched.strategy.launcher.launch = lambda function, *args, **kwargs: launch(
            partial(self._noted, watched, function), *args, **kwargs
        )
        with pytest.raises(ProcessRaisedException):
            watched.fit(module)
        return [note.read_text() for note in sorted(self.folder.glob("*.note"))]

    def _noted(self, trainer: Trainer, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            note = self.folder / f"{trainer.global_rank}.part"
            note.write_text(f"{type(error).__name__}: {error}")
            note.rename(note.with_suffix(".note"))
            deadline = time.monotonic() + 15
            while len(list(self.folder.glob("*.note"))) < trainer.world_size and time.monotonic() < deadline:
                time.sleep(0.01)
            raise


@contextmanager
def messages_to(file: Path) -> Iterator[None]:
    """Write what Lightning and we say to a file, in this process and in those forked by it."""
    handler = logging.FileHandler(file)
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in ("lightning.fabric", "lightning.pytorch"):
            logging.getLogger(name).removeHandler(handler)
        handler.close()


@contextmanager
def warnings_to(file: Path) -> Iterator[None]:
    """Write the warnings of this process and of those forked by it to a file."""

    def write(message: Any, *args: Any) -> None:
        with file.open("a") as lines:
            lines.write(f"{message}\n")

    file.touch()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = write
        yield
