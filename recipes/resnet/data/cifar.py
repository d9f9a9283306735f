"""CIFAR-10 and CIFAR-100 in their official format (Krizhevsky 2009): 50,000 + 10,000 colour images, 32 x 32 pixels."""

from pathlib import Path
from typing import Any, Literal

import torch

from recipes.resnet.data.base import ImageData
from recipes.resnet.data.in_memory import InMemoryImages
from recipes.resnet.data.subset import balanced_subset

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


class CifarData(ImageData):
    """CIFAR-10 or CIFAR-100 from the official python archives; images of shape ``(3, 32, 32)``.

    Training images are padded by 4 pixels, cropped to 32 at random and mirrored at random; evaluation images are only
    normalised. Validation and test are the official test part. All images stay in memory (180 MB a process).

    Args:
        root: folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``.
        classes: 10 for CIFAR-10, 100 for CIFAR-100 (its fine labels).
        batch_size: images in a batch of ONE process, at least 1; the global batch is this times the number of
            processes.
        num_workers: loader processes per training process, at least 0; the data are in memory, so 0 is usually enough.
        download: fetch the official archive (170 MB) into ``root`` if it is absent; off, nothing is ever fetched.
        limit_per_class: training images of each class, at least 1, chosen once with ``seed``; ``null`` takes all.
        limit_eval_per_class: the same for the evaluation images.
        seed: chooses the subsets; the same on every process.
    """

    def __init__(
        self,
        root: str = "data",
        classes: Literal[10, 100] = 10,
        batch_size: int = 64,
        num_workers: int = 0,
        download: bool = False,
        limit_per_class: int | None = None,
        limit_eval_per_class: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if classes not in (10, 100):
            raise ValueError(f"`classes` must be 10 (CIFAR-10) or 100 (CIFAR-100): got {classes}.")
        self.root, self.classes, self.download = root, classes, download
        self.limit_per_class, self.limit_eval_per_class, self.seed = limit_per_class, limit_eval_per_class, seed
        self.num_classes = classes
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        """Download the archive if ``download`` is on; one process of a machine does it."""
        if self.download:
            self._dataset_class()(self.root, download=True)

    def load(self) -> tuple[InMemoryImages, InMemoryImages]:
        """Return the training set and the evaluation set.

        Raises:
            FileNotFoundError: if ``root`` lacks the official folder.
        """
        folder = Path(self.root) / self._dataset_class().base_folder
        if not folder.is_dir():
            raise FileNotFoundError(
                f"`root` must hold CIFAR-{self.classes} in its official format: there is no folder '{folder}'. "
                "Set `download: true`, or unpack the official python archive in `root`."
            )
        return self._read(train=True), self._read(train=False)

    def _read(self, train: bool) -> InMemoryImages:
        official = self._dataset_class()(self.root, train=train)
        images, labels = torch.from_numpy(official.data).permute(0, 3, 1, 2), torch.tensor(official.targets)
        limit = self.limit_per_class if train else self.limit_eval_per_class
        chosen = balanced_subset(labels, limit, self.seed)
        return InMemoryImages(images[chosen], labels[chosen], MEAN, STD, crop_padding=4 if train else None)

    def _dataset_class(self) -> Any:
        # Imported here: torchvision costs seconds, and the parser only needs the arguments.
        from torchvision.datasets import CIFAR10, CIFAR100

        return CIFAR10 if self.classes == 10 else CIFAR100
