"""On real images, compression keeps the accuracy: CIFAR-10 as an image folder, given by `DATA=<folder>`."""

import csv
import os
from pathlib import Path

import pytest

from lightning_distopt.cli import main

CONFIG = Path(__file__).parents[3] / "recipes" / "resnet" / "configs" / "imagefolder.yaml"

FLOOR = 0.45  # ddp reaches 0.55 in six epochs over a fifth of the images; chance is 0.10
GAP = 0.05  # three standard deviations of the accuracy on 2,000 images, and the noise of so short a run


def _accuracy(folder: Path, strategy: str, root: str) -> tuple[float, float]:
    """Train half-width ResNet-20 for six epochs on a fifth of CIFAR-10; return accuracy and megabytes sent."""
    words = ["fit", "--config", str(CONFIG), f"--trainer.strategy={strategy}", "--trainer.accelerator=cpu"]
    words += ["--trainer.max_epochs=6", "--model.init_args.scheduler.init_args.T_max=6", "--model.init_args.width=8"]
    words += [f"--data.init_args.root={root}", "--data.init_args.batch_size=32"]
    words += ["--data.init_args.limit_per_class=1000", "--data.init_args.limit_eval_per_class=200"]
    words += [
        "--trainer.check_val_every_n_epoch=6",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.log_every_n_steps=1",
    ]
    words += ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    words += [f"--trainer.logger.init_args.save_dir={folder}", f"--trainer.logger.init_args.name={strategy}"]
    assert main(words) == 0
    with (folder / strategy / "version_0" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    accuracy = [float(row["val/accuracy"]) for row in rows if row["val/accuracy"]]
    sent = [float(row["comm/bytes_sent_total"]) for row in rows if row["comm/bytes_sent_total"]]
    return accuracy[-1], sent[-1] / 1e6


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two runs of 100 to 200 s on two cores
def test_compressed_training_stays_near_ddp_on_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = os.environ.get("DATA", "")
    if not root:
        pytest.skip("set DATA=<folder> to an unpacked CIFAR-10 image folder (train/<class>/*.jpg, test/<class>/*.jpg)")
    pytest.importorskip("torchvision")
    # LightningCLI 2.6 calls methods that newer jsonargparse deprecates.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

    plain, plain_megabytes = _accuracy(tmp_path, "ddp_fork", root)
    compressed, megabytes = _accuracy(tmp_path, "compressed_ddp_fork", root)

    print(f"ddp {plain:.3f} with {plain_megabytes:.1f} MB, compressed_ddp {compressed:.3f} with {megabytes:.1f} MB")
    assert plain > FLOOR
    assert compressed > FLOOR
    assert compressed > plain - GAP
    assert megabytes < plain_megabytes / 4
