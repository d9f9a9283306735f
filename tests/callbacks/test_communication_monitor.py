"""The monitor logs every figure that its docstring promises, with the values that the formulas give."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_distopt import StalePipelineStrategy
from lightning_distopt.callbacks import CommunicationMonitor
from lightning_distopt.callbacks.communication_monitor import _si
from lightning_distopt.compressors import parse
from lightning_distopt.exchange.meter import ring_all_reduce_bytes
from tests.strategies.fits import At, compressed, fit, messages_to
from tests.strategies.models import Net
from tests.strategies.pipelines import Chain
from tests.strategies.test_manual_optimization import Gan

FIGURES = set(re.findall(r"^ *``(\w+/\w+)``", CommunicationMonitor.__doc__, re.MULTILINE))
SECONDS = {"comm/exchange_seconds", "comm/encode_seconds"}
FEEDBACK = {"feedback/residual_norm", "feedback/sidecars_lost"}

GRADIENTS = sum(p.nbytes for p in Net().parameters())
BUFFERS = sum(b.nbytes for b in Net().buffers())


def logged(
    folder: Path, strategy: Any, monitor: CommunicationMonitor | None = None, **arguments: Any
) -> list[dict[str, float]]:
    """Fit and return the rows that the monitor logged."""
    module = arguments.pop("module", None) or Net()
    arguments = {"steps": 6, "log_every_n_steps": 2, **arguments}
    callbacks = [monitor or CommunicationMonitor(table=False), *arguments.pop("callbacks", [])]
    fit(module, strategy, logger=CSVLogger(folder, "", ""), callbacks=callbacks, **arguments)
    with (folder / "metrics.csv").open() as file:
        rows = [
            {name: float(value) for name, value in row.items() if value and "/" in name} for row in csv.DictReader(file)
        ]
    return [row for row in rows if row]


# --- figures --------------------------------------------------------------------------------------------------------


def test_every_documented_figure_is_logged_with_error_feedback(tmp_path: Path) -> None:
    monitor = CommunicationMonitor(mismatch_every=1, table=False)
    rows = logged(tmp_path, compressed(), monitor)
    assert len(FIGURES) == 9
    assert len(rows) == 3
    for row in rows:
        assert row.keys() == FIGURES
        assert all(math.isfinite(value) for value in row.values())


def test_every_figure_but_those_of_residuals_is_logged_without_error_feedback(tmp_path: Path) -> None:
    rows = logged(tmp_path, compressed(error_feedback="none"))
    assert [row.keys() for row in rows] == [FIGURES - FEEDBACK - {"feedback/mismatch"}] * 3


def test_the_bytes_of_ddp_are_computed_and_its_seconds_left_out(tmp_path: Path) -> None:
    rows = logged(tmp_path, "ddp_fork", devices=3)
    sent = ring_all_reduce_bytes(GRADIENTS, 3) + 2 * BUFFERS  # rank 0 has two children
    for number, row in enumerate(rows, 1):
        assert row.keys() == FIGURES - FEEDBACK - SECONDS - {"feedback/mismatch"}
        assert row["comm/bytes_sent"] == sent
        assert row["comm/bytes_received"] == ring_all_reduce_bytes(GRADIENTS, 3)
        assert row["comm/bytes_sent_total"] == 2 * number * sent
        assert row["comm/compression_ratio"] == 1


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("error_feedback", ["step_ahead", "none"])
def test_the_bytes_of_an_exchange(tmp_path: Path, error_feedback: str, accumulate: int) -> None:
    sent: list[dict[str, int]] = []

    def check(trainer: Trainer, module: Net) -> None:
        meter = trainer.strategy.meter
        sent.append(
            {purpose: nbytes for purpose, nbytes in meter.sent.items() if purpose not in ("setup", "validation")}
        )
        if trainer.global_step == 6:
            payload = sum(parse("topk:0.1").nbytes(p.numel()) for p in module.parameters())
            assert sent[-1]["exchange"] == 6 * payload
            assert sent[-1]["buffers"] == 6 * BUFFERS * trainer.is_global_zero
            assert set(sent[-1]) <= {"exchange", "buffers", "flag"}
            assert meter.dense_bytes == 6 * (ring_all_reduce_bytes(GRADIENTS, 2) + BUFFERS * trainer.is_global_zero)
            assert meter.steps == 6

    strategy = compressed(compressor="topk:0.1", error_feedback=error_feedback, averaging_period=0)
    arguments = {"accumulate_grad_batches": accumulate, "callbacks": [At(train_batch_end=check)]}
    rows = logged(tmp_path, strategy, module=Net(batches=6), **arguments)
    payload = sum(parse("topk:0.1").nbytes(p.numel()) for p in Net().parameters())
    assert len(rows) == 3
    for row in rows:
        flags = row["comm/bytes_sent"] - payload - BUFFERS
        assert 0 <= flags <= 64
        assert row["comm/bytes_received"] == payload + flags
        ddp = ring_all_reduce_bytes(GRADIENTS, 2) + BUFFERS
        assert row["comm/compression_ratio"] == pytest.approx(ddp / row["comm/bytes_sent"], rel=1e-6)
    assert rows[-1]["comm/bytes_sent_total"] == 6 * rows[-1]["comm/bytes_sent"]


def test_averaging_counts(tmp_path: Path) -> None:
    strategy = compressed(compressor="topk:0.1", averaging_period=2)
    rows = logged(tmp_path, strategy)
    once = logged(tmp_path / "never", compressed(compressor="topk:0.1", averaging_period=0))
    for row, plain in zip(rows, once, strict=True):
        averaging = row["comm/bytes_sent"] - plain["comm/bytes_sent"]
        assert 0 <= averaging - ring_all_reduce_bytes(GRADIENTS, 2) / 2 <= 32  # and what the ranks agree on


def test_local_steps_divide_the_bytes(tmp_path: Path) -> None:
    each = logged(tmp_path / "each", compressed(), log_every_n_steps=6)
    third = logged(tmp_path / "third", compressed(sync_every=3), log_every_n_steps=6)
    assert third[0]["comm/bytes_sent"] == each[0]["comm/bytes_sent"] / 3
    assert third[0]["comm/compression_ratio"] == pytest.approx(3 * each[0]["comm/compression_ratio"], rel=0.2)


def test_each_step_of_several_optimizers_is_a_step(tmp_path: Path) -> None:
    rows = logged(tmp_path, compressed(compressor="fp32"), module=Gan(), steps=8, log_every_n_steps=1)
    module = Gan()
    judging, making = (sum(p.nbytes for p in player.parameters()) for player in (module.judge, module.net))
    sent = (3 * ring_all_reduce_bytes(judging, 2) + ring_all_reduce_bytes(making, 2)) / 4
    buffers = sum(b.nbytes for b in module.buffers()) / 4
    for row in rows:
        assert 0 <= row["comm/bytes_sent"] - sent - buffers <= 64


def test_the_figures_of_the_residuals_are_the_engines(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []

    def see(trainer: Trainer, module: Net) -> None:
        sync = trainer.strategy.update_sync
        seen.append((sync.residual_norm(), sync.mismatch()))

    def keep(trainer: Trainer, module: Net) -> None:
        if trainer.is_global_zero:
            (tmp_path / "seen").write_text(repr(seen))

    monitor = CommunicationMonitor(mismatch_every=4, table=False)
    hooks = [At(train_batch_end=see, train_end=keep)]
    rows = logged(tmp_path, compressed(), monitor, steps=8, callbacks=hooks)
    norms, mismatches = zip(*eval((tmp_path / "seen").read_text()), strict=True)
    assert [row["feedback/residual_norm"] for row in rows] == pytest.approx(norms[1::2], rel=1e-6)
    assert [row.get("feedback/mismatch") for row in rows] == [
        None,
        pytest.approx(mismatches[3], rel=1e-5),
        None,
        pytest.approx(mismatches[7], rel=1e-5),
    ]


@pytest.mark.parametrize("error_feedback", ["step_ahead", "none"])
def test_seconds_are_what_passed(tmp_path: Path, error_feedback: str) -> None:
    def check(trainer: Trainer, module: Net) -> None:
        (monitor,) = [callback for callback in trainer.callbacks if isinstance(callback, CommunicationMonitor)]
        seconds = monitor.summary["seconds"]
        assert 0 < monitor.summary["exchange_seconds"] < seconds
        assert 0 < monitor.summary["encode_seconds"] < seconds

    monitor = CommunicationMonitor(table=False)
    rows = logged(tmp_path, compressed(error_feedback=error_feedback), monitor, callbacks=[At(train_end=check)])
    assert all(row[name] > 0 for row in rows for name in SECONDS)


def test_every_rank_has_a_summary(tmp_path: Path) -> None:
    def check(trainer: Trainer, module: Net) -> None:
        (monitor,) = [callback for callback in trainer.callbacks if isinstance(callback, CommunicationMonitor)]
        summary, meter = monitor.summary, trainer.strategy.meter
        assert summary["steps"] == 5
        assert summary["bytes_sent"] == 5 * summary["bytes_sent_per_step"] == meter.step_bytes_sent > 0
        assert summary["bytes_received"] == meter.step_bytes_received > 0
        assert summary["compression_ratio"] == meter.compression_ratio > 1

    # the callback that checks comes after the monitor
    logged(tmp_path, compressed(), steps=5, callbacks=[At(train_end=check)])


# --- where it runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["auto", "compressed_ddp_fork"])
def test_one_device_sends_nothing(tmp_path: Path, strategy: str) -> None:
    rows = logged(tmp_path, strategy, devices=1)
    for row in rows:
        assert row["comm/bytes_sent"] == row["comm/bytes_received"] == 0
        assert "comm/compression_ratio" not in row  # nothing over nothing


def test_without_a_logger_the_table_remains(capfd: pytest.CaptureFixture[str]) -> None:
    fit(Net(), compressed(), callbacks=[CommunicationMonitor()])
    assert "Communication of rank 0" in capfd.readouterr().out


def test_the_table_is_printed_once_with_what_was_sent_for_what(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = {"limit_val_batches": 1, "callbacks": [CommunicationMonitor(mismatch_every=5)], "log_every_n_steps": 1}
    fit(Net(), compressed(compressor="topk:0.1", averaging_period=5), 10, **arguments)
    shown = capfd.readouterr().out
    assert shown.count("Communication of rank 0 (CompressedDDPStrategy, 10 steps)") == 1
    for purpose in ("exchange", "averaging", "buffers", "setup", "validation", "diagnostics", "all"):
        assert len(re.findall(rf"│ {purpose} +│", shown)) == 1, shown
    assert re.search(r"compression ratio against ddp: \d+\.\d", shown)
    assert re.search(r"encode \d+\.\d\d ms / step, waiting for the network \d+\.\d\d ms / step", shown)


def test_the_table_of_ddp_says_that_it_is_computed(capfd: pytest.CaptureFixture[str]) -> None:
    fit(Net(), "ddp_fork", callbacks=[CommunicationMonitor()])
    shown = capfd.readouterr().out
    assert shown.count("Communication of rank 0 (DDPStrategy, 10 steps)") == 1
    assert "computed from the parameters, not counted" in shown
    assert "ms / step" not in shown


def test_the_table_is_printed_on_request_only(capfd: pytest.CaptureFixture[str]) -> None:
    fit(Net(), compressed(), 2, callbacks=[CommunicationMonitor(table=False)])
    assert "Communication" not in capfd.readouterr().out


def test_a_strategy_that_it_does_not_know_is_said_so(tmp_path: Path) -> None:
    class Other:
        world_size = 2
        global_step = 0
        strategy = object()

    monitor = CommunicationMonitor()
    with messages_to(tmp_path / "said"):
        monitor.on_train_start(Other(), Net())
    assert "`CommunicationMonitor` does not know what `object` sends" in (tmp_path / "said").read_text()


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (0.5, TypeError)])
def test_a_wrong_period_is_refused(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"`mismatch_every` must be an integer >= 0: got {value}"):
        CommunicationMonitor(mismatch_every=value)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (12.4, "12 B"),
        (999.4, "999 B"),
        (999.6, "1 kB"),
        (1234567, "1.23 MB"),
        (5e9, "5 GB"),
        (7.2e13, "72 TB"),
    ],
)
def test_bytes_for_people(nbytes: float, text: str) -> None:
    assert _si(nbytes) == text


# --- pipelines ------------------------------------------------------------------------------------------------------


def test_a_stale_pipeline_counts_its_messages(tmp_path: Path) -> None:
    def check(trainer: Trainer, module: Any) -> None:
        sent = trainer.strategy.meter.sent
        assert monitor.summary["steps"] == 6
        assert monitor.summary["bytes_sent"] == sent["activations"] + sent["gradients"] > 0

    monitor = CommunicationMonitor(table=False)
    strategy = StalePipelineStrategy("dsp", start_method="fork", timeout=20, balance="layers")
    rows = logged(tmp_path, strategy, monitor, module=Chain(2, batches=6), callbacks=[At(train_end=check)])
    rows = [row for row in rows if "comm/bytes_sent" in row]
    assert len(rows) == 2  # no update by the first: the fill
    assert all(FIGURES - FEEDBACK - {"feedback/mismatch"} <= row.keys() for row in rows)
