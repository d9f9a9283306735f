"""Data modules read their formats, split and limit them repeatably, and augment as the papers do."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.resnet.data import CifarData, DigitsData, ImageData, ImageFolderData
from recipes.resnet.data.in_memory import InMemoryImages, keep_batch, random_crop, random_flip
from recipes.resnet.data.subset import balanced_subset


def _train_batch(data: ImageData) -> tuple[Tensor, Tensor]:
    data.setup("fit")
    return next(iter(data.train_dataloader()))


# --- subsets and augmentation ---------------------------------------------------------------------------------------


def test_subset_is_balanced_sorted_and_repeatable() -> None:
    labels = torch.randint(0, 3, (100,))

    chosen = balanced_subset(labels, 5, seed=1)

    assert labels[chosen].bincount().tolist() == [5, 5, 5]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert torch.equal(chosen, balanced_subset(labels, 5, seed=1))
    assert not torch.equal(chosen, balanced_subset(labels, 5, seed=2))
    assert len(balanced_subset(labels, None, seed=1)) == 100


@pytest.mark.parametrize(("limit", "words"), [(0, ["at least 1", "got 0"]), (3, ["got 3", "class 1 has 2"])])
def test_subset_refuses_limits_that_the_classes_cannot_meet(limit: int, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        balanced_subset(torch.tensor([0, 0, 0, 1, 1]), limit, seed=0)
    assert all(word in str(error.value) for word in words)


def test_random_crop_equals_a_loop_over_the_images() -> None:
    images = torch.randint(1, 256, (5, 3, 6, 8), dtype=torch.uint8)
    state = torch.get_rng_state()
    cropped = random_crop(images, padding=2)

    torch.set_rng_state(state)
    top, left = torch.randint(0, 5, (2, 5)).tolist()
    padded = F.pad(images, (2, 2, 2, 2))
    for i in range(5):
        assert torch.equal(cropped[i], padded[i, :, top[i] : top[i] + 6, left[i] : left[i] + 8])


def test_random_flip_mirrors_about_half_of_the_images() -> None:
    images = torch.arange(4.0).expand(1000, 1, 1, 4)
    mirrored = random_flip(images)[:, 0, 0, 0] == 3

    assert torch.equal(random_flip(images).sort(dim=-1).values, images)
    assert abs(mirrored.float().mean() - 0.5) < 0.1  # 6 standard errors


def test_a_batch_is_normalised_and_equal_to_its_images() -> None:
    images = torch.randint(0, 256, (4, 3, 2, 2), dtype=torch.uint8)
    data = InMemoryImages(images, torch.arange(4), mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3))

    batch, labels = keep_batch(data.__getitems__([2, 0]))

    assert labels.tolist() == [2, 0]
    assert torch.allclose(batch[0, 1], (images[2, 1] / 255 - 0.4) / 0.2)
    assert torch.equal(batch[0], data[2][0])


# --- digits ---------------------------------------------------------------------------------------------------------


def test_digits_are_split_once_and_normalised() -> None:
    data, again = DigitsData(batch_size=2000), DigitsData(batch_size=2000)
    images, labels = _train_batch(data)
    again.setup("fit")

    assert images.shape == (1437, 1, 8, 8)
    assert len(data.eval_set) == 360
    assert labels.bincount().min() > 130  # the classes have about 180 digits each
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02
    assert torch.equal(data.eval_set.labels, again.eval_set.labels)


def test_digits_can_be_limited_per_class() -> None:
    _, labels = _train_batch(DigitsData(batch_size=100, limit_per_class=10))
    assert labels.bincount().tolist() == [10] * 10


def test_loader_processes_give_whole_batches() -> None:
    data = DigitsData(batch_size=7, num_workers=1, limit_per_class=2)
    data.setup("fit")
    assert [len(labels) for _, labels in data.train_dataloader()] == [7, 7, 6]


def test_only_training_batches_are_shuffled() -> None:
    data = DigitsData(batch_size=360)
    data.setup("fit")

    assert not torch.equal(next(iter(data.train_dataloader()))[1], next(iter(data.train_dataloader()))[1])
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert torch.equal(next(iter(loader))[1], data.eval_set.labels)


@pytest.mark.parametrize(
    ("arguments", "name"), [({"batch_size": 0}, "batch_size"), ({"num_workers": -1}, "num_workers")]
)
def test_impossible_loader_settings_are_refused(arguments: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be at least"):
        DigitsData(**arguments)


def test_loaders_need_setup_first() -> None:
    with pytest.raises(RuntimeError, match=r"`DigitsData.setup` must run"):
        DigitsData().train_dataloader()


# --- CIFAR ----------------------------------------------------------------------------------------------------------


def _write(file: Path, content: dict[str, Any]) -> str:
    file.write_bytes(pickle.dumps(content))
    return hashlib.md5(file.read_bytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 40 + 20 random images in both official formats; torchvision's checksums are those of our files."""
    datasets = pytest.importorskip("torchvision.datasets")
    rng = np.random.default_rng(0)

    def part(n: int, key: str, classes: int) -> dict[str, Any]:
        pixels = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        return {"data": pixels, key: [i % classes for i in range(n)]}

    small, large = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-100-python"
    small.mkdir(), large.mkdir()
    train = [[f"data_batch_{i}", _write(small / f"data_batch_{i}", part(20, "labels", 10))] for i in range(1, 3)]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    test = [["test_batch", _write(small / "test_batch", part(20, "labels", 10))]]
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test)
    names = {"label_names": [str(i) for i in range(10)]}
    meta = {"filename": "batches.meta", "key": "label_names", "md5": _write(small / "batches.meta", names)}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)

    train = [["train", _write(large / "train", part(100, "fine_labels", 100))]]
    monkeypatch.setattr(datasets.CIFAR100, "train_list", train)
    test = [["test", _write(large / "test", part(100, "fine_labels", 100))]]
    monkeypatch.setattr(datasets.CIFAR100, "test_list", test)
    names = {"fine_label_names": [str(i) for i in range(100)]}
    meta = {"filename": "meta", "key": "fine_label_names", "md5": _write(large / "meta", names)}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)
    return tmp_path


