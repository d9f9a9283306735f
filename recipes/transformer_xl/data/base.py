"""What the data modules share: ordered loaders over three streams of tokens and one vocabulary."""

from typing import Any, ClassVar

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_distopt import ResumableLoader
from lightning_distopt.strategies.checks import count
from recipes.transformer_xl.data.segments import InOrder, Segments
from recipes.transformer_xl.vocabulary import Vocabulary

_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}


class TokenData(LightningDataModule):
    """Ordered segments of a text; subclasses fill vocabulary and streams in :meth:`load`.

    A text is cut into as many rows as all processes together have in a batch; each process reads rows of its own. In training
    a last segment that is shorter is left out, in evaluation it counts by its tokens.

    Args:
        tgt_len: tokens of a segment in training, at least 1.
        batch_size: rows of ONE process in training, at least 1.
        eval_tgt_len: tokens of a segment in evaluation; ``null`` is ``tgt_len``.
        eval_batch_size: rows of one process in evaluation; ``null`` is ``batch_size``.
        prompt: what ``distopt predict`` begins with, at least one symbol; ``null`` is an end of a line, or a blank where
            there are none.

    Attributes:
        vocabulary: of the text, or of the checkpoint that is loaded.
        streams: tokens by split, "train", "val" and "test".
    """

    vocabulary: Vocabulary
    first: ClassVar[str] = "\n"

    def __init__(
        self,
        tgt_len: int = 64,
        batch_size: int = 16,
        eval_tgt_len: int | None = None,
        eval_batch_size: int | None = None,
        prompt: str | None = None,
    ) -> None:
        super().__init__()
        self.tgt_len, self.batch_size = count("tgt_len", tgt_len, 1), count("batch_size", batch_size, 1)
        self.eval_tgt_len = tgt_len if eval_tgt_len is None else count("eval_tgt_len", eval_tgt_len, 1)
        self.eval_batch_size = batch_size if eval_batch_size is None else count("eval_batch_size", eval_batch_size, 1)
        if prompt == "":
            raise ValueError("`prompt` must have at least one symbol: got ''. Leave it out for an end of a line.")
        self.prompt = self.first if prompt is None else prompt
        self.streams: dict[str, Tensor] = {}

    def load(self) -> tuple[Vocabulary, dict[str, Tensor]]:
        """Return the vocabulary and the streams "train", "val" and "test"; called once in every process."""
        raise NotImplementedError(f"`{type(self).__name__}.load` must return a vocabulary and three streams of tokens.")

    def setup(self, stage: str) -> None:
        """Read the text on first use and see that it is long enough.

        Raises:
            ValueError: if a stream of this stage is too short for its rows.
        """
        if not self.streams:
            self.vocabulary, self.streams = self.load()
        for split in self.splits_of(stage):
            self._segments(split)

    def adopt(self, vocabulary: Vocabulary) -> None:
        """Read the text with another vocabulary, that of a checkpoint.

        Raises:
            ValueError: if the text has symbols outside of it.
        """
        if vocabulary != self.vocabulary:
            stage = self.trainer.state.fn if self.trainer is not None else "fit"
            for split in self.splits_of(str(getattr(stage, "value", stage))):
                what = f"The text of {type(self).__name__} ({split})"
                self.streams[split] = self.vocabulary.translated(self.streams[split], vocabulary, what)
            self.vocabulary = vocabulary

    @staticmethod
    def splits_of(stage: str) -> tuple[str, ...]:
        """Return the streams that a stage of Lightning reads."""
        return _SPLITS[stage]

    def row_length(self, split: str) -> int:
        """Return the tokens of one row."""
        return self._segments(split).length

    def train_dataloader(self) -> DataLoader[Any]:
        """Segments in order; memories go from each to the next."""
        segments = self._segments("train")
        return ResumableLoader(segments, batch_size=None, sampler=InOrder(segments))

    def val_dataloader(self) -> DataLoader[Any]:
        """Segments in order."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Segments in order."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """One batch with one row: the prompt."""
        return DataLoader([self._prompt()], batch_size=None)  # type: ignore[arg-type]

    def _evaluation(self, split: str) -> DataLoader[Any]:
        segments = self._segments(split)
        return DataLoader(segments, batch_size=None, sampler=InOrder(segments))

    def _segments(self, split: str) -> Segments:
        if not self.streams:
            raise RuntimeError(f"`{type(self).__name__}.setup` must run before its loaders are asked for.")
        replicas = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        train = split == "train"
        return Segments(
            self.streams[split],
            self.tgt_len if train else self.eval_tgt_len,
            self.batch_size if train else self.eval_batch_size,
            replicas.get("num_replicas", 1),
            replicas.get("rank", 0),
            keep_last=not train,
            what={"train": "training", "val": "validation"}.get(split, split),
        )

    def _prompt(self) -> Tensor:
        return self.vocabulary.encode(self.prompt)[None]
