"""Transformer-XL as a chain of layers: one module for one device, ``ddp`` and every pipeline."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_distopt import LayeredModule
from lightning_distopt.strategies.checks import count, fraction
from recipes.scheduled import scheduled
from recipes.transformer_xl.context import Context
from recipes.transformer_xl.data import TokenData
from recipes.transformer_xl.embedding import TokenEmbedding
from recipes.transformer_xl.layer import MemoryLayer, RelativeLayer
from recipes.transformer_xl.metrics import BitsPerCharacter, Perplexity, TokenLoss
from recipes.transformer_xl.sampling import Sampling, continued
from recipes.transformer_xl.softmax import AdaptiveSoftmax
from recipes.transformer_xl.vocabulary import Vocabulary

_VOCABULARY = "transformer_xl_vocabulary"
ADAM = partial(torch.optim.Adam, lr=2.5e-4)
FIGURES: dict[str, type[TokenLoss]] = {"bpc": BitsPerCharacter, "perplexity": Perplexity}


class TransformerXL(LayeredModule):
    """A language model whose layers remember what they saw of the segments before.

    Layers: embedding, ``n_layer`` relative layers, a last dropout; the loss is the softmax. Batches are pairs of int64 tokens
    ``(B, T)`` from an ordered stream: row b goes on where row b of the batch before ended. Memories begin empty with each epoch,
    and validation has memories of its own.

    Logs ``train/loss``, ``val/loss`` and ``test/loss`` (nats a token), and bits a character or the perplexity.

    Args:
        vocabulary: number of tokens, as many as the data have.
        n_layer: layers, at least 1.
        d_model: numbers a token, even.
        n_head: attention heads.
        d_head: numbers a head.
        d_inner: hidden numbers of the feed-forward nets.
        dropout: in [0, 1].
        dropatt: of the attention weights, in [0, 1].
        context: how far back tokens look in training.
        eval_context: how far back they look in evaluation and sampling; ``null`` is as in training.
        d_embed: numbers of a frequent token; ``null`` is ``d_model``.
        cutoffs: of the adaptive softmax and the embedding, tokens in order of frequency; ``null`` is a plain softmax.
        div_val: by what the embedding of each further cluster is narrower, at least 1.
        tie_weight: use the embedding's tables in the softmax as well. ``false`` where first and last layer are on
            different devices (``dsp`` and its family; ``pipeline`` and ``ouroboros`` can keep the tie).
        tie_projs: for each cluster, tie its projection, too; ``null`` is all of them.
        bias_groups: pairs of biases u, v; contiguous layers share one. ``null`` is a pair for each layer, right wherever the
            layers go; 1 is a pair for all, as in the paper's code; with K stages of equal length, K is a pair for each stage.
        figure: what is logged beside the loss: ``bpc`` for characters, ``perplexity`` for words.
        sampling: how ``distopt predict`` writes text.
        optimizer: any torch optimizer by class, with its arguments and without the parameters.
        scheduler: any learning-rate scheduler by class; ``null`` keeps the rate constant.
        scheduler_interval: what the scheduler counts: optimizer ``step`` or ``epoch``.

    Raises:
        ValueError: for sizes that do not fit.

    Source: arXiv:1901.02860; ``docs/language_models.md`` lists the differences.
    """

    def __init__(
        self,
        vocabulary: int,
        n_layer: int = 12,
        d_model: int = 512,
        n_head: int = 8,
        d_head: int = 64,
        d_inner: int = 2048,
        dropout: float = 0.1,
        dropatt: float = 0.0,
        context: Context = Context(512),  # noqa: B008
        eval_context: Context | None = None,
        d_embed: int | None = None,
        cutoffs: list[int] | None = None,
        div_val: int = 1,
        tie_weight: bool = True,
        tie_projs: list[bool] | None = None,
        bias_groups: int | None = None,
        figure: Literal["bpc", "perplexity"] = "bpc",
        sampling: Sampling = Sampling(),  # noqa: B008
        optimizer: OptimizerCallable = ADAM,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["step", "epoch"] = "step",
    ) -> None:
        super().__init__()
        _check_sizes(vocabulary, n_layer, d_model, n_head, d_head, d_inner, div_val, bias_groups)
        fraction("dropout", dropout), fraction("dropatt", dropatt)
        self.context, self.eval_context = context, eval_context or context
        embedding = TokenEmbedding(vocabulary, d_model, d_embed or d_model, cutoffs or (), div_val, dropout)
        remembers = self.context.mem_len or self.eval_context.mem_len
        made = [
            (MemoryLayer if remembers else RelativeLayer)(
                d_model, n_head, d_head, d_inner, dropout, dropatt, self.context, self.eval_context
            )
            for _ in range(n_layer)
        ]
        _share_biases(made, n_layer if bias_groups is None else bias_groups)
        self.layers = nn.ModuleList([embedding, *made, nn.Dropout(dropout)])
        clusters = len(embedding.edges) - 1
        ties = [True] * clusters if tie_projs is None else tie_projs
        self.loss = AdaptiveSoftmax(embedding, tie_weight, ties)
        self.vocabulary, self.tie_weight, self.sampling = vocabulary, tie_weight, sampling
        self.figure = figure
        self.figures = nn.ModuleDict(
            {f"{stage}_{name}": kind() for stage in ("val", "test") for name, kind in self._kinds().items()}
        )
        self.symbols: Vocabulary | None = None
        self.optimizer, self.scheduler, self.scheduler_interval = optimizer, scheduler, scheduler_interval
        self.example_input_array = torch.zeros(2, 64, dtype=torch.int64)
        self.example_target_array = torch.zeros(2, 64, dtype=torch.int64)

    def _kinds(self) -> dict[str, type[TokenLoss]]:
        return {"loss": TokenLoss, self.figure: FIGURES[self.figure]}

    # ---- figures ----------------------------------------------------------------------------------------------------

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the number of tokens, by which batches count."""
        return {"tokens": torch.full((), float(target.numel()), device=target.device)}

    def log_figures(self, stage: str, figures: dict[str, Any], size: int) -> None:
        """Log the loss and the figure: of each step in training, over all tokens elsewhere."""
        loss: Tensor = figures["loss"].detach()
        if stage == "train":
            shown = loss / math.log(2) if self.figure == "bpc" else loss.exp()
            super().log_figures(stage, {"loss": loss, self.figure: shown}, size)
            return
        for name in self._kinds():
            metric: Any = self.figures[f"{stage}_{name}"]
            metric.update(loss, figures["tokens"])
            self.log(f"{stage}/{name}", metric, prog_bar=True, batch_size=size)

    def configure_optimizers(self) -> Any:
        """Build the optimizer over all parameters; a pipeline keeps each device's own."""
        return scheduled(self.optimizer(self.parameters()), self.scheduler, self.scheduler_interval)

    # ---- checks, before any step ------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compare the model with the data and the strategy.

        Raises:
            ValueError: if the data have rows that no memory can be filled from, or symbols that the model was not trained on.
            MisconfigurationException: if a tie would span devices, or if text is to be sampled in a pipeline.
        """
        placement = getattr(self.trainer.strategy, "placement", (0,))
        if stage == "predict" and len(placement) > 1:
            raise MisconfigurationException(
                f"Text is sampled by one process: got {type(self.trainer.strategy).__name__} with {len(placement)} stages. Use "
                "`--trainer.strategy=auto --trainer.devices=1`; any strategy's checkpoint loads there."
            )
        stale = hasattr(self.trainer.strategy, "plan")
        if stage == "fit" and stale and self.tie_weight and placement[0] != placement[-1]:
            raise MisconfigurationException(
                f"`tie_weight=True` shares a table between the first and the last layer, and "
                f"{type(self.trainer.strategy).__name__} has them on different devices, {placement[0]} and {placement[-1]}. Set "
                "`tie_weight: false`, or use `ouroboros`, which has both on one device."
            )
        data = self._data()
        if data is None:
            return
        if self.symbols is not None:
            data.adopt(self.symbols)
        for split, lengths in (("train", self.context), ("val", self.eval_context), ("test", self.eval_context)):
            length = data.row_length(split) if split in data.splits_of(stage) else None
            if length is not None and lengths.mem_len >= length:
                raise ValueError(
                    f"`mem_len` must be below the length of a row of text, or it is never full: got {lengths.mem_len} for rows "
                    f"of {length} tokens ({split}). Use a shorter memory, fewer rows (`batch_size`, `eval_batch_size`) or more "
                    "text."
                )

    def on_fit_start(self) -> None:
        """Take what the tokens mean from the data, where no checkpoint has said it.

        Raises:
            ValueError: if they have another number of tokens than the model.
        """
        data = self._data()
        if self.symbols is None and data is not None:
            self._take_symbols(data.vocabulary)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def _data(self) -> TokenData | None:
        try:
            data = getattr(self.trainer, "datamodule", None)
        except RuntimeError:  # no trainer
            return None
        return data if isinstance(data, TokenData) else None

    def _take_symbols(self, symbols: Vocabulary) -> None:
        if len(symbols) != self.vocabulary:
            raise ValueError(
                f"`vocabulary` must be the number of different tokens: got {self.vocabulary} for {len(symbols)} {symbols.kind}. "
                f"Set `--model.init_args.vocabulary={len(symbols)}`."
            )
        self.symbols = symbols

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the tokens mean."""
        if self.symbols is not None:
            checkpoint[_VOCABULARY] = self.symbols.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read the data with the checkpoint's tokens.

        Raises:
            ValueError: if the data have symbols that the checkpoint does not know, or its size is another.
        """
        state = checkpoint.get(_VOCABULARY)
        if state is None:
            return
        symbols = Vocabulary.from_state(state)
        self._take_symbols(symbols)
        data = self._data()
        if data is not None:
            data.adopt(symbols)

    # ---- text -------------------------------------------------------------------------------------------------------

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Forget the text before."""
        self.forget()

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Go on from the prompt and print the text."""
        written = self.write(outputs[:, -1])
        if self.symbols is None or not self.trainer.is_global_zero:
            return
        for row in torch.cat([batch, written], dim=1).cpu():
            print(self.symbols.decode(row))

    def write(self, hidden: Tensor) -> Tensor:
        """Return tokens ``(N, length)`` drawn one after the other, the first from these hidden states ``(N, d_model)``.

        The memories must be those of the text before.
        """
        assert isinstance(self.loss, AdaptiveSoftmax)
        log_prob = self.loss.log_prob
        return continued(log_prob(hidden), lambda token: log_prob(self(token)[:, -1]), self.sampling)


def _check_sizes(
    vocabulary: int,
    n_layer: int,
    d_model: int,
    n_head: int,
    d_head: int,
    d_inner: int,
    div_val: int,
    groups: int | None,
) -> None:
    sizes = {"n_layer": n_layer, "n_head": n_head, "d_head": d_head, "d_inner": d_inner, "div_val": div_val}
    for name, value in {"vocabulary": vocabulary, **sizes}.items():
        count(name, value, 2 if name == "vocabulary" else 1)
    if count("d_model", d_model, 2) % 2:
        raise ValueError(
            f"`d_model` must be even, half sines and half cosines: got {d_model}. Use {d_model + 1}, for example."
        )
    if groups is not None and not 1 <= count("bias_groups", groups, 1) <= n_layer:
        raise ValueError(
            f"`bias_groups` must be from 1 to the number of layers: got {groups} for {n_layer} layers. `null` is one a layer."
        )


def _share_biases(layers: Sequence[RelativeLayer], groups: int) -> None:
    """Let contiguous groups of layers, as equal as can be, have one pair of biases each."""
    firsts: dict[int, RelativeLayer] = {}
    for index, layer in enumerate(layers):
        first = firsts.setdefault(index * groups // len(layers), layer)
        layer.content_bias, layer.position_bias = first.content_bias, first.position_bias
