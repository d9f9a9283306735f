"""Whatever happens to one rank, every other one ends in time with one typed error that names it, and no process is left."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from benchmarks import hosts
from lightning_distopt.strategies import launchers
from tests.strategies import restarting
from tests.strategies.faulty import CULPRIT, STEP, patience, run
from tests.strategies.fits import distance
from tests.strategies.rows import ENGINES, PIPELINES, ROWS, STAGED, kind

PROJECT = Path(__file__).parents[2]
WORLD = 3
SAID = {
    "kill": "found rank 1 silent: killed, stopped, or cut off",
    "stop": "found rank 1 silent: killed, stopped, or cut off",
    "exception": "Rank 1 ended with ValueError: a bug of the user's.",
    "memory": "Rank 1 ended with RuntimeError",
    "link": "found rank 1 silent: killed, stopped, or cut off",
    "slow": "rank 1 late, it is in",
}
LATE = 1.0  # seconds that a busy machine may add to the time-out and the roll-call


def ends(folder: Path) -> dict[int, dict[str, Any]]:
    return {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.end")}


def left_over(folder: Path, patience: float) -> list[int]:
    """Return the processes of a fit that still run after the patience."""
    pids = [int(path.stem) for path in folder.glob("*.pid")]
    deadline = time.monotonic() + patience
    while True:
        alive = [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in _state(pid)]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.05)


def _state(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return "Z"


def check(folder: Path, row: str, fault: str, world: int = WORLD) -> None:
    found, began = ends(folder), float((folder / "fault").read_text())
    survivors = sorted(set(range(world)) - {CULPRIT})
    assert sorted(found.keys() - {CULPRIT}) == survivors, found
    for rank in survivors:
        end = found[rank]
        assert end["time"] - began < patience(row) + 2.0 + LATE, end
        if kind(row) == "queries" and fault in (
            "nan",
            "exception",
            "memory",
        ):  # a query that fails ends the step of all
            assert end["type"] == "QueryError", end
            assert "ranks [1] failed" in end["text"]
            continue
        if fault == "nan" and (kind(row) != "stale" or end["type"] == "NonFiniteError"):
            assert end["type"] == "NonFiniteError", end
            # Stages before get what that one sends, and see it for themselves.
            assert f"on rank {rank if kind(row) == 'stale' else CULPRIT}" in end["text"]
            assert kind(row) == "stale" or f"step {STEP}" in end["text"]
            continue
        assert end["type"] in ("ExchangeError", *(["PipelineError"] if row in PIPELINES else [])), end
        assert end["rank"] == rank
        if fault == "nan":
            assert end["culprits"] in ([CULPRIT], [0], [0, CULPRIT]), end
            continue
        assert end["culprits"] == [CULPRIT], end
        assert SAID[fault] in end["text"], end
        if kind(row) == "stale":  # some batches old
            assert 0 <= end["step"] <= STEP, end
        elif kind(row) != "queries":  # whose optimizer counts evaluations, too
            assert end["step"] == STEP, end
    if fault in ("kill", "stop"):
        assert CULPRIT not in found
    if fault == "nan" and kind(row) != "queries":
        assert found[CULPRIT]["type"] == "NonFiniteError"


def clean_up(folder: Path) -> None:
    for path in folder.glob("*.pid"):
        with suppress(ProcessLookupError):
            os.kill(int(path.stem), signal.SIGKILL)


NORMAL = [*((row, fault) for row in ENGINES for fault in ("kill", "stop")), ("compressed_ddp", "exception")]
NORMAL += [(row, "kill") for row in STAGED]
TABLE = [
    pytest.param(row, fault, marks=() if (row, fault) in NORMAL else pytest.mark.slow)
    for row in ROWS
    for fault in ("kill", "stop", "exception", "memory", "slow", "nan")
]


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("row", "fault"), TABLE)
def test_under_our_launcher_of_forks(tmp_path: Path, row: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "GRACE", 3.0)
    start = time.monotonic()
    try:
        with pytest.raises((ProcessRaisedException, ProcessExitedException)) as caught:
            run(row, fault, tmp_path, "fork")
        assert "SIGABRT" not in str(caught.value), "an uncaught C++ exception"
        check(tmp_path, row, fault)
        assert left_over(tmp_path, 1.0) == []
        assert time.monotonic() - start < 30
    finally:
        clean_up(tmp_path)


def script(words: list[str], folder: Path, patience: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK"):
        environment.pop(name, None)
    output = folder / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=file, stderr=file, env=environment, cwd=PROJECT, start_new_session=True
        )
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"still ran after {patience} s: {output.read_text()[-4000:]}") from None
        finally:
            process.wait()
    return subprocess.CompletedProcess(words, code, output.read_text())


FEW = [pytest.param("compressed_ddp", fault, marks=pytest.mark.slow) for fault in ("kill", "stop", "exception", "slow")]
FEW += [pytest.param("compressed_ddp_powersgd", fault, marks=pytest.mark.slow) for fault in ("kill", "stop")]
FEW += [pytest.param(row, "kill", marks=pytest.mark.slow) for row in ("local_sgd", *STAGED)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("row", "fault"), FEW)
@pytest.mark.parametrize("launcher", ["scripts", "torchrun"])
def test_under_launchers_of_scripts(tmp_path: Path, launcher: str, row: str, fault: str) -> None:
    words = ["-m", "tests.strategies.faulty", row, fault, str(tmp_path)]
    if launcher == "torchrun":
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD), *words]
    try:
        done = script(words, tmp_path, 150)
        assert done.returncode != 0
        check(tmp_path, row, fault)
        assert left_over(tmp_path, 1.0) == [], done.stdout
        for rank in set(range(WORLD)) - {CULPRIT}:
            assert re.search(f"(In step {STEP}|Stage .) (on )?rank {rank} could not", done.stdout), (
                "each survivor speaks"
            )
        assert "terminate called" not in done.stdout
    finally:
        clean_up(tmp_path)


# --- a link that is cut ---------------------------------------------------------------------------------------------


def _on_a_host(rank: int, names: list[str], row: str, folder: Path) -> None:
    hosts.enter(names, rank)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)  # rank 0 reaches its own store by its own address
    os.environ |= {"MASTER_ADDR": "10.99.0.1", "MASTER_PORT": "29400", "LOCAL_RANK": str(rank)}
    warnings.simplefilter("ignore")
    run(row, "link", folder, "popen")


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", [*ENGINES, "local_sgd", *STAGED])
def test_a_link_that_is_cut(tmp_path: Path, row: str) -> None:
    reason = hosts.why_not()
    if reason is not None:
        pytest.skip(reason)
    context = multiprocessing.get_context("fork")
    with hosts.network(WORLD) as names:
        ranks = [context.Process(target=_on_a_host, args=(rank, names, row, tmp_path)) for rank in range(WORLD)]
        try:
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(60)
            assert [process.exitcode for process in ranks] == [1] * WORLD
        finally:
            for process in ranks:
                process.kill()
    check(tmp_path, row, "link")
    cut_off = ends(tmp_path)[CULPRIT]
    assert cut_off["type"] == ("PipelineError" if kind(row) == "stale" else "ExchangeError")
    assert "cannot reach the store of the process group: its own link, or rank 0" in cut_off["text"]


# --- started again --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ["compressed_ddp", "diloco", *STAGED])
def test_torchrun_starts_it_again_and_it_ends_as_if_nothing_had_been(tmp_path: Path, row: str) -> None:
    """The command of ``docs/reliability.md``; rank 1 is killed in the first attempt."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    done = script([*words, "-m", "tests.strategies.restarting", row, str(tmp_path / "a"), "4"], tmp_path, 180)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "Restored all states from the checkpoint at" in done.stdout
    whole = restarting.run(row, tmp_path / "b", [])
    assert distance(torch.load(tmp_path / "a" / "weights.pt"), whole) == 0
