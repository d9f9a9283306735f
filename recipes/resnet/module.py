"""Image classification as a LightningModule: cross-entropy, any torch optimizer, top-1 accuracy."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from recipes.resnet.models import DEFAULT_WIDTH, ModelName, build_model

Batch = tuple[Tensor, Tensor]


class ImageClassifier(LightningModule):
    """Train and evaluate an image classifier; nothing in it knows about strategies.

    Logs ``train/loss`` (the last batch of rank 0), and ``val/loss``, ``val/accuracy``, ``test/loss`` and
    ``test/accuracy`` (means over all processes, once an epoch).

    Args:
        model: name of the network: CIFAR residual networks ``resnet20`` to ``resnet110``, or torchvision's
            ``resnet50``, ``densenet121``, ``mobilenet_v2``; weights start at random.
        num_classes: number of classes, at least 2; at least as many as the data have.
        in_channels: channels of the images: 3 for colour, 1 for grey (CIFAR networks only).
        width: maps of the first stage of the CIFAR networks, at least 1; 8 instead of 16 means a quarter of the
            parameters and of the bytes, and about half of the time.
        optimizer: any torch optimizer by class, with its arguments and without the parameters.
        scheduler: any learning-rate scheduler by class, with its arguments and without the optimizer; ``null`` keeps
            the rate constant.
        scheduler_interval: what the scheduler counts: ``epoch`` or optimizer ``step``; the arguments of the scheduler
            are in the same unit.
        label_smoothing: share of the target that is spread over all classes, in [0, 1); 0 is plain cross-entropy.
    """

    def __init__(
        self,
        model: ModelName = "resnet20",
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = DEFAULT_WIDTH,
        optimizer: OptimizerCallable = torch.optim.SGD,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2: got {num_classes}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be in [0, 1): got {label_smoothing}.")
        self._save_plain_hyperparameters()
        self.model = build_model(model, num_classes, in_channels, width)
        self.optimizer, self.scheduler, self.scheduler_interval = optimizer, scheduler, scheduler_interval
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def setup(self, stage: str) -> None:
        """Compare the classes of the model with those of the data, before any step.

        Raises:
            ValueError: if the data have more classes than the model.
        """
        data_classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", self.num_classes)
        if data_classes > self.num_classes:
            raise ValueError(
                f"`num_classes` must be at least the number of classes in the data: got {self.num_classes} for "
                f"{data_classes} classes. Set `--model.init_args.num_classes={data_classes}`."
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape ``(N, num_classes)`` for images of shape ``(N, in_channels, H, W)``."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        loss, _ = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/accuracy``."""
        self._evaluate("val", batch, self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``test/loss`` and ``test/accuracy``."""
        self._evaluate("test", batch, self.test_accuracy)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probabilities of the classes, shape ``(N, num_classes)``."""
        return self(batch[0]).softmax(dim=-1)

    def configure_optimizers(self) -> Any:
        """Build the optimizer over all parameters, then the scheduler over the optimizer."""
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self.scheduler_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _evaluate(self, stage: str, batch: Batch, accuracy: MulticlassAccuracy) -> None:
        loss, logits = self._loss(batch)
        accuracy(logits, batch[1])
        size = len(batch[1])
        self.log(f"{stage}/loss", loss, prog_bar=True, sync_dist=True, batch_size=size)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True, batch_size=size)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = self(images)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing), logits

    def _save_plain_hyperparameters(self) -> None:
        """Save the arguments that a checkpoint may hold: plain values, and what LightningCLI wrote down for callables.

        From Python ``optimizer`` and ``scheduler`` are callables, which ``torch.load(weights_only=True)`` refuses; they
        are left out, and :meth:`load_from_checkpoint` takes them as arguments. Under LightningCLI they arrive here as
        plain dictionaries and are kept. ``ignore`` must therefore be decided after a first look (the second call also
        refreshes the copy that loggers read).
        """
        self.save_hyperparameters()
        callables = [name for name, value in self.hparams.items() if callable(value)]
        for name in callables:
            del self.hparams[name]
        self.save_hyperparameters(ignore=callables)
