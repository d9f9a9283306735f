"""scikit-learn's bundled handwritten digits: 1,797 real grey images of 8 x 8 pixels, nothing to download."""

import torch

from recipes.resnet.data.base import ImageData
from recipes.resnet.data.in_memory import InMemoryImages
from recipes.resnet.data.subset import balanced_subset

MEAN, STD = (0.3053,), (0.3763,)


class DigitsData(ImageData):
    """Handwritten digits, 10 classes, images of shape ``(1, 8, 8)``: 1,437 to train and 360 to evaluate.

    Validation and test are the same 360 images: fine for a demonstration, too few for a claim.

    Args:
        batch_size: images in a batch of ONE process, at least 1; the global batch is this times the number of
            processes.
        num_workers: loader processes per training process, at least 0; the data are in memory, so 0 is fastest.
        limit_per_class: training images of each class, at least 1, chosen once with ``seed``; ``null`` takes all.
        seed: chooses the split into training and evaluation, and the subset.
    """

    num_classes = 10

    def __init__(
        self, batch_size: int = 32, num_workers: int = 0, limit_per_class: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.limit_per_class, self.seed = limit_per_class, seed
        self.save_hyperparameters()

    def load(self) -> tuple[InMemoryImages, InMemoryImages]:
        """Return the training set and the evaluation set; one fifth of every class is kept for evaluation."""
        # Imported here: only this data needs scikit-learn.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        # Pixels are counts from 0 to 16; 15.9375 = 255 / 16 takes them to the 8-bit scale of the other data.
        images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        order = torch.arange(len(labels)).numpy()
        parts = train_test_split(order, test_size=0.2, stratify=digits.target, random_state=self.seed)
        train, evaluation = (torch.from_numpy(part) for part in parts)
        train = train[balanced_subset(labels[train], self.limit_per_class, self.seed)]
        return (
            InMemoryImages(images[train], labels[train], MEAN, STD),
            InMemoryImages(images[evaluation], labels[evaluation], MEAN, STD),
        )
