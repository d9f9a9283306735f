"""A checkpoint is there with all of its sidecars, or the one of before is; and a disk that fails costs the save only."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_distopt import CompressedDDPStrategy, newest_whole_checkpoint
from lightning_distopt.errors import CheckpointError
from lightning_distopt.strategies.checkpoint import saves_of
from lightning_distopt.strategies.whole import is_whole
from tests.ranks import run_ranks
from tests.strategies.fits import At, distance, fit, sidecar
from tests.strategies.models import Net
from tests.strategies.rows import PIPELINES, REPLICAS, STAGED, build, net, rows_and

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


# --- killed while saving --------------------------------------------------------------------------------------------


def _save_all_the_time(row: str, folder: Path) -> None:
    os.setsid()  # one signal reaches this process and the ranks
    sink = os.open(f"{folder}.output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    logging.disable()
    warnings.simplefilter("ignore")
    # Torch holds it against forks of forks if an earlier test has asked whether there is a GPU.
    torch.cuda._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    saving = ModelCheckpoint(
        folder, "{step}", save_last=True, every_n_train_steps=1, save_top_k=2, monitor="step", mode="max"
    )
    settings = {"max_epochs": -1, "enable_checkpointing": True, "callbacks": [saving]}
    fit(net(row, batches=20), build(row), -1, "last", **settings)


def _killed_while_saving(row: str, folder: Path, moment: float) -> None:
    """Start or go on, and send SIGKILL to all processes so many seconds after the first save."""
    if not _started_and_killed(row, folder, moment):
        # Lightning looks for a free port and takes it later; another test may have been faster, once.
        assert _started_and_killed(row, folder, moment), "the run ended by itself, twice: see its output"


def _started_and_killed(row: str, folder: Path, moment: float) -> bool:
    """Return whether the run was there to be killed."""
    process = multiprocessing.get_context("fork").Process(target=_save_all_the_time, args=(row, folder))
    before = _moments(folder)
    process.start()
    try:
        deadline = time.monotonic() + 60
        while _moments(folder) == before:
            if not process.is_alive():
                return False
            assert time.monotonic() < deadline, "nothing was saved"
            time.sleep(0.001)
        time.sleep(moment)
        return True
    finally:
        assert process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _moments(folder: Path) -> dict[Path, int]:
    found = {}
    for path in folder.glob("*.ckpt"):
        with suppress(FileNotFoundError):  # the run goes on meanwhile
            found[path] = path.stat().st_mtime_ns
    return found


def _check(folder: Path) -> int:
    """Return the step of the newest whole checkpoint; the last one, from which a run goes on, is whole, too."""
    newest = newest_whole_checkpoint(folder)
    assert newest is not None
    last = folder / "last.ckpt"
    assert not last.exists() or is_whole(str(last)), list(folder.rglob("*"))
    return int(torch.load(newest, weights_only=True)["global_step"])


@pytest.mark.timeout(170)
@pytest.mark.filterwarnings("ignore")
@rows_and(normal=("compressed_ddp",), rows=(*REPLICAS, *PIPELINES))
def test_whenever_it_is_killed_a_whole_checkpoint_is_there(tmp_path: Path, row: str) -> None:
    chance, steps = random.Random(row), [0]
    for _ in range(10):
        _killed_while_saving(row, tmp_path, chance.uniform(0.0, 0.1))
        steps.append(_check(tmp_path))
    assert steps == sorted(steps), "every run went on from the one before"
    assert steps[-1] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ["compressed_ddp", "compressed_ddp_topk", "diloco", "dsp"])
def test_a_hundred_times_over(tmp_path: Path, row: str) -> None:
    chance = random.Random(row)
    for _ in range(100):
        _killed_while_saving(row, tmp_path, chance.uniform(0.0, 0.15))
        _check(tmp_path)


# --- a disk that fails ----------------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a file system needs root")
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def full(folder: Path) -> Iterator[str]:
    with mounted(folder, "size=64k"):
        with (folder / "filling").open("wb") as file:
            file.write(bytes(48 * 1024))
        yield "No space left on device"


@contextmanager
def read_only(folder: Path) -> Iterator[str]:
    with mounted(folder, "ro"):
        yield "Read-only file system"


@contextmanager
def a_file_in_the_way(folder: Path) -> Iterator[str]:
    folder.write_text("")
    yield "Not a directory|File exists"


@rows_and(normal=("compressed_ddp",), rows=("compressed_ddp", "diloco", *STAGED))
@pytest.mark.parametrize("obstacle", [full, read_only, a_file_in_the_way], ids=lambda o: o.__name__)
def test_the_error_names_the_path_on_all_ranks_and_training_goes_on(tmp_path: Path, row: str, obstacle: Any) -> None:
    path = tmp_path / "disk" / "model.ckpt"

    def save_elsewhere(trainer: Trainer, module: Net) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(tmp_path / "elsewhere.ckpt")

    def save(trainer: Trainer, module: Net) -> None:
        if trainer.global_step == 2:
            with pytest.raises(CheckpointError, match=f"(?s)`{path}.*({reason})") as caught:
                trainer.save_checkpoint(path)
            assert caught.value.path.startswith(str(path))
            (tmp_path / f"raised {trainer.global_rank}").touch()

    whole = fit(
        net(row), build(row), 5, callbacks=[At(train_batch_end=save_elsewhere)]
    )  # a stale pipeline is drained there
    with obstacle(tmp_path / "disk") as reason:
        assert distance(fit(net(row), build(row), 5, callbacks=[At(train_batch_end=save)]), whole) == 0
        left = [] if obstacle is a_file_in_the_way else [file.name for file in (tmp_path / "disk").rglob("*.p*t*")]
        assert left == [], "of the attempt"
    assert {file.name for file in tmp_path.glob("raised *")} == {"raised 0", "raised 1"}


def test_one_rank_that_cannot_write_stops_the_save_of_all(tmp_path: Path) -> None:
    """Rank 1's disk is another one; the checkpoint of before stays as it was."""
    path = tmp_path / "model.ckpt"

    def save(trainer: Trainer, module: Net) -> None:
        if trainer.global_step == 1:
            trainer.save_checkpoint(path)
        if trainer.global_step == 2:
            trainer.strategy.barrier()
            if trainer.global_rank == 1:
                from lightning_distopt.strategies import rank_state

                def broken(path: str, save_id: str, rank: int, content: Any) -> None:
                    raise CheckpointError(f"`{path}` could not be written: Input/output error.", path)

                rank_state.write_sidecar = broken
            with pytest.raises(CheckpointError, match="Input/output error"):
                trainer.save_checkpoint(path)
            trainer.strategy.barrier()

    fit(Net(), build("compressed_ddp"), 3, callbacks=[At(train_batch_end=save)])
    assert is_whole(str(path))
    assert torch.load(path, weights_only=True)["global_step"] == 1
    assert len(saves_of(str(path))) == 1


