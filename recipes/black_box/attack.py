"""A universal adversarial perturbation: one x that makes a classifier misread many images, found by queries only."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn

from lightning_distopt.optimizers.proximal import ElasticNet, GroupLasso, Proximal
from lightning_distopt.zeroth_order import BlackBoxModule, Estimator
from lightning_distopt.zeroth_order.black_box import Method
from recipes.black_box.classifier import DigitClassifier

_EDGE = 1e-6  # keeps atanh finite where a pixel is black or white


def attacked(images: Tensor, x: Tensor) -> Tensor:
    """Return ``tanh(atanh(2 a) + x) / 2``: images in (-1/2, 1/2) stay there, whatever the perturbation."""
    return 0.5 * torch.tanh(torch.atanh((2 * images).clamp(-1 + _EDGE, 1 - _EDGE)) + x)


def squares(side: int) -> Tensor:
    """Return the number of the square of ``side`` x ``side`` pixels that each pixel of an image belongs to, shape (784,)."""
    places = torch.arange(28) // side
    return (places[:, None] * (28 // side) + places).flatten()


@torch.no_grad()
def draw_attacks(path: Path, perturbations: dict[str, Tensor], images: Tensor, net: nn.Module) -> None:
    """Write a row for each perturbation: itself, and the images that it moved, with what ``net`` reads in them.

    Args:
        path: of the picture; its folder is made.
        perturbations: by label, each of shape (1, 28, 28).
        images: shape (n, 1, 28, 28), in [-1/2, 1/2].
        net: ``net(images) -> logits``.
    """
    from matplotlib.figure import Figure

    rows, columns = len(perturbations), len(images) + 1
    figure = Figure(figsize=(1.2 * columns, 1.45 * rows), layout="constrained", dpi=150)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, (label, x) in zip(axes, perturbations.items(), strict=True):
        limit = float(x.abs().max()) or 1.0
        row[0].imshow(x[0].cpu().numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
        row[0].set_title(label, fontsize=8)
        moved = attacked(images, x)
        for axis, image, read in zip(row[1:], moved.cpu(), net(moved).argmax(1).tolist(), strict=True):
            axis.imshow(image[0].numpy(), cmap="gray", vmin=-0.5, vmax=0.5)
            axis.set_title(f"read as {read}", fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


class UniversalAttack(BlackBoxModule):
    """``f_i(x) = max(F_y(a_i') - max_{j != y} F_j(a_i'), 0) + c |a_i' - a_i|^2``, F the logits, a' the attacked image.

    The penalty is ``lam1 |x|_1 + lam2 |x|^2``, or with ``blocks`` the group lasso over squares of pixels, so that the
    perturbation leaves whole squares alone. Logs ``success_rate`` and ``distortion`` (mean of ``|a' - a|^2``) whenever the
    objective is evaluated, and writes pictures at the end.

    Args:
        victim: checkpoint of a ``DigitClassifier``.
        method: "sgd", "svrg" or "saga".
        estimator: ``null`` is the coordinate estimator, 1,568 queries an image.
        lr: ``null`` estimates it.
        distortion: weight c of the squared change.
        lam1: weight of the absolute values, or of the norms of the squares.
        lam2: weight of the squares; not used with ``blocks``.
        blocks: side of the squares in pixels, a divisor of 28; ``null`` for single pixels.
        max_queries: budget.
        seed: of samples and directions.
        evaluate_every: steps between evaluations.
        picture: file to write the pictures to; ``null`` for none.
        options: further arguments of the method.
    """

    def __init__(
        self,
        victim: str,
        method: Method = "svrg",
        estimator: Estimator | None = None,
        lr: float | None = None,
        distortion: float = 0.2,
        lam1: float = 1e-5,
        lam2: float = 1e-5,
        blocks: int | None = None,
        max_queries: int | None = None,
        seed: int = 0,
        evaluate_every: int = 10,
        picture: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if blocks is not None and (blocks < 1 or 28 % blocks):
            raise ValueError(f"`blocks` must be a divisor of 28: got {blocks}. Use 2, 4, 7 or 14.")
        proximal: Proximal = ElasticNet(lam1, 2 * lam2)
        if blocks is not None:
            proximal = GroupLasso(lam1, squares(blocks))
        super().__init__(
            method, lr, estimator=estimator, proximal=proximal, max_queries=max_queries, seed=seed, functional=True,
            evaluate_every=evaluate_every, evaluation_samples=None, options=options,
        )  # fmt: skip
        self.victim = DigitClassifier.load_from_checkpoint(victim, map_location="cpu").requires_grad_(False)
        self.c, self.picture = distortion, picture
        self.x = nn.Parameter(torch.zeros(1, 28, 28))

    def query(self, batch: Any) -> Tensor:
        """Return the margin by which each image is still read rightly, and its distortion."""
        images, labels = batch
        moved = attacked(images, self.x)
        return torch.relu(self._margin(self.victim.net(moved), labels)) + self.c * (moved - images).square().sum(
            (1, 2, 3)
        )

    def _margin(self, logits: Tensor, labels: Tensor) -> Tensor:
        own = torch.nn.functional.one_hot(labels, 10).bool()
        return logits.where(own, -torch.inf).amax(1) - logits.where(~own, -torch.inf).amax(1)

    def on_evaluation(self, value: float) -> None:
        """Log how many images are misread, and by how much they changed."""
        rate, distortion = self.success()
        self.log("success_rate", rate, prog_bar=True)
        self.log("distortion", distortion)

    @torch.no_grad()
    def success(self) -> tuple[float, float]:
        """Return the share of the images that are misread, and the mean squared change."""
        images, labels = self._everything()
        moved = attacked(images, self.x)
        wrong = self.victim.net(moved).argmax(1) != labels
        return float(wrong.float().mean()), float((moved - images).square().sum((1, 2, 3)).mean())

    def on_train_end(self) -> None:
        """Write the pictures, and hand them to W&B."""
        super().on_train_end()
        if self.picture is not None and self.trainer.is_global_zero:
            self.draw(Path(self.picture))
            for logger in self.trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image("attack", [self.picture])

    def draw(self, path: Path, count: int = 8) -> None:
        """Write the perturbation, some digits, and the same digits attacked, with what the classifier reads."""
        images = self._everything()[0][:count]
        draw_attacks(path, {"untouched": torch.zeros_like(self.x), "attacked": self.x}, images, self.victim.net)

    def _everything(self) -> Any:
        assert self._samples is not None
        return self._samples(torch.arange(len(self._samples)))