@pytest.mark.parametrize(("classes", "size"), [(10, 40), (100, 100)])
def test_cifar_reads_the_official_format(cifar: Path, classes: int, size: int) -> None:
    data = CifarData(root=str(cifar), classes=classes, batch_size=128)
    images, labels = _train_batch(data)

    assert images.shape == (size, 3, 32, 32)
    assert labels.max() == data.num_classes - 1 == classes - 1
    assert data.train_set.crop_padding == 4
    assert data.eval_set.crop_padding is None


def test_cifar_pixels_keep_their_place(cifar: Path) -> None:
    data = CifarData(root=str(cifar), limit_eval_per_class=1)
    data.setup("test")
    raw = pickle.loads((cifar / "cifar-10-batches-py" / "test_batch").read_bytes())["data"]

    chosen = balanced_subset(torch.arange(20) % 10, 1, seed=0)

    assert torch.equal(data.eval_set.images, torch.from_numpy(raw[chosen.numpy()]).view(10, 3, 32, 32))


@pytest.mark.parametrize(("classes", "folder"), [(10, "cifar-10-batches-py"), (100, "cifar-100-python")])
def test_absent_cifar_is_explained(tmp_path: Path, classes: int, folder: str) -> None:
    pytest.importorskip("torchvision")
    data = CifarData(root=str(tmp_path), classes=classes)
    data.prepare_data()  # downloads nothing

    with pytest.raises(FileNotFoundError, match=rf"no folder '.*{folder}'.*download: true"):
        data.setup("fit")


def test_cifar_has_ten_or_a_hundred_classes() -> None:
    with pytest.raises(ValueError, match="got 20"):
        CifarData(classes=20)


# --- image folders --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, 6 + 2 images each, 40 x 32 pixels, as jpg; the colour of an image is its class."""
    pytest.importorskip("torchvision")
    from PIL import Image

    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((32, 40, 3), 0, dtype=np.uint8)
                pixels[:, :, label] = 200 + i
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i:04}.jpg")
    return tmp_path


@pytest.mark.parametrize(("image_size", "cache"), [(32, True), (32, False), (80, False)])
def test_image_folder_gives_square_batches_with_the_right_labels(folder: Path, image_size: int, cache: bool) -> None:
    data = ImageFolderData(str(folder), image_size=image_size, batch_size=32, cache=cache)
    images, labels = _train_batch(data)
    evaluated, eval_labels = next(iter(data.val_dataloader()))

    assert data.num_classes == 3
    assert images.shape == (18, 3, image_size, image_size)
    assert images.mean(dim=(2, 3)).argmax(dim=1).tolist() == labels.tolist()
    assert evaluated.mean(dim=(2, 3)).argmax(dim=1).tolist() == eval_labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_cached_and_uncached_evaluation_images_are_equal(folder: Path) -> None:
    cached = ImageFolderData(str(folder), image_size=16, cache=True)
    plain = ImageFolderData(str(folder), image_size=16)
    cached.setup("test"), plain.setup("test")

    for ours, theirs in zip(cached.test_dataloader(), plain.test_dataloader(), strict=True):
        assert torch.allclose(ours[0], theirs[0], atol=1e-6)  # the order of two float32 operations


def test_image_folder_can_be_limited_per_class(folder: Path) -> None:
    data = ImageFolderData(str(folder), image_size=32, limit_per_class=2, limit_eval_per_class=1)
    data.setup("fit")
    assert (len(data.train_set), len(data.eval_set)) == (6, 3)


def test_absent_split_is_explained(folder: Path) -> None:
    data = ImageFolderData(str(folder), val_split="test", image_size=32)
    with pytest.raises(FileNotFoundError, match=r"<root>/test/.*found there: train, val.*`val_split`"):
        data.setup("fit")


def test_splits_must_have_the_same_classes(folder: Path) -> None:
    (folder / "val" / "cat").rename(folder / "val" / "dog")
    with pytest.raises(ValueError, match="got 3 and 3; only one of them has cat, dog"):
        ImageFolderData(str(folder), image_size=32).setup("fit")


def test_large_images_are_not_kept_in_memory() -> None:
    with pytest.raises(ValueError, match="at most 64 pixels: got 224"):
        ImageFolderData("anywhere", cache=True)


def test_an_image_has_at_least_eight_pixels_a_side() -> None:
    with pytest.raises(ValueError, match="got 4"):
        ImageFolderData("anywhere", image_size=4)
