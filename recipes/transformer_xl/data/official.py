"""The benchmarks of language models, from a folder with their official files: nothing is downloaded.

enwik8, text8     `enwik8` or `enwik8.zip`, `text8` or `text8.zip` (mattmahoney.net): 100,000,000 bytes, the last 5 and 5 million
                  of them for validation and test
WikiText          `wiki.{train,valid,test}.tokens`, or `{train,valid,test}.txt`, plain or .gz; one line a paragraph
"""

import gzip
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_distopt.strategies.checks import choice
from recipes.transformer_xl.data.base import TokenData
from recipes.transformer_xl.data.cache import SPLITS, cached, key_of
from recipes.transformer_xl.vocabulary import END_OF_LINE, UNKNOWN, Vocabulary

Append = Callable[[str, Tensor], None]
_LINES = 50_000  # encoded at a time


class OfficialText(TokenData):
    """Official files of a folder, encoded once and mapped into memory.

    Args:
        folder: with the files.
        cache: folder for the tokens, of about the size of the text (four times that of characters for words).
        check_sizes: refuse files whose sizes are not the official ones; ``false`` is for parts of them.
        **lengths: see :class:`TokenData`.

    Raises:
        FileNotFoundError: if a file is missing; when data are asked for.
        ValueError: if a file has another size, or text of another number of tokens, than the official one.
    """

    title: ClassVar[str] = ""

    def __init__(self, folder: str, cache: str = "runs/tokens", check_sizes: bool = True, **lengths: Any) -> None:
        super().__init__(**lengths)
        self.folder, self.cache, self.check_sizes = Path(folder), Path(cache), check_sizes

    def files(self) -> list[Path]:
        """Return the files that the tokens are made from."""
        raise NotImplementedError(f"`{type(self).__name__}.files` must return the files of the text.")

    def write(self, append: Append) -> Vocabulary:
        """Encode the files; see :func:`cached`."""
        raise NotImplementedError(f"`{type(self).__name__}.write` must encode the files.")

    def prepare_data(self) -> None:
        """Encode the text, once a machine."""
        self.load()

    def load(self) -> tuple[Vocabulary, dict[str, Tensor]]:
        files = self.files()
        for file in files:
            if not file.stat().st_size:
                raise ValueError(f"`folder` must have the official text: '{file}' is empty. Download it again.")
        key = key_of(self.title, files, check_sizes=self.check_sizes)
        return cached(self.cache, key, self.write)

    def _found(self, *names: str) -> Path:
        for name in names:
            if (self.folder / name).is_file():
                return self.folder / name
        raise FileNotFoundError(
            f"`folder` must have {' or '.join(map(repr, names))}: there is none in '{self.folder}'. Download {self.title} and "
            "give its folder."
        )

    def _check(self, what: str, got: int, wanted: int) -> None:
        if self.check_sizes and got != wanted:
            raise ValueError(
                f"{self.title} must have {wanted:,} {what}: got {got:,} from '{self.folder}'. Download it again, or set "
                "`check_sizes: false` for a part of it."
            )


class _HundredMillion(OfficialText):
    """A file of one hundred million bytes, each of them a token."""

    size: ClassVar[int] = 100_000_000
    held_out: ClassVar[int] = 5_000_000
    distinct: ClassVar[int] = 0
    left_out: ClassVar[int | None] = None
    first: ClassVar[str] = " "

    def files(self) -> list[Path]:
        return [self._found(self.title, f"{self.title}.zip")]

    def write(self, append: Append) -> Vocabulary:
        (file,) = self.files()
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                data = archive.read(self.title)
        else:
            data = file.read_bytes()
        self._check("bytes", len(data), self.size)
        codes = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        held = self.held_out if self.check_sizes else len(codes) // 20
        parts = [part if self.left_out is None else part[part != self.left_out] for part in _cut(codes, held)]
        there = torch.zeros(256, dtype=torch.bool)
        for part in parts:
            there |= torch.bincount(part, minlength=256) > 0
        known = there.nonzero().squeeze(1)
        self._check("different symbols", len(known), self.distinct)
        table = torch.zeros(256, dtype=torch.uint8)
        table[known] = torch.arange(len(known), dtype=torch.uint8)
        for split, part in zip(SPLITS, parts, strict=True):
            for piece in part.split(1 << 24):
                append(split, table[piece.int()])
        return Vocabulary([chr(code) for code in known.tolist()], "bytes")


class Enwik8(_HundredMillion):
    """The first hundred million bytes of Wikipedia, as bytes: 204 different ones.

    Ends of lines are left out, as the common preparation of this benchmark does; with them there would be 205.

    Args:
        folder: with ``enwik8`` or ``enwik8.zip``.
        **options: see :class:`OfficialText`.
    """

    title, distinct, left_out = "enwik8", 204, ord("\n")


class Text8(_HundredMillion):
    """The same text in the letters a to z and blanks: 27 different ones.

    Args:
        folder: with ``text8`` or ``text8.zip``.
        **options: see :class:`OfficialText`.
    """

    title, distinct = "text8", 27


class WikiText(OfficialText):
    """WikiText-103 or WikiText-2, as words with an end of each line, the most frequent first.

    Args:
        folder: with the three files.
        version: "103" or "2".
        **options: see :class:`OfficialText`.
    """

    counts: ClassVar[dict[str, tuple[int, int, int, int]]] = {
        "103": (103_227_021, 217_646, 245_569, 267_735),
        "2": (2_088_628, 217_646, 245_569, 33_278),
    }

    def __init__(self, folder: str, version: Literal["103", "2"] = "103", **options: Any) -> None:
        super().__init__(folder, **options)
        self.version = choice("version", version, Literal["103", "2"])
        self.title = f"WikiText-{version}"  # type: ignore[misc]

    def files(self) -> list[Path]:
        return [
            self._found(f"wiki.{split}.tokens", *(f"{split}.txt{end}" for end in ("", ".gz")))
            for split in ("train", "valid", "test")
        ]

    def write(self, append: Append) -> Vocabulary:
        files = dict(zip(SPLITS, self.files(), strict=True))
        counts: Counter[str] = Counter()
        # WikiText-2 is small, and its vocabulary is commonly that of all three parts; WikiText-103's is the training part's.
        for split in SPLITS if self.version == "2" else SPLITS[:1]:
            for words in _lines(files[split]):
                counts.update(words)
        vocabulary = Vocabulary.by_frequency(counts)
        self._check("different words", len(vocabulary), self.counts[self.version][3])
        stand_in = vocabulary.tokens.get(UNKNOWN)
        for number, split in enumerate(SPLITS):
            total, part = 0, list[int]()
            for words in _lines(files[split]):
                if stand_in is None:
                    vocabulary.check((w for w in words if w not in vocabulary.tokens), f"'{files[split]}'")
                part += [vocabulary.tokens.get(word, stand_in) for word in words]  # type: ignore[misc]
                if len(part) > 20 * _LINES:
                    append(split, torch.tensor(part, dtype=torch.int32))
                    total, part = total + len(part), []
            append(split, torch.tensor(part, dtype=torch.int32))
            self._check(f"{split} tokens", total + len(part), self.counts[self.version][number])
        return vocabulary


def _cut(codes: Tensor, held: int) -> tuple[Tensor, Tensor, Tensor]:
    train, val, test = codes.split([len(codes) - 2 * held, held, held])
    return train, val, test


def _lines(path: Path) -> Iterator[list[str]]:
    """Return the words of each line and its end."""
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")  # noqa: SIM115
    with opened as file:
        for line in file:
            yield [*line.split(), END_OF_LINE]
