"""Twenty minutes of faults: the run ends with the weights of an undisturbed one, and nothing grows.

``DISTOPT_SOAK_SECONDS`` says about how long the disturbed run is to take, ``DISTOPT_SOAK_PERIOD`` the seconds between
faults, ``DISTOPT_SOAK_STRATEGY`` which strategy.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_distopt.strategies import launchers
from tests.strategies.faulty import strategy
from tests.strategies.fits import distance, fit
from tests.strategies.restarting import resuming

SECONDS = float(os.environ.get("DISTOPT_SOAK_SECONDS", "1200"))
PERIOD = float(os.environ.get("DISTOPT_SOAK_PERIOD", "30"))
ROW = os.environ.get("DISTOPT_SOAK_STRATEGY", "compressed_ddp")
WORLD, PACE, BATCHES = 4, 0.05, 100
EPOCHS = max(1, int(SECONDS * 0.6 / PACE / BATCHES))  # restarts take the rest, and a busy machine more than the pace
STANDSTILL = (
    300.0  # seconds without a step after which a run counts as lost; whoever shares the machine may stop it a while
)
FAULTS = ("kill", "stop", "exception", "kill all")


class Paced(Callback):
    """Takes its time, writes down what the process uses, and fails where it is told to."""

    def __init__(self, folder: Path, pace: float) -> None:
        self.folder, self.pace = folder, pace

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        (self.folder / f"{trainer.global_rank}.pid").write_text(str(os.getpid()))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        time.sleep(self.pace)
        order = self.folder / f"{trainer.global_rank}.fail"
        if order.exists():
            order.unlink()
            raise ValueError("on order")
        if trainer.global_step % 50 == 0:
            with (self.folder / f"{trainer.global_rank}.use").open("a") as file:
                file.write(json.dumps([os.getpid(), trainer.global_step, time.time(), *used()]) + "\n")


def used() -> tuple[float, int, int]:
    """Return megabytes, open files and threads of this process."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")), threading.active_count()


def attempt(folder: Path, pace: float) -> None:
    launchers.GRACE = 3.0
    sink = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    logging.disable()
    warnings.simplefilter("ignore")
    torch.manual_seed(5)
    module = resuming(ROW, BATCHES)
    saving = ModelCheckpoint(folder / "saved", save_last=True, every_n_train_steps=25)
    settings = {"devices": WORLD, "max_epochs": EPOCHS, "enable_checkpointing": True}
    fit(module, strategy(ROW, "fork", 5.0), -1, "last", callbacks=[saving, Paced(folder, pace)], **settings)
    torch.save(module.state_dict(), folder / "weights.pt")


def pids(folder: Path) -> dict[int, int]:
    found = {}
    for path in folder.glob("*.pid"):
        with suppress(ValueError):
            found[int(path.stem)] = int(path.read_text())
    return {rank: pid for rank, pid in found.items() if Path(f"/proc/{pid}").exists()}


def strike(folder: Path, chance: random.Random) -> str:
    """Let something happen to a rank; return what."""
    running = pids(folder)
    if len(running) < WORLD:
        return ""
    what, rank = chance.choice(FAULTS), chance.randrange(WORLD)
    with suppress(ProcessLookupError):
        if what == "exception":
            (folder / f"{rank}.fail").touch()
        elif what == "kill all":
            for pid in running.values():
                os.kill(pid, signal.SIGKILL)
        else:
            os.kill(running[rank], signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    return what


def run(folder: Path, pace: float, faults: bool) -> tuple[float, list[str], set[int]]:
    """Train to the end, with faults and restarts or without; return seconds, what happened, and all processes."""
    folder.mkdir()
    chance, context = random.Random(0), multiprocessing.get_context("fork")
    happened: list[str] = []
    seen: set[int] = set()
    start, began = time.monotonic(), time.time()
    due = start + PERIOD
    while not (folder / "weights.pt").exists():
        process = context.Process(target=attempt, args=(folder, pace))
        process.start()
        while process.is_alive():
            seen |= set(pids(folder).values())
            if faults and time.monotonic() > due and (what := strike(folder, chance)):
                happened.append(what)
                due = time.monotonic() + PERIOD
            since = time.time() - max((path.stat().st_mtime for path in folder.glob("*.use")), default=began)
            assert since < STANDSTILL, f"no step for {since:.0f} s after {happened}"
            time.sleep(0.05)
        process.join()
        assert faults or process.exitcode == 0, (folder / "output").read_text()[-3000:]
    return time.monotonic() - start, happened, seen


@pytest.mark.slow
@pytest.mark.timeout(20 * SECONDS + 600)
@pytest.mark.filterwarnings("ignore")
def test_faults_for_twenty_minutes_change_nothing(tmp_path: Path) -> None:
    before = used()
    whole_seconds, _, _ = run(tmp_path / "whole", PACE, faults=False)
    seconds, happened, seen = run(tmp_path / "disturbed", PACE, faults=True)
    whole, disturbed = (torch.load(tmp_path / name / "weights.pt") for name in ("whole", "disturbed"))
    report = (
        f"{ROW}: {EPOCHS * BATCHES} steps, {len(happened)} faults {sorted(happened)}: {whole_seconds:.0f} s undisturbed, "
        f"{seconds:.0f} s disturbed, throughput kept {whole_seconds / seconds:.0%}"
    )
    print(report)
    Path(os.environ.get("DISTOPT_SOAK_REPORT", tmp_path / "report")).write_text(report + "\n")
    assert happened, "no fault fell into the run: make it longer"
    assert distance(whole, disturbed) == 0, "not only within noise"
    # processes
    assert [pid for pid in seen if Path(f"/proc/{pid}").exists()] == []
    # files: one checkpoint and its sidecars of one save
    left = sorted(path.name for path in (tmp_path / "disturbed" / "saved").iterdir())
    assert len([name for name in left if name.endswith(".ckpt")]) <= 3, left
    assert all(len(list(path.iterdir())) == 1 for path in (tmp_path / "disturbed" / "saved").glob("last*.ranks")), left
    # memory, open files and threads of a rank: from the first third of the undisturbed run to its end
    for rank in range(WORLD):
        lines = [json.loads(line) for line in (tmp_path / "whole" / f"{rank}.use").read_text().splitlines()]
        early, late = lines[len(lines) // 3], lines[-1]
        assert late[3] - early[3] < 16, "megabytes"
        assert late[4] <= early[4] + 1, "open files"
        assert late[5] <= early[5], "threads"
    # and of this process, which started and ended them all
    after = used()
    assert after[0] - before[0] < 64
    assert after[1] <= before[1] + 2
    assert after[2] <= before[2]
