"""A LightningModule that is a chain of layers and a loss: one definition for one device, ``ddp`` and every pipeline."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_distopt.model_parallel.block import States, is_stateful, run_layers

__all__ = ["LayeredModule", "batch_size_of", "checked_layers", "loss_of", "stateful_names"]


class LayeredModule(pl.LightningModule):
    """Base class of models that any strategy can train, pipelines among them.

    Give it ``self.layers``, an ``nn.Sequential`` or ``nn.ModuleList`` of layers that each take what the one before returns
    (a tensor, or a tuple: what a later layer needs is passed along), and ``loss(output, target)``, a method or a module
    (one with parameters of its own trains with the last layers). Every parameter must belong to one of the two::

        class Net(LayeredModule):
            def __init__(self):
                super().__init__()
                self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))

            def loss(self, output, target):
                return nn.functional.cross_entropy(output, target)

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

    A batch is a pair (input, target); override :meth:`split_batch` for another form. Return further figures from
    :meth:`metrics`. The steps below log ``train/loss``, ``val/loss``, ``test/loss`` and those figures. Under strategies that
    run the whole model in each process you may override them; pipelines call the parts instead, and refuse other steps.

    Layers with a memory from batch to batch implement :class:`~lightning_distopt.model_parallel.block.StatefulLayer`.
    """

    layers: nn.Sequential | nn.ModuleList

    def __init__(self) -> None:
        super().__init__()
        self._states: States = {}
        self._training_states: States = {}

    # ---- what a model may say ---------------------------------------------------------------------------------------

    def split_batch(self, batch: Any) -> tuple[Any, Any]:
        """Return input and target of a batch; both may be nests of tensors."""
        x, target = batch
        return x, target

    def metrics(self, output: Any, target: Any) -> dict[str, Tensor]:
        """Return scalars to log beside the loss, each a mean over the batch; they travel with the loss in a pipeline."""
        return {}

    # ---- one process ------------------------------------------------------------------------------------------------

    def forward(self, x: Any) -> Any:
        """Return the output of all layers; states of stateful layers go on from the last call."""
        named = checked_layers(self)
        output, self._states = run_layers(named, x, self._states)
        return output

    def forget(self) -> None:
        """Begin anew with the states of stateful layers."""
        self._states = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._step("train", batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._step("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._step("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the output of the layers."""
        return self(self.split_batch(batch)[0] if isinstance(batch, (tuple, list)) else batch)

    def on_train_epoch_start(self) -> None:
        """Begin anew with the states."""
        self.forget()

    def on_validation_epoch_start(self) -> None:
        """Begin anew with the states; those of training are kept aside."""
        self._training_states = self._states
        self.forget()

    def on_validation_epoch_end(self) -> None:
        """Go on with the states of training, in whose epoch validation may have been."""
        self._states, self._training_states = self._training_states, {}

    def on_test_epoch_start(self) -> None:
        """Begin anew with the states."""
        self.forget()

    on_predict_epoch_start = on_test_epoch_start

    def _step(self, stage: str, batch: Any) -> Tensor:
        x, target = self.split_batch(batch)
        output = self(x)
        loss = loss_of(self, output, target)
        self.log_figures(stage, {"loss": loss, **self.metrics(output, target)}, batch_size_of(x))
        return loss

    def log_figures(self, stage: str, figures: dict[str, Any], size: int) -> None:
        """Log figures of one batch: each step in training, means over the epoch elsewhere."""
        for name, value in figures.items():
            self.log(
                f"{stage}/{name}",
                value.detach() if isinstance(value, Tensor) else value,
                prog_bar=name == "loss",
                batch_size=size,
                sync_dist=stage != "train" and self._replicated(),
            )

    def _replicated(self) -> bool:
        """Whether each process sees data of its own (in a pipeline all of them log the same figures)."""
        try:
            return not getattr(self.trainer.strategy, "logs_alike", False)
        except RuntimeError:  # no trainer
            return False


def checked_layers(module: pl.LightningModule) -> dict[str, nn.Module]:
    """Return the layers of a module by name.

    Raises:
        MisconfigurationException: if it has no layers or no loss.
    """
    layers, name = getattr(module, "layers", None), type(module).__name__
    if not isinstance(layers, (nn.Sequential, nn.ModuleList)) or not len(layers):
        raise MisconfigurationException(
            f"`{name}.layers` must be an nn.Sequential or nn.ModuleList with at least one layer: got "
            f"{type(layers).__name__}. Set `self.layers` in `__init__`."
        )
    if not callable(getattr(module, "loss", None)):
        raise MisconfigurationException(
            f"`{name}.loss` must be a method `loss(output, target)` or a module: got "
            f"{type(getattr(module, 'loss', None)).__name__}. Define it."
        )
    return dict(layers.named_children())


def loss_of(module: pl.LightningModule, output: Any, target: Any) -> Tensor:
    """Return the module's loss, whether that is a method or a module."""
    loss: Any = module.loss
    found: Tensor = loss(output, target)
    return found


def batch_size_of(x: Any) -> int:
    """Return the first dimension of the first tensor of a nest; 1 if it has none."""
    from lightning_distopt.model_parallel.structure import flatten

    tensors = flatten(x)[1]
    return int(tensors[0].shape[0]) if tensors and tensors[0].ndim else 1


def stateful_names(layers: dict[str, nn.Module]) -> list[str]:
    """Return the names of the layers that have a state."""
    return [name for name, layer in layers.items() if is_stateful(layer)]
