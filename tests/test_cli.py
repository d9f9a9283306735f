"""The `distopt` command: help, own sub-commands, LightningCLI underneath, and where the configuration goes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_distopt
from lightning_distopt import cli
from lightning_distopt.cli import COMMANDS, Command, main
from recipes.resnet import ImageClassifier

PROJECT = Path(__file__).parents[1]
DEMO = PROJECT / "recipes" / "resnet" / "configs" / "demo.yaml"
WANDB = DEMO.with_name("wandb.yaml")


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    # LightningCLI 2.6 calls methods that newer jsonargparse deprecates.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def _short(folder: Path, strategy: str) -> list[str]:
    """A fit of two steps of the smallest network."""
    words = ["fit", "--config", str(DEMO), f"--trainer.strategy={strategy}", "--model.init_args.width=4"]
    words += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    words += ["--trainer.num_sanity_val_steps=0", "--trainer.enable_progress_bar=false"]
    words += [f"--trainer.logger.init_args.save_dir={folder}"]
    return words


# --- help and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_help_names_every_sub_command_and_an_example(
    words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    shown = capsys.readouterr().out
    for word in ("fit", "validate", "test", "predict", *COMMANDS, "distopt fit --config recipes/resnet"):
        assert word in shown


def test_unknown_sub_command_is_an_error_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["strategy"]) == 2
    error = capsys.readouterr().err
    assert "fit, validate, test, predict, advise, solve, strategies" in error
    assert "Did you mean `distopt strategies`?" in error


def test_version_is_the_package_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert lightning_distopt.__version__ in capsys.readouterr().out


def test_own_sub_commands_are_rows_of_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "echo", Command(lambda words: len(words), "count the words"))
    assert main(["echo", "a", "b"]) == 2
    main(["--help"])
    assert "count the words" in capsys.readouterr().out


def test_a_wrong_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(DEMO), "--model.init_args.model=resnet21"])
    assert exit_.value.code == 2
    assert "resnet21" in capsys.readouterr().err


def test_help_of_a_strategy_shows_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--trainer.strategy.help=lightning_distopt.CompressedDDPStrategy"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for argument in ("compressor", "error_feedback", "averaging_period", "exchange"):
        assert argument in shown


# --- strategies -----------------------------------------------------------------------------------------------------


def test_strategies_prints_every_record(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["strategies"]) == 0
    shown = capsys.readouterr().out
    for record in lightning_distopt.list_strategies():
        for text in (record.name, record.paper, record.description):
            assert " ".join(text.split()[:2]) in shown


# --- LightningCLI ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp_fork", "compressed_ddp_fork"])
def test_fit_trains_and_saves_its_config_into_the_run(tmp_path: Path, strategy: str) -> None:
    words = _short(tmp_path, strategy)

    for version in ("version_0", "version_1"):  # the second run must not trip over the first
        assert main(words) == 0
        run = tmp_path / "demo" / version
        saved = yaml.safe_load((run / "config.yaml").read_text())
        assert saved["trainer"]["strategy"] == strategy
        assert saved["model"]["init_args"]["width"] == 4
        assert "val/accuracy" in (run / "metrics.csv").read_text()


def test_a_strategy_by_class_path_trains_as_by_name(tmp_path: Path) -> None:
    # The parser fills in every default of DistributedDataParallel, None included: they must mean the same as none given.
    overlay = {"class_path": "lightning_distopt.CompressedDDPStrategy", "init_args": {"start_method": "fork"}}
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": overlay}}))
    by_name = _short(tmp_path, "compressed_ddp_fork")
    by_class = [word for word in by_name if not word.startswith("--trainer.strategy")]

    assert main(by_name) == 0
    assert main([*by_class, "--config", str(tmp_path / "overlay.yaml")]) == 0

    first, second = (_rows((tmp_path / "demo" / f"version_{i}" / "metrics.csv").read_text()) for i in (0, 1))
    for column in ("train/loss", "val/loss", "comm/bytes_sent"):
        assert [row[column] for row in first] == [row[column] for row in second]


def test_saved_config_repeats_the_run(tmp_path: Path) -> None:
    assert main(_short(tmp_path, "ddp_fork")) == 0
    assert main(["fit", "--config", str(tmp_path / "demo" / "version_0" / "config.yaml")]) == 0

    first, second = ((tmp_path / "demo" / f"version_{i}" / "metrics.csv").read_text() for i in (0, 1))
    assert [row["train/loss"] for row in _rows(first)] == [row["train/loss"] for row in _rows(second)]


def _rows(text: str) -> list[dict[str, str]]:
    header, *rows = (line.split(",") for line in text.splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the tester saves no checkpoints
def test_checkpoint_of_the_cli_loads_and_is_tested(tmp_path: Path) -> None:
    words = [*_short(tmp_path, "compressed_ddp_fork"), "--trainer.enable_checkpointing=true"]
    assert main(words) == 0
    [checkpoint] = tmp_path.rglob("*.ckpt")

    saved = torch.load(checkpoint, weights_only=True)
    loaded = ImageClassifier.load_from_checkpoint(checkpoint)
    test = ["test", "--config", str(DEMO), "--trainer.strategy=auto", "--trainer.devices=1"]
    test += ["--trainer.enable_progress_bar=false", f"--ckpt_path={checkpoint}"]
    assert main([*test, f"--trainer.logger.init_args.save_dir={tmp_path / 'tested'}"]) == 0

    assert saved["hyper_parameters"]["optimizer"]["class_path"] == "torch.optim.SGD"
    assert loaded.configure_optimizers()["optimizer"].defaults["momentum"] == 0.9
    assert "test/accuracy" in next((tmp_path / "tested").rglob("metrics.csv")).read_text()


def test_modules_of_the_current_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_module.py").write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel\nclass Own(BoringModel):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--model=own_module.Own", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]
    words += ["--seed_everything=0", "--trainer.logger=false"]
    assert main([*words, "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]) == 0
    assert sys.path[0] == str(tmp_path)


def test_arguments_are_in_argv_while_the_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(cli, "DistoptCLI", lambda: seen.append(sys.argv[1:]))
    before = sys.argv.copy()

    main(["fit", "--config", "a.yaml"])

    assert seen == [["fit", "--config", "a.yaml"]]
    assert sys.argv == before


def test_wandb_offline_twice_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = _short(tmp_path, "ddp_fork")
    words[3:3] = ["--config", str(WANDB)]

    for count in (1, 2):
        assert main(words) == 0
        configs = list(tmp_path.glob("wandb/offline-run-*/files/distopt.yaml"))
        assert len(configs) == count
        assert all(yaml.safe_load(c.read_text())["trainer"]["strategy"] == "ddp_fork" for c in configs)


def test_a_logger_without_folders_gets_the_config_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.loggers import Logger

    class Memory(Logger):
        name, version = "memory", 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

        def log_hyperparams(self, params: dict[str, str]) -> None:
            self.logged = params

    logger = Memory()
    callback = cli.RunConfigCallback(parser=None, config=None)
    callback._save_to(logger, "text: yes")
    assert logger.logged == {"config": "text: yes"}


MODULE = [sys.executable, "-m", "lightning_distopt.cli"]
SCRIPT = [sys.executable, str(Path(sys.executable).with_name("distopt"))]


@pytest.mark.parametrize(
    ("start", "strategy"),
    [
        pytest.param(SCRIPT, "compressed_ddp", id="script-compressed"),
        pytest.param(SCRIPT, "ddp", id="script-ddp", marks=pytest.mark.slow),
        pytest.param(MODULE, "compressed_ddp", id="module-compressed", marks=pytest.mark.slow),
        pytest.param(MODULE, "ddp", id="module-ddp", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(180)  # each process imports everything anew
def test_strategies_that_run_the_script_again_work(tmp_path: Path, start: list[str], strategy: str) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "MASTER_", "LOCAL_RANK"))}
    done = subprocess.run([*start, *_short(tmp_path, strategy)], cwd=PROJECT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Starting with 2 processes" in done.stderr + done.stdout
