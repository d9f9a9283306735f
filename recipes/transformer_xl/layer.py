"""One layer of Transformer-XL, with a memory of its own inputs or without."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.transformer_xl.attention import distance_encoding, relative_attention, visible
from recipes.transformer_xl.context import Context

INIT_STD = 0.02


class RelativeLayer(nn.Module):
    """Relative attention and a feed-forward net, each added to its input and normalised (post-norm).

    Queries, keys, values, encodings and outputs are projected without biases. The encoding of distances is made anew in every
    layer, with a dropout of its own: in a pipeline each layer may be on another device.

    Args:
        d_model: numbers a token, even.
        n_head: attention heads.
        d_head: numbers a head.
        d_inner: hidden numbers of the feed-forward net.
        dropout: of the encodings, of both nets' outputs and inside of the feed-forward net.
        dropatt: of the attention weights.
        context: how far back tokens look in training.
        eval_context: how far back they look in evaluation.

    Attributes:
        content_bias: u, and
        position_bias: v of the paper, both ``(n_head, d_head)``; layers may share them.

    Source: arXiv:1901.02860.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        d_head: int,
        d_inner: int,
        dropout: float,
        dropatt: float,
        context: Context,
        eval_context: Context,
    ) -> None:
        super().__init__()
        self.n_head, self.d_head, self.d_model = n_head, d_head, d_model
        self.dropatt, self.context, self.eval_context = dropatt, context, eval_context
        heads = n_head * d_head
        self.qkv = nn.Linear(d_model, 3 * heads, bias=False)
        self.positions = nn.Linear(d_model, heads, bias=False)
        self.output = nn.Linear(heads, d_model, bias=False)
        self.content_bias = nn.Parameter(torch.empty(n_head, d_head))
        self.position_bias = nn.Parameter(torch.empty(n_head, d_head))
        self.attention_norm = nn.LayerNorm(d_model)
        self.inner = nn.Linear(d_model, d_inner)
        self.outer = nn.Linear(d_inner, d_model)
        self.inner_norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from N(0, 0.02), those of the norms from N(1, 0.02); biases are 0."""
        for linear in (self.qkv, self.positions, self.output, self.inner, self.outer):
            nn.init.normal_(linear.weight, 0.0, INIT_STD)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for norm in (self.attention_norm, self.inner_norm):
            nn.init.normal_(norm.weight, 1.0, INIT_STD)
            nn.init.zeros_(norm.bias)
        for bias in (self.content_bias, self.position_bias):
            nn.init.normal_(bias, 0.0, INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer makes of a segment by itself; both of shape ``(B, T, d_model)``."""
        return self.transform(x, x)

    @property
    def lengths(self) -> Context:
        """The context of training or of evaluation, whichever goes on."""
        return self.context if self.training else self.eval_context

    def transform(self, x: Tensor, seen: Tensor) -> Tensor:
        """Return what the layer makes of the segment ``x``, the last T of all tokens ``seen``."""
        x = self.attention_norm(x + self.dropout(self.attend(x, seen)))
        hidden = self.dropout(F.relu(self.inner(x)))
        normalised: Tensor = self.inner_norm(x + self.dropout(self.outer(hidden)))
        return normalised

    def attend(self, x: Tensor, seen: Tensor) -> Tensor:
        """Return what each token of ``x`` gathers from those ``seen``, the last of which it is itself."""
        lengths, tokens, keys = self.lengths, x.shape[1], seen.shape[1]
        heads = self.n_head * self.d_head
        q = F.linear(x, self.qkv.weight[:heads])
        k, v = F.linear(seen, self.qkv.weight[heads:]).chunk(2, dim=-1)
        encoding = distance_encoding(keys, self.d_model, lengths.clamp_len, x.device).to(x.dtype)
        r = self.positions(self.dropout(encoding)).view(keys, self.n_head, self.d_head).transpose(0, 1)
        attended = relative_attention(
            self._heads(q),
            self._heads(k),
            self._heads(v),
            r,
            self.content_bias,
            self.position_bias,
            visible(tokens, keys, lengths.mem_len if lengths.same_length else None, x.device),
            self.dropatt if self.training else 0.0,
        )
        gathered: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return gathered

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_head, self.d_head)).transpose(1, 2)


class MemoryLayer(RelativeLayer):
    """The same, which also sees the inputs that it had for the segments before (a ``StatefulLayer``).

    The state is the last ``mem_len`` of its inputs, ``(B, up to mem_len, d_model)``, without graph. It starts empty, and rows of
    the batch are rows of the state: row b of a batch must go on where row b of the one before ended.
    """

    def initial_state(self, x: Tensor) -> Tensor:
        """Return an empty memory for inputs like ``x``."""
        return x.new_zeros(x.shape[0], 0, self.d_model)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the output and the new memory."""
        mem_len = self.lengths.mem_len
        seen = torch.cat([memory.to(x.dtype), x], dim=1)
        kept = seen[:, max(0, seen.shape[1] - mem_len) :].detach()
        # A copy, so that the rest of `seen` need not live as long as the memory.
        return self.transform(x, seen), kept.clone()
