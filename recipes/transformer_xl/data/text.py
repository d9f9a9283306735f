"""Texts that are read whole: a file of one's own, and the sources of Python's standard library."""

import gzip
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distopt.strategies.checks import choice, count
from recipes.text.data import CHARACTERS, standard_library_text
from recipes.transformer_xl.data.base import TokenData
from recipes.transformer_xl.vocabulary import Vocabulary, pieces

Level = Literal["characters", "words"]


class TextFile(TokenData):
    """A text file, its last parts for validation and test.

    Args:
        path: of the text, UTF-8, plain or gzip (``.gz``).
        level: tokens are characters, or words with an end of line.
        held_out: share of the text for validation, and as much again for the test, above 0 and below 1/2.
        **lengths: see :class:`TokenData`.

    Raises:
        FileNotFoundError: if there is no such file; when data are asked for.
        ValueError: if it is empty, not UTF-8, or too short.
    """

    def __init__(self, path: str, level: Level = "characters", held_out: float = 0.05, **lengths: Any) -> None:
        super().__init__(**lengths)
        self.path, self.level, self.held_out = Path(path), choice("level", level, Level), held_out
        if not 0 < held_out < 0.5:
            raise ValueError(f"`held_out` must be above 0 and below 0.5: got {held_out}. 0.05 is the default.")

    def load(self) -> tuple[Vocabulary, dict[str, Tensor]]:
        text = read_text(self.path)
        vocabulary, tokens = character_tokens(text) if self.level == "characters" else word_tokens(text)
        return vocabulary, three_parts(tokens, self.held_out)


class StandardLibrary(TokenData):
    """The sources of Python's standard library, module by module, as ASCII (what is outside becomes a blank).

    Nothing is downloaded. The text depends on the version of Python, its alphabet of 128 does not.

    Args:
        characters: of text to use, at least 1,000; Python 3.11 has 4.7 million.
        held_out: share of the text for validation, and as much again for the test, above 0 and below 1/2.
        **lengths: see :class:`TokenData`.
    """

    def __init__(self, characters: int = 4_000_000, held_out: float = 0.05, **lengths: Any) -> None:
        super().__init__(**lengths)
        self.characters, self.held_out = count("characters", characters, 1000), held_out
        if not 0 < held_out < 0.5:
            raise ValueError(f"`held_out` must be above 0 and below 0.5: got {held_out}. 0.05 is the default.")

    def load(self) -> tuple[Vocabulary, dict[str, Tensor]]:
        vocabulary = Vocabulary([chr(code) for code in range(CHARACTERS)], "characters")
        return vocabulary, three_parts(standard_library_text(self.characters), self.held_out)


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is empty or not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"`path` must be a text file: there is no '{path}'. Give an existing one, plain or .gz."
        )
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if not data:
        raise ValueError(f"`path` must have text: '{path}' is empty. Give another file.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"`path` must be UTF-8: '{path}' is not, at byte {error.start:,}. Convert it.") from None


def character_tokens(text: str) -> tuple[Vocabulary, Tensor]:
    """Return the characters of a text in the order of their numbers, and the tokens, int32."""
    codes = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    known, tokens = codes.unique(return_inverse=True)
    return Vocabulary([chr(code) for code in known.tolist()], "characters"), tokens.int()


def word_tokens(text: str) -> tuple[Vocabulary, Tensor]:
    """Return the words of a text, the most frequent first, and the tokens, int32."""
    words = pieces(text, "words")
    vocabulary = Vocabulary.by_frequency(Counter(words))
    return vocabulary, torch.tensor([vocabulary.tokens[word] for word in words], dtype=torch.int32)


def three_parts(tokens: Tensor, held_out: float) -> dict[str, Tensor]:
    """Return the streams of training, validation and test, in the order of the text."""
    part = int(len(tokens) * held_out)
    sizes = [len(tokens) - 2 * part, part, part]
    return dict(zip(("train", "val", "test"), tokens.split(sizes), strict=True))
