"""How far back a token may look."""

from dataclasses import dataclass

from lightning_distopt.strategies.checks import count, flag


@dataclass(frozen=True)
class Context:
    """Lengths of the attention, in tokens.

    Args:
        mem_len: hidden states that each layer remembers of the segments before, at least 0.
        clamp_len: distances above it get the position encoding of this distance, at least 1; ``null`` clamps none. Training
            on short contexts knows no encoding of long distances, so evaluation with a longer memory wants it.
        same_length: let every token see the same number of tokens, ``mem_len`` with itself, instead of all that are there.

    Raises:
        ValueError: for a length outside its range, or ``same_length`` without a memory.
    """

    mem_len: int = 0
    clamp_len: int | None = None
    same_length: bool = False

    def __post_init__(self) -> None:
        count("mem_len", self.mem_len, 0)
        if self.clamp_len is not None:
            count("clamp_len", self.clamp_len, 1)
        if flag("same_length", self.same_length) and not self.mem_len:
            raise ValueError(
                "`same_length=True` shows each token as many tokens as the memory has: got `mem_len=0`, which leaves none. Set "
                "`mem_len`, or leave `same_length` out."
            )