# --- saving when an exception ends the fit --------------------------------------------------------------------------


class Failing(Net):
    """Fails in step 3, on all ranks or on one.

    Args:
        where: "all" or "one".
    """

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 3 and (self.where == "all" or self.global_rank == 1):
            raise ValueError("a bug")
        return super().training_step(batch, batch_idx)


class Saving(OnExceptionCheckpoint):
    """As a process that ends leaves it: Lightning deletes the file again where the process goes on."""

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        pass


def _fail(rank: int, world: int, folder: Path, where: str) -> tuple[str, str]:
    os.environ["LOCAL_RANK"] = str(rank)  # this process is one that a launcher has started
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_timeout(timedelta(seconds=3))
    said: list[str] = []
    error: BaseException = Exception("no error")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *args: said.append(str(message))
        try:
            settings = {"enable_checkpointing": True, "callbacks": [Saving(folder)]}
            fit(Failing(where), CompressedDDPStrategy(timeout=timedelta(seconds=3)), 10, **settings)
        except Exception as caught:
            error = caught
    dist.destroy_process_group()  # the test's own last barrier needs one that works
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=20))
    return f"{type(error).__name__}: {error}", "\n".join(said)


def test_a_checkpoint_saved_on_an_exception_of_all_ranks_is_whole(tmp_path: Path) -> None:
    assert [error for error, _ in run_ranks(2, _fail, tmp_path, "all")] == ["ValueError: a bug"] * 2
    path = tmp_path / "on_exception.ckpt"
    assert is_whole(str(path))
    assert torch.load(path, weights_only=True)["global_step"] == 3
    assert sidecar(path, 1).exists()


def test_where_one_rank_alone_fails_nothing_is_written(tmp_path: Path) -> None:
    """The others are in the middle of a step, and take no part; what they hold then is saved by nobody."""
    (zero, said), (one, _) = run_ranks(2, _fail, tmp_path, "one")
    assert one == "ValueError: a bug"
    assert zero.startswith("ExchangeError: In step 3 rank 0 could not")
    assert zero.endswith("Rank 1 ended with ValueError: a bug.")
    assert "No checkpoint was written to" in said
    assert "an exchange failed in the middle of a step" in said
    assert [file.name for file in tmp_path.rglob("*.pt")] == []
    assert not (tmp_path / "on_exception.ckpt").exists()
