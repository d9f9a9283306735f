"""What tokens mean: bytes, characters or words."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distopt.strategies.checks import choice

Kind = Literal["bytes", "characters", "words"]
END_OF_LINE, UNKNOWN = "<eos>", "<unk>"


class Vocabulary:
    """Symbols by token.

    Args:
        symbols: text of each token, all different. A byte is the character of its number.
        kind: of the symbols.
    """

    def __init__(self, symbols: Sequence[str], kind: Kind) -> None:
        self.symbols, self.kind = tuple(symbols), choice("kind", kind, Kind)
        self.tokens = {symbol: token for token, symbol in enumerate(self.symbols)}

    def __len__(self) -> int:
        return len(self.symbols)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (self.kind, self.symbols) == (other.kind, other.symbols)

    def __hash__(self) -> int:
        return hash((self.kind, self.symbols))

    @classmethod
    def by_frequency(cls, counts: Counter[str]) -> "Vocabulary":
        """Return the vocabulary of counted words: the end of a line, then the most frequent first (of equals, the first met)."""
        words = [word for word, _ in counts.most_common() if word != END_OF_LINE]
        return cls([END_OF_LINE, *words], "words")

    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text, int64 of shape ``(n,)``.

        Raises:
            ValueError: if there are symbols outside the vocabulary, with the first of them.
        """
        symbols = pieces(text, self.kind)
        stand_in = self.tokens.get(UNKNOWN) if self.kind == "words" else None
        self.check((s for s in symbols if s not in self.tokens and stand_in is None), "The text")
        return torch.tensor([self.tokens.get(s, stand_in) for s in symbols], dtype=torch.int64)

    def check(self, outside: Iterable[str], what: str) -> None:
        """Raise for symbols outside the vocabulary, if there are any.

        Raises:
            ValueError: naming the first ten of them.
        """
        distinct = sorted(set(outside))
        if distinct:
            shown = ", ".join(map(repr, distinct[:10])) + (", ..." if len(distinct) > 10 else "")
            raise ValueError(
                f"{what} has {len(distinct)} {self.kind} outside the vocabulary of {len(self)}: {shown}. Remove them from the "
                "text, or train on text that has them."
            )

    def decode(self, tokens: Tensor) -> str:
        """Return the text of tokens ``(n,)``."""
        symbols = [self.symbols[token] for token in tokens.tolist()]
        if self.kind == "words":
            return " ".join(symbols).replace(f"{END_OF_LINE} ", "\n").replace(END_OF_LINE, "\n")
        text = "".join(symbols)
        return text.encode("latin-1").decode("utf-8", "replace") if self.kind == "bytes" else text

    def translated(self, tokens: Tensor, other: "Vocabulary", what: str) -> Tensor:
        """Return what tokens of this vocabulary are in another one; needs room for a copy.

        Raises:
            ValueError: if they are of another kind, or have symbols that are not there.
        """
        if other.kind != self.kind:
            raise ValueError(
                f"{what} has {self.kind} and the checkpoint was trained on {other.kind}. Give it text of that kind."
            )
        used = torch.bincount(tokens.flatten().int(), minlength=len(self)) > 0
        stand_in = other.tokens.get(UNKNOWN, -1) if self.kind == "words" else -1
        table = [other.tokens.get(symbol, stand_in) for symbol in self.symbols]
        other.check((s for s, t, u in zip(self.symbols, table, used.tolist(), strict=True) if u and t < 0), what)
        return torch.tensor(table, dtype=torch.int32)[tokens.int()]

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {"kind": self.kind, "symbols": list(self.symbols)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Vocabulary":
        """Return the vocabulary that :meth:`state` described."""
        return cls(state["symbols"], state["kind"])


def pieces(text: str, kind: Kind) -> list[str]:
    """Return the symbols of a text; words end with blanks, and lines with a word of their own."""
    if kind == "characters":
        return list(text)
    if kind == "bytes":
        return list(text.encode().decode("latin-1"))
    lines = text.split("\n")
    return [word for i, line in enumerate(lines) for word in [*([END_OF_LINE] if i else []), *line.split()]]
