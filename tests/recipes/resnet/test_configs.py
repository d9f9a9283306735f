"""Every configuration parses with the classes that it names, and the papers' settings are the papers'."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_distopt.cli import main

CONFIGS = Path(__file__).parents[3] / "recipes" / "resnet" / "configs"
WHOLE = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "wandb")


def _printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *arguments, "--print_config"])
    assert exit_.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", WHOLE)
def test_config_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = _printed(capsys, "--config", str(CONFIGS / f"{name}.yaml"))

    assert config["seed_everything"] == 0  # equal runs
    layered = name in ("digits_dsp", "cifar10_pipeline")
    assert config["model"]["class_path"] == f"recipes.resnet.{'LayeredClassifier' if layered else 'ImageClassifier'}"
    assert config["data"]["class_path"].startswith("recipes.resnet.")


def test_wandb_overlay_replaces_the_logger_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    plain = _printed(capsys, "--config", str(CONFIGS / "demo.yaml"))
    overlaid = _printed(capsys, "--config", str(CONFIGS / "demo.yaml"), "--config", str(CONFIGS / "wandb.yaml"))

    logger = overlaid["trainer"].pop("logger")
    plain["trainer"].pop("logger")

    assert logger["class_path"] == "lightning.pytorch.loggers.WandbLogger"
    assert overlaid == plain


@pytest.mark.parametrize(
    ("name", "model", "classes", "batch", "epochs", "milestones", "decay"),
    [
        ("cifar100_saef", "resnet56", 100, 128, 200, [100, 150], 5e-4),
        ("imagenet_saef", "resnet50", 1000, 256, 90, [30, 60, 90], 1e-4),
    ],
)
def test_paper_settings(
    name: str, model: str, classes: int, batch: int, epochs: int, milestones: list[int], decay: float
) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    module, trainer = config["model"]["init_args"], config["trainer"]

    assert (module["model"], module["num_classes"], trainer["max_epochs"]) == (model, classes, epochs)
    assert trainer["devices"] * config["data"]["init_args"]["batch_size"] == batch
    assert module["optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9, "weight_decay": decay}
    assert module["scheduler"]["init_args"] == {"milestones": milestones, "gamma": 0.1}


def test_saef_settings_differ_as_the_paper_says() -> None:
    strategies = {
        name: yaml.safe_load((CONFIGS / f"{name}_saef.yaml").read_text())["trainer"]["strategy"]["init_args"]
        for name in ("cifar100", "imagenet")
    }
    for arguments in strategies.values():
        assert arguments["error_feedback"] == "step_ahead"
        assert arguments["server_compression"] is True
    assert (strategies["cifar100"]["compressor"], strategies["cifar100"]["averaging_period"]) == ("sign", 0)
    assert (strategies["imagenet"]["compressor"], strategies["imagenet"]["averaging_period"]) == ("topk:0.05", 20)
