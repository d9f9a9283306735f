"""A study runs what is missing, chooses by the grid, and goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_distopt.cli import main
from recipes import sweep

PROJECT = Path(__file__).parents[2]
STUDIES = sorted((PROJECT / "recipes" / "studies").glob("*_*.yaml"))
BASELINES = ("LAMB", "LAMB + warm-up", "Lookahead", "schedule-free SGD")  # of a library that is an extra


@pytest.fixture
def study(tmp_path: Path) -> sweep.Study:
    about = {
        "configs": [str(PROJECT / "recipes" / "text" / "char_model.yaml")],
        "rate_flag": "--model.init_args.optimizer.init_args.lr",
        "multipliers": [0.001, 1],
        "seeds": [0, 1],
        "settings": {
            "small": ["--data.init_args.characters=2000", "--trainer.max_epochs=1", "--model.init_args.width=8"]
        },
        "methods": {
            "SGD": {"rate": 2.0},
            "RSGD": {
                "rate": 2.0,
                "configs": [str(PROJECT / "recipes" / "resnet" / "configs" / "rsgd" / "rsgd.yaml")],
            },
        },
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(about, sort_keys=False))
    return sweep.read(path)


@pytest.mark.filterwarnings("ignore")
def test_a_study_is_stopped_and_resumed(study: sweep.Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(study.settings, "small", (*study.settings["small"], "--trainer.check_val_every_n_epoch=1"))
    assert [run[1:] for run in study.plan()] == [
        ("SGD", 0.001, 0),
        ("RSGD", 0.001, 0),
        ("SGD", 1.0, 0),
        ("RSGD", 1.0, 0),
    ]
    assert sweep.measure(study, None, runs=3, part=(0, 1)) == 3
    assert sweep.measure(study, None, runs=None, part=(0, 1)) == 3  # the fourth, and a second seed each
    assert sweep.measure(study, None, runs=None, part=(0, 1)) == 0
    rows = study.results.rows()
    assert len(rows) == 6
    assert study.best("small", "SGD") == 1.0  # a rate of 0.002 learns nothing
    assert {row["seed"] for row in study.finals("small", "RSGD")} == {"0", "1"}
    assert all(len(row["train_losses"].split()) == 1 and int(row["steps"]) > 0 for row in rows)
    assert "| RSGD | " in sweep.table(study)
    assert "(2 seeds)" in sweep.early(study)
    sweep.figure(study, str(tmp_path / "study.png"))
    assert (tmp_path / "study.png").stat().st_size > 5000


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_not_finite_ends_the_run(study: sweep.Study) -> None:
    run = sweep.Run("small", "SGD", 1e38, 0)
    figures = sweep.train([*study.arguments(run, None), "--trainer.max_epochs=50"])
    assert len(figures["train_losses"].split()) < 50


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_run_of_the_studies_parses(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = sweep.read(path)
    setting = next(iter(study.settings))
    for method in study.methods:
        if method in BASELINES:
            continue
        arguments = [
            word.replace("recipes/", f"{PROJECT}/recipes/")
            for word in study.arguments(sweep.Run(setting, method, 1, 0), "data")
        ]
        with pytest.raises(SystemExit) as exit_:
            main([*arguments, "--print_config"])
        printed: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
        assert exit_.value.code == 0, method
        assert printed["model"]["init_args"]["optimizer"]["init_args"]["lr"] == study.methods[method]["rate"]


def test_full_sizes_parse(capsys: pytest.CaptureFixture[str]) -> None:
    folder = PROJECT / "recipes" / "resnet" / "configs" / "large_batch"
    with pytest.raises(SystemExit):
        main(["fit", f"--config={folder / 'imagenet.yaml'}", f"--config={folder / 'clars.yaml'}", "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert names == ["LinearScaling", "PolynomialSchedule", "LayerwiseRateScaling"]
    assert config["trainer"]["devices"] * config["data"]["init_args"]["batch_size"] == 256
