"""Text that every Python brings along: the sources of its standard library, as characters."""

import sysconfig
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

CHARACTERS = 128
"""Size of the alphabet: ASCII; what is outside becomes a blank."""


def standard_library_text(characters: int) -> Tensor:
    """Return the first characters of the sources of the standard library, module by module; uint8, all below 128."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= characters:
            break
    codes = torch.frombuffer(text[:characters], dtype=torch.uint8)
    return codes.where(codes < CHARACTERS, ord(" "))


class StandardLibraryText(LightningDataModule):
    """Windows of the sources of Python's standard library, in alphabetical order of its modules.

    A batch is ``(inputs, targets)``, int64 of shape ``(N, length)``; targets are the inputs one character later. Every tenth
    window is kept for validation. The text depends on the version of Python; nothing is downloaded.

    Args:
        characters: of text to use, at least ``20 * length``.
        length: characters in a window, at least 2.
        batch_size: windows in a batch of ONE process, at least 1.
    """

    def __init__(self, characters: int = 400_000, length: int = 64, batch_size: int = 32) -> None:
        super().__init__()
        if length < 2 or batch_size < 1 or characters < 20 * length:
            raise ValueError(
                f"`length` must be at least 2, `batch_size` 1 and `characters` 20 * `length`: got {length}, {batch_size} and "
                f"{characters}. The defaults are 64, 32 and 400,000."
            )
        self.characters, self.length, self.batch_size = characters, length, batch_size
        self.windows: tuple[Tensor, Tensor] | None = None
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Read the text on first use."""
        if self.windows is not None:
            return
        codes = standard_library_text(self.characters + 1).long()
        count = (len(codes) - 1) // self.length
        inputs = codes[: count * self.length].view(count, self.length)
        targets = codes[1 : count * self.length + 1].view(count, self.length)
        self.windows = inputs, targets

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches."""
        return self._loader(True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches of the windows that training does not see, in order."""
        return self._loader(False)

    def _loader(self, train: bool) -> DataLoader[tuple[Tensor, ...]]:
        if self.windows is None:
            raise RuntimeError("`StandardLibraryText.setup` must run before its loaders are asked for.")
        kept = (torch.arange(len(self.windows[0])) % 10 != 0) == train
        data = TensorDataset(*(part[kept] for part in self.windows))
        return DataLoader(data, self.batch_size, shuffle=train)
