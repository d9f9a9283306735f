"""The network benchmark: resumable, readable, and one small run from end to end."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import network, network_report, time_to_accuracy
from benchmarks.hosts import why_not
from benchmarks.results_file import wait_for_quiet
from benchmarks.step_time import Job, Sample, reason

needs_hosts = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def _row(method: str, bandwidth: str, repeat: int = 0, **other: Any) -> dict[str, Any]:
    steps = "100.0 110.0 130.0" if method == "none" else "200.0 200.0 220.0 300.0 300.0"
    return {
        "bandwidth": bandwidth, "hosts": 2, "method": method, "repeat": repeat, "batch": 8, "seed": 0, "width": 4,
        "failure": "", "step_ms": steps, "sent_bytes": 1000, "codec_ms": "2.0", "exposed_ms": "3.0", "cpu_ms": "90.0",
        "delayed_ms": "5.0", "resent": 0, "load": "0.5", "parameters": 1000, "versions": "torch 0", "machine": "2 cores",
        **other,
    }  # fmt: skip


def _failed(method: str, bandwidth: str) -> dict[str, Any]:
    return _row(method, bandwidth) | dict.fromkeys(("step_ms", "sent_bytes", "codec_ms", "exposed_ms"), "") | {
        "failure": "ranks [0, 1] of 2 still ran after 90.0 s"
    }  # fmt: skip


def _accuracy(method: str, lr: str, bandwidth: str, curve: str) -> dict[str, Any]:
    return {
        "data": "digits", "bandwidth": bandwidth, "method": method, "lr": lr, "seed": 0, "epochs": 3, "width": 4, "failure": "",
        "accuracy": curve.rpartition(":")[2], "curve": curve, "load": "0.5", "versions": "torch 0", "machine": "2 cores",
    }  # fmt: skip


def test_the_report_renders_from_a_file(tmp_path: Path) -> None:
    file = network.results(tmp_path / "network.csv")
    for bandwidth in ("100mbit", "unshaped"):
        for repeat in range(2):
            for method in ("none", "ddp", "bf16", "sign", "updates:topk:0.5"):
                file.append(_row(method, bandwidth, repeat))
        file.append(_failed("topk:0.01", bandwidth))
    curves = time_to_accuracy.results(tmp_path / "time_to_accuracy.csv")
    curves.append(_accuracy("ddp", "0.1", "1gbit", "1.0:0.3 2.0:0.5 3.0:0.6"))
    curves.append(_accuracy("ddp", "0.2", "1gbit", "1.0:0.3 2.0:0.4 3.0:0.4"))
    curves.append(_accuracy("sign", "0.1", "1gbit", "0.5:0.3 1.0:0.5 1.5:0.6"))
    (tmp_path / "performance.md").write_text(
        f"# Performance\n\nBefore.\n\n{network_report.BEGIN}\nold\n{network_report.END}\n\nAfter.\n"
    )

    assert network.main(["--report", "--results", str(tmp_path), "--docs", str(tmp_path)]) == 0

    page = (tmp_path / "performance.md").read_text()
    assert page.startswith("# Performance\n\nBefore.\n")
    assert page.endswith("\n\nAfter.\n")
    assert "old" not in page
    assert "| `sign` | 220 (200 to 300) | 220 (200 to 300) |" in page
    assert "| `topk:0.01` | failed | failed |" in page
    assert "still ran after 90.0 s" in page
    assert "| `ddp` | 0.1 | 60.0% to 60.0% | 3 s |" in page
    assert (tmp_path / "network.png").stat().st_size > 10_000


def test_a_finished_run_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Job] = []

    def measure(names: list[str], job: Job, timeout: float) -> Sample:
        made.append(job)
        if job.method == "ddp":
            raise AssertionError("rank 0 of 2 failed:\nTraceback\n  line\nRuntimeError: no\n")
        return Sample([0.1, 0.2], 10.0, 0.0, 0.0, 0.1, 0.0, 0)

    class Network:
        def __init__(self, *arguments: object) -> None: ...
        def __enter__(self) -> list[str]:
            return ["a", "b"]

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(network, "measure", measure)
    monkeypatch.setattr(network, "network", Network)
    plan = network.Plan(("1gbit",), (2,), ("none", "ddp"), 2, 5, 1.0, 9.0, 8, 0, 4)
    file = network.results(tmp_path / "network.csv")
    file.append(_row("none", "1gbit"))

    network.run(plan, file, Console(quiet=True))
    assert [job.method for job in made] == ["ddp", "none", "ddp"]  # they take turns
    assert [row["failure"] for row in file.rows()] == ["", "RuntimeError: no", "", "RuntimeError: no"]
    network.run(plan, file, Console(quiet=True))
    assert len(made) == 3
    network.run(replace(plan, retry=True), file, Console(quiet=True))
    assert [job.method for job in made[3:]] == ["ddp", "ddp"]


def test_repeats_that_were_disturbed_are_left_out() -> None:
    rows = [{"delayed_ms": text} for text in ("3.0", "14.0", "12.9")]
    assert network_report.calm(rows) == [rows[0], rows[2]]
    assert network_report.calm([]) == []


def test_what_was_disturbed_in_every_repeat_is_marked_and_not_judged(tmp_path: Path) -> None:
    file = network.results(tmp_path / "network.csv")
    for method, delayed in {"none": "1.0", "bf16": "9.0", "sign": "4.0", "topk:0.01": "80.0"}.items():
        file.append(_row(method, "1gbit", delayed_ms=delayed))
    network_report.write(file.rows(), [], tmp_path, Console(quiet=True))
    page = (tmp_path / "performance.md").read_text()
    assert "| `sign` | 220 (200 to 300) |" in page
    assert "| `topk:0.01` | ~220 (200 to 300) |" in page
    assert "fastest of ours `sign`" in page
    assert page.count("topk") == 2  # in the two tables


def test_waiting_for_quiet_ends() -> None:
    start = time.monotonic()
    wait_for_quiet(0.6)
    assert time.monotonic() - start < 10.0


def test_the_reason_of_a_failure_is_one_line() -> None:
    assert reason("ranks [1] of 2 still ran after 9 s\nrank 1:\n  File") == "ranks [1] of 2 still ran after 9 s"
    assert reason("rank 0 of 2 failed:\nTraceback\nValueError: it was so\n") == "ValueError: it was so"


@pytest.mark.parametrize(
    "wrong", [["--bandwidths", "fast"], ["--methods", "sgn"], ["--hosts", "1"], ["--hosts", "two"]]
)
def test_bad_options_are_refused_before_anything_runs(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        network.main(wrong)
    assert wrong[1] in capsys.readouterr().err


def _run(words: str, folder: Path) -> int:
    return network.main([*words.split(), "--results", str(folder), "--docs", str(folder)])


@needs_hosts
def test_two_hosts_train_and_the_page_is_written(tmp_path: Path) -> None:
    words = "--bandwidths 1gbit --hosts 2 --methods none,sign --repeats 1 --steps 3 --batch 2 --width 4"
    assert _run(words, tmp_path) == 0
    rows = {row["method"]: row for row in network.results(tmp_path / "network.csv").rows()}
    assert [row["failure"] for row in rows.values()] == ["", ""]
    assert len(rows["sign"]["step_ms"].split()) == 3
    assert int(rows["none"]["sent_bytes"]) < 1_000 < int(rows["sign"]["sent_bytes"])
    assert float(rows["sign"]["codec_ms"]) > 0
    assert "`sign`" in (tmp_path / "performance.md").read_text()


@needs_hosts
def test_time_to_accuracy_on_digits(tmp_path: Path) -> None:
    words = "--methods bf16 --epochs 1 --rates 0.1 --accuracy-bandwidths 1gbit,unshaped --accuracy-width 2"
    assert _run(f"--accuracy {words}", tmp_path) == 0
    rows = time_to_accuracy.results(tmp_path / "time_to_accuracy.csv").rows()
    assert [(row["bandwidth"], row["failure"]) for row in rows] == [("1gbit", ""), ("unshaped", "")]
    assert "Time to accuracy" in (tmp_path / "performance.md").read_text()
