"""Fine-tuning a small Transformer without back-propagation: the next byte of a text, by queries only."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_distopt.optimizers.proximal import Proximal
from lightning_distopt.zeroth_order import BlackBoxModule, Estimator, GaussianEstimator
from lightning_distopt.zeroth_order.black_box import Method


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each on a normalised input, each added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape, ``(n, length, width)``."""
        n, length, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, length, width)
        x = x + self.out(mixed)
        return x + self.feed(self.second(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A model of the next byte.

    Args:
        width: of the hidden states, a multiple of ``heads``.
        layers: blocks.
        heads: of the attention.
        length: longest window.
    """

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, length: int = 128) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"`width` must be a multiple of `heads`: got {width} and {heads}.")
        self.embed, self.place = nn.Embedding(128, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)

    def forward(self, codes: Tensor) -> Tensor:
        """Return logits, shape ``(n, length, 128)``."""
        return self.head(self.norm(self.blocks(self.embed(codes) + self.place[: codes.shape[1]])))  # type: ignore[no-any-return]

    def losses(self, windows: Tensor) -> Tensor:
        """Return the mean cross-entropy of the next byte of each window, shape ``(n,)``."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2).float(), windows[:, 1:], reduction="none").mean(1)


class TransformerLM(LightningModule):
    """Trains the model with gradients, on the text that it is to know before it is fine-tuned.

    Args:
        width: see :class:`Transformer`.
        layers: see :class:`Transformer`.
        heads: see :class:`Transformer`.
        optimizer: any torch optimizer by class.
    """

    def __init__(
        self, width: int = 64, layers: int = 2, heads: int = 4, optimizer: OptimizerCallable = torch.optim.AdamW
    ) -> None:
        super().__init__()
        self.save_hyperparameters("width", "layers", "heads")
        self.optimizer = optimizer
        self.model = Transformer(width, layers, heads)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean loss of a batch."""
        loss = self.model.losses(batch[0]).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss."""
        self.log("val/loss", self.model.losses(batch[0]).mean(), prog_bar=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer."""
        return self.optimizer(self.parameters())


def trained(path: str) -> Transformer:
    """Return the model of a checkpoint of ``TransformerLM``.

    Read by hand: ``load_from_checkpoint`` inside of another module's ``__init__`` takes that one's arguments for its own
    when LightningCLI builds it.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model = Transformer(**checkpoint["hyper_parameters"])
    model.load_state_dict({name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()})
    return model


class FineTuning(BlackBoxModule):
    """Fine-tunes a trained model on another text, one random direction for a whole batch, layer by layer.

    Args:
        start: checkpoint of a ``TransformerLM``; ``null`` starts at random (which queries alone will not get far from).
        train: "all" parameters, or those of "norms" and biases only (fewer directions to search).
        method: "sgd", "svrg" or "saga".
        estimator: ``null`` is one Gaussian direction for the batch, to both sides.
        lr: ``null`` estimates it.
        batch_size: windows of a step.
        smoothing: ``null`` takes the estimator's.
        proximal: on the parameters themselves; ``null`` for none.
        max_queries: budget.
        seed: of samples and directions.
        evaluate_every: steps between evaluations.
        options: further arguments of the method.
    """

    def __init__(
        self,
        start: str | None = None,
        train: Literal["all", "norms"] = "all",
        method: Method = "sgd",
        estimator: Estimator | None = None,
        lr: float | None = 1e-3,
        batch_size: int | None = 32,
        smoothing: float | None = None,
        proximal: Proximal | None = None,
        max_queries: int | None = None,
        seed: int = 0,
        evaluate_every: int = 25,
        options: dict[str, Any] | None = None,
    ) -> None:
        estimator = GaussianEstimator(1, "per_batch", central=True) if estimator is None else estimator
        super().__init__(
            method, lr, batch_size, estimator=estimator, smoothing=smoothing, proximal=proximal, max_queries=max_queries,
            seed=seed, evaluate_every=evaluate_every, options=options,
        )  # fmt: skip
        self.model = Transformer() if start is None else trained(start)
        if train == "norms":
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(parameter.dim() == 1 or name == "place")

    def query(self, batch: Any) -> Tensor:
        """Return the loss of each window."""
        return self.model.losses(batch[0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss on the end of the text."""
        self.log("val/loss", self.model.losses(batch[0]).mean(), prog_bar=True, batch_size=len(batch[0]))
