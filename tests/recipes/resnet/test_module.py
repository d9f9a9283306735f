"""The classifier trains, logs the same keys on every rank, and comes back from a checkpoint of plain values."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau

from recipes.resnet import DigitsData, ImageClassifier


def _trainer(folder: Path, **kwargs: Any) -> Trainer:
    flags: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1}
    flags |= {"accelerator": "cpu", "devices": 1, "logger": False, "default_root_dir": folder}
    flags |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(**{**flags, **kwargs})


def _classifier(**kwargs: Any) -> ImageClassifier:
    return ImageClassifier(in_channels=1, width=4, **kwargs)


def test_fit_and_test_log_loss_and_accuracy(tmp_path: Path) -> None:
    model, data = _classifier(optimizer=partial(torch.optim.SGD, lr=0.1)), DigitsData()

    fit = _trainer(tmp_path, enable_checkpointing=False)
    fit.fit(model, data)
    [tested] = _trainer(tmp_path).test(model, data, verbose=False)

    assert {"train/loss", "val/loss", "val/accuracy"} <= set(fit.callback_metrics)
    assert set(tested) == {"test/loss", "test/accuracy"}


class _Halves(Callback):
    """Compare, in the worker, the logged accuracy with the mean over both processes."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: ImageClassifier) -> None:
        correct = torch.zeros(2)
        with torch.no_grad():
            for images, labels in trainer.val_dataloaders:
                correct += torch.tensor([(pl_module(images).argmax(1) == labels).sum(), len(labels)])
        trainer.strategy.reduce(correct, reduce_op="sum")
        assert correct[1] == 360
        self.mean = correct[0] / correct[1]

    def on_validation_end(self, trainer: Trainer, pl_module: ImageClassifier) -> None:
        assert torch.isclose(trainer.callback_metrics["val/accuracy"], self.mean)


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")  # 360 images: no rank gets one twice
def test_validation_figures_are_means_over_both_processes(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, devices=2, strategy="ddp_fork", limit_val_batches=None, callbacks=[_Halves()])
    trainer.validate(_classifier(), DigitsData(), verbose=False)


def test_checkpoint_from_python_loads_with_weights_only(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.fit(_classifier(optimizer=partial(torch.optim.Adam, lr=0.01), label_smoothing=0.1), DigitsData())
    [checkpoint] = tmp_path.rglob("*.ckpt")

    saved = torch.load(checkpoint, weights_only=True)
    loaded = ImageClassifier.load_from_checkpoint(checkpoint, optimizer=torch.optim.Adam)

    assert "optimizer" not in saved["hyper_parameters"]
    assert saved["hyper_parameters"]["label_smoothing"] == loaded.label_smoothing == 0.1
    assert isinstance(loaded.configure_optimizers(), torch.optim.Adam)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])


def test_scheduler_counts_what_it_is_told_to_count() -> None:
    model = _classifier(scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1), scheduler_interval="step")
    assert model.configure_optimizers()["lr_scheduler"]["interval"] == "step"


def test_plateau_scheduler_brings_its_monitor() -> None:
    model = _classifier(scheduler=partial(ReduceLROnPlateau, monitor="val/loss"))
    assert model.configure_optimizers()["lr_scheduler"]["monitor"] == "val/loss"


def test_more_classes_in_the_data_than_outputs_are_refused_before_training(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"got 5 for 10 classes.*num_classes=10"):
        trainer.fit(_classifier(num_classes=5), DigitsData())


@pytest.mark.parametrize(
    ("argument", "value"), [("num_classes", 1), ("label_smoothing", 1.0), ("label_smoothing", -0.1)]
)
def test_impossible_arguments_are_refused(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` must be .*got {value}"):
        ImageClassifier(**{argument: value})


def test_predictions_are_probabilities() -> None:
    probabilities = _classifier().predict_step((torch.randn(3, 1, 8, 8), torch.zeros(3)), 0)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(3))
