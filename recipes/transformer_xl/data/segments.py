"""An ordered stream of tokens in rows: batch s holds the segment s of every row.

row 0 | a b c d | e f g h | i j k l | m        tokens a, b, c, ... in their order, T = 4
row 1 | n o p q | r s t u | v w x y | z        targets are one token later
        batch 0   batch 1   batch 2
"""

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler


class Segments(Dataset[tuple[Tensor, Tensor]]):
    """The batches of one process; item s is ``(inputs, targets)``, int64 ``(batch_size, T)``.

    Args:
        tokens: the stream, of any integer type; it may be mapped from a file.
        tgt_len: T.
        batch_size: rows of this process.
        replicas: processes that read rows of their own; the stream is cut into ``batch_size * replicas`` rows.
        replica: which of them this is.
        keep_last: add a last, shorter segment where there is one.
        what: the stream's name, for the error.

    Raises:
        ValueError: if the rows are shorter than one segment and the token after it.
    """

    def __init__(
        self,
        tokens: Tensor,
        tgt_len: int,
        batch_size: int,
        replicas: int = 1,
        replica: int = 0,
        keep_last: bool = False,
        what: str = "text",
    ) -> None:
        rows = batch_size * replicas
        self.length, self.tgt_len = len(tokens) // rows, tgt_len
        if self.length < tgt_len + 1:
            fit = max(0, len(tokens) // rows - 1)
            raise ValueError(
                f"The {what} text must have at least {rows * (tgt_len + 1):,} tokens for {rows} rows of segments of "
                f"{tgt_len}: got {len(tokens):,}. Use more text, fewer rows (`batch_size`, `eval_batch_size`, devices), or "
                f"segments of at most {fit}."
            )
        whole, rest = divmod(self.length - 1, tgt_len)
        self._steps = whole + (keep_last and rest > 0)
        self._rows = tokens[: rows * self.length].view(rows, self.length)[
            replica * batch_size : (replica + 1) * batch_size
        ]

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        start = step * self.tgt_len
        block = self._rows[:, start : min(start + self.tgt_len, self.length - 1) + 1].long()
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()


class InOrder(DistributedSampler[Any]):
    """All items in order; it counts as distributed, so that Lightning leaves it alone: rows are shared out already.

    Args:
        data: the items.
    """

    def __init__(self, data: Any) -> None:
        super().__init__(data, num_replicas=1, rank=0, shuffle=False)
