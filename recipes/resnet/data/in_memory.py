"""Images held in memory as 8-bit tensors, augmented a whole batch at a time."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor]


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Pad each image with zeros on all sides and cut a window of the old size at a place of its own.

    Args:
        images: shape ``(N, C, H, W)``, any dtype; not modified.
        padding: pixels added on each side, at least 0.

    Returns:
        A tensor of the same shape and dtype.
    """
    n, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, n))
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(n)[:, None, None, None], torch.arange(channels)[None, :, None, None], rows, columns]


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image left to right with probability one half; shape ``(N, C, H, W)``, not modified."""
    flipped = torch.rand(len(images)) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


class InMemoryImages(Dataset[Batch]):
    """Images and labels in memory; the loader asks for whole batches.

    A batch is ``(images, labels)``: float32 of shape ``(N, C, H, W)``, ``(image / 255 - mean) / std``, and int64 of
    shape ``(N,)``. Give :func:`keep_batch` to the loader as ``collate_fn``.

    Args:
        images: shape ``(N, C, H, W)``, uint8; kept, not copied.
        labels: shape ``(N,)``, int64.
        mean: one number a channel, in units of the full scale (0 to 1).
        std: one number a channel, in the same units, above 0.
        crop_padding: zero padding of the random crop in pixels; ``None`` switches crop and flip off (evaluation).
        flip: mirror half of the images, where ``crop_padding`` is given.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        crop_padding: int | None = None,
        flip: bool = True,
    ) -> None:
        self.images, self.labels = images, labels
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.std = torch.tensor(std).view(1, -1, 1, 1)
        self.crop_padding, self.flip = crop_padding, flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the batch of these indices, augmented and normalised (torch's loader calls this name)."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        if self.crop_padding is not None:
            images = random_crop(images, self.crop_padding)
            if self.flip:
                images = random_flip(images)
        return (images.float() / 255 - self.mean) / self.std, self.labels[chosen]


def keep_batch(batch: Batch) -> Batch:
    """Return the batch as it came (a named function, because worker processes pickle it)."""
    return batch
