"""Text from a model: draw the next token, show it to the model, draw again."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distopt.strategies.checks import count


@dataclass(frozen=True)
class Sampling:
    """How ``distopt predict`` writes text.

    Args:
        length: tokens to write after the prompt, at least 1.
        temperature: divides the logits; below 1 is bolder than the model, 0 takes the likeliest token.
        top_k: draw among so many likeliest tokens; 0 is all.
        seed: of the draws; the same seed writes the same text.

    Raises:
        ValueError: for a number outside its range.
    """

    length: int = 500
    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        count("length", self.length, 1)
        count("top_k", self.top_k, 0)
        count("seed", self.seed, 0)
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"`temperature` must be at least 0: got {self.temperature}. 1 draws as the model believes."
            )


def draw(log_prob: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Return one token a row, int64 ``(N,)``.

    Args:
        log_prob: log-probabilities ``(N, vocabulary)``.
        temperature: at least 0; 0 is the likeliest token.
        top_k: how many tokens are drawn from; 0 is all.
        generator: on the CPU.
    """
    if temperature == 0:
        return log_prob.argmax(dim=1)
    logits = log_prob.float().cpu() / temperature
    if 0 < top_k < logits.shape[1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator).squeeze(1).to(log_prob.device)


def continued(first: Tensor, after: Callable[[Tensor], Tensor], sampling: Sampling) -> Tensor:
    """Return the tokens that follow, int64 ``(N, length)``.

    Args:
        first: log-probabilities of the first of them, ``(N, vocabulary)``.
        after: shows the model one token a row, ``(N, 1)``, and returns the log-probabilities of the next.
        sampling: how to draw.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    written = [draw(first, sampling.temperature, sampling.top_k, generator)]
    while len(written) < sampling.length:
        written.append(draw(after(written[-1][:, None]), sampling.temperature, sampling.top_k, generator))
    return torch.stack(written, dim=1)
