"""Any folder of images, one sub-folder a class: the layout of ImageNet, and of many small data sets."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from recipes.resnet.data.base import ImageData
from recipes.resnet.data.in_memory import InMemoryImages
from recipes.resnet.data.subset import balanced_subset

SMALL_IMAGE = 64
"""Up to this many pixels a side an image is augmented as CIFAR's are, above as ImageNet's are."""


class ImageFolderData(ImageData):
    """Images in ``<root>/<split>/<class>/*.jpg`` (or png, and what else torchvision reads), always three channels.

    `image_size` decides the augmentation. Up to 64: zero padding of an eighth of the side, random crop, random mirror
    (32 gives CIFAR's 4 pixels); evaluation as it is. Above: random resized crop and mirror; evaluation resizes the
    short side to ``image_size * 256 / 224`` and cuts the centre (ImageNet's 256 and 224).

    Args:
        root: folder that holds the splits.
        train_split: name of the training folder in ``root``.
        val_split: name of the evaluation folder in ``root`` (ImageNet says ``val``, others ``test``); used for
            validation and test. Its classes must be those of the training folder.
        image_size: side of the images that the model sees, in pixels, at least 8; see above.
        batch_size: images in a batch of ONE process, at least 1; the global batch is this times the number of
            processes.
        num_workers: loader processes per training process, at least 0; large images want 4 or more.
        cache: decode every image once and keep it in memory as bytes, ``3 * image_size ** 2`` an image and process;
            needs ``image_size`` of at most 64, and makes epochs of small images far faster.
        mean: mean of each of the three channels in units of the full scale (0 to 1); the default is ImageNet's.
        std: standard deviation of each channel, above 0; the default is ImageNet's.
        limit_per_class: training images of each class, at least 1, chosen once with ``seed``; ``null`` takes all.
        limit_eval_per_class: the same for the evaluation images.
        seed: chooses the subsets; the same on every process.
    """

    def __init__(
        self,
        root: str,
        train_split: str = "train",
        val_split: str = "val",
        image_size: int = 224,
        batch_size: int = 32,
        num_workers: int = 0,
        cache: bool = False,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        limit_per_class: int | None = None,
        limit_eval_per_class: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if image_size < 8:
            raise ValueError(f"`image_size` must be at least 8 pixels: got {image_size}.")
        if cache and image_size > SMALL_IMAGE:
            raise ValueError(
                f"`cache=True` needs `image_size` of at most {SMALL_IMAGE} pixels: got {image_size}. "
                "Use `cache: false` and more `num_workers` for large images."
            )
        self.root, self.train_split, self.val_split = root, train_split, val_split
        self.image_size, self.cache, self.mean, self.std = image_size, cache, mean, std
        self.limit_per_class, self.limit_eval_per_class, self.seed = limit_per_class, limit_eval_per_class, seed
        self.save_hyperparameters()

    def load(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """Return the training set and the evaluation set.

        Raises:
            FileNotFoundError: if a split's folder is absent or has no class folder.
            ValueError: if the two splits have different classes.
        """
        train, evaluation = self._folder(self.train_split), self._folder(self.val_split)
        if train.classes != evaluation.classes:
            only = sorted(set(train.classes) ^ set(evaluation.classes))
            raise ValueError(
                f"`{self.train_split}` and `{self.val_split}` in '{self.root}' must have the same classes: got "
                f"{len(train.classes)} and {len(evaluation.classes)}; only one of them has {', '.join(only[:5])}."
            )
        self.num_classes = len(train.classes)
        return self._split(train, train_split=True), self._split(evaluation, train_split=False)

    def _folder(self, split: str) -> Any:
        # Imported here: torchvision costs seconds, and the parser only needs the arguments.
        from torchvision.datasets import ImageFolder

        folder = Path(self.root) / split
        if not folder.is_dir():
            found = sorted(p.name for p in Path(self.root).glob("*") if p.is_dir())
            raise FileNotFoundError(
                f"`root` must hold a folder for each split, '<root>/{split}/<class>/*.jpg': there is no folder "
                f"'{folder}' (found there: {', '.join(found) or 'nothing'}). Set `root`, `train_split` and `val_split`."
            )
        return ImageFolder(str(folder))

    def _split(self, folder: Any, train_split: bool) -> Dataset[Any]:
        limit = self.limit_per_class if train_split else self.limit_eval_per_class
        labels = torch.tensor(folder.targets)
        chosen = balanced_subset(labels, limit, self.seed)
        if self.cache:
            images = torch.stack([self._decode(folder.samples[i][0]) for i in chosen.tolist()])
            padding = self.image_size // 8 if train_split else None
            return InMemoryImages(images, labels[chosen], self.mean, self.std, crop_padding=padding)
        folder.transform = self._train_transform() if train_split else self._eval_transform()
        return Subset(folder, chosen.tolist())

    def _decode(self, path: str) -> Tensor:
        from torchvision.datasets.folder import default_loader
        from torchvision.transforms import functional as T

        image = default_loader(path)
        if image.size != (self.image_size, self.image_size):
            image = T.center_crop(T.resize(image, self.image_size), [self.image_size])
        return T.pil_to_tensor(image)

    def _train_transform(self) -> Any:
        from torchvision import transforms as T

        if self.image_size <= SMALL_IMAGE:
            size = [T.Resize(self.image_size), T.CenterCrop(self.image_size)]
            crop = [*size, T.RandomCrop(self.image_size, padding=self.image_size // 8)]
        else:
            crop = [T.RandomResizedCrop(self.image_size)]
        return T.Compose([*crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(self.mean, self.std)])

    def _eval_transform(self) -> Any:
        from torchvision import transforms as T

        resize = self.image_size if self.image_size <= SMALL_IMAGE else round(self.image_size * 256 / 224)
        steps = [T.Resize(resize), T.CenterCrop(self.image_size), T.ToTensor(), T.Normalize(self.mean, self.std)]
        return T.Compose(steps)
