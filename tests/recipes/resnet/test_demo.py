"""The demonstration reads what the runs logged, and shows it."""

from pathlib import Path

import pytest

from recipes.resnet import demo

METRICS = """\
comm/bytes_sent,comm/compression_ratio,epoch,step,train/loss,val/accuracy,val/loss
,,0,0,2.5,,
100,8.0,0,1,2.0,,
,,0,1,,0.5,1.5
50,9.0,1,2,1.0,,
,,1,2,,0.75,0.5
"""


def _run(strategy: str, bytes_per_step: float) -> demo.Run:
    sent = [bytes_per_step * 10 * epoch for epoch in (1, 2, 3)]
    return demo.Run(strategy, 12.3, bytes_per_step, 32_000 / bytes_per_step, [1.0, 0.1, 0.01], [0.5, 0.9, 0.987], sent)


def test_epochs_are_matched_with_the_bytes_sent_until_then(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(METRICS)

    run = demo.read_run(tmp_path / "metrics.csv", "ddp", seconds=1.0)

    assert run.losses == [1.5, 0.5]
    assert run.accuracies == [0.5, 0.75]
    assert run.bytes_sent == [200, 250]
    assert run.bytes_per_step == pytest.approx(250 / 3)  # 100 is the mean of two steps
    assert run.compression_ratio == 9


def test_a_run_without_results_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n0,0,1.0\n")
    with pytest.raises(ValueError, match="0 validation results and 0 counted steps"):
        demo.read_run(tmp_path / "metrics.csv", "ddp", seconds=1.0)


def test_table_shows_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    demo.print_table([_run("ddp", 32_000), _run("compressed_ddp", 1_000)])
    shown = capsys.readouterr().out
    for word in ("ddp", "compressed_ddp", "98.7%", "0.0100", "32,000", "1,000", "32.0", "12"):
        assert word in shown


def test_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    demo.draw([_run("ddp", 32_000), _run("compressed_ddp", 1_000)], tmp_path / "new" / "demo.png")
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_epochs_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        demo.main(["--epochs", "0"])
    assert exit_.value.code == 2
    assert "at least 1: got 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_demo_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert demo.main(["--epochs", "2", "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*/demo.png"))) == 1
    assert "compression" in capfd.readouterr().out
