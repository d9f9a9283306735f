"""The configurations of local updates parse, and the study stops, goes on and says what it has found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.results_file import ResultsFile
from lightning_distopt.cli import main
from recipes.text import study_diloco

TEXT = Path(__file__).parents[3] / "recipes" / "text"


def printed(capsys: pytest.CaptureFixture[str], *names: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *(f"--config={TEXT / name}" for name in names), "--print_config"])
    assert exit_.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_configurations_parse_one_on_top_of_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, "char_model.yaml", "diloco.yaml", "streaming_diloco.yaml")
    strategy = config["trainer"]["strategy"]["init_args"]
    assert (strategy["sync_every"], strategy["fragments"], strategy["delay"]) == (100, 4, 1)
    assert strategy["outer_optimizer"]["init_args"] == {"lr": 0.7, "momentum": 0.9}
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.AdamW"


def test_the_study_is_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, float, int]] = []

    def train(method: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
        ran.append((method, lr, seed))
        sent = 1000 if method == "ddp" else 100
        curve = f"3:{sent // 2}:2.5 6:{sent}:{lr}"
        row = dict.fromkeys(study_diloco.COLUMNS, "")
        run = {"method": method, "lr": lr, "seed": seed, "loss": lr, "curve": curve}
        return {**row, **run, "bytes": sent, "peak_bytes": 7}

    monkeypatch.setattr(study_diloco, "train", train)
    results = ResultsFile(tmp_path / "study.csv", study_diloco.COLUMNS, ("method", "lr", "seed"))
    methods, rates = len(study_diloco.METHODS), len(study_diloco.RATES)
    assert study_diloco.measure(results, runs=methods) == methods
    assert study_diloco.table(results).count("\n") == 1  # no best rate yet
    assert study_diloco.measure(results) == methods * (rates + 1) - methods
    assert study_diloco.measure(results) == 0
    assert len(ran) == len(set(ran))
    assert {lr for _, lr, seed in ran if seed == 1} == {min(study_diloco.RATES)}
    shown = study_diloco.table(results)
    assert "| DiLoCo, H = 20 | 0.003 | 0.003 (0.003 to 0.003, 2 seeds) | 10.0 | 7 | above 2.5" in shown


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ddp", "Streaming DiLoCo, H = 20, 4 fragments, delay 1, mix 0.5"])
def test_a_run_of_the_study(method: str) -> None:
    row = study_diloco.train(method, 0.01, 0, steps=12)
    assert row["steps"] == 12
    assert float(row["loss"]) < 5
    assert int(row["peak_bytes"]) <= int(row["bytes"])
