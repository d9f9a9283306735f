"""A class-balanced, repeatable subset for small studies."""

import torch
from torch import Tensor


def balanced_subset(labels: Tensor, per_class: int | None, seed: int) -> Tensor:
    """Choose ``per_class`` examples of every class.

    Args:
        labels: shape ``(N,)``, int64.
        per_class: examples a class, at least 1; ``None`` takes everything.
        seed: the same seed gives the same subset on every rank and in every run.

    Returns:
        Sorted indices into ``labels``, shape ``(classes * per_class,)``, int64.

    Raises:
        ValueError: if ``per_class`` is below 1, or a class has fewer examples.
    """
    if per_class is None:
        return torch.arange(len(labels))
    if per_class < 1:
        raise ValueError(f"The limit per class must be at least 1: got {per_class}. Use `null` for no limit.")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        if len(members) < per_class:
            raise ValueError(
                f"The limit per class must be at most the size of the smallest class: got {per_class}, and class "
                f"{int(label)} has {len(members)} examples. Lower it, or use `null` for no limit."
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return torch.cat(chosen).sort().values
