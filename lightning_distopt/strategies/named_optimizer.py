"""Optimizer state by parameter name: taken apart by stages, put together again in the order of the whole model.

A saved state is that of ``configure_optimizers`` on one device: numbered in the order of its parameter groups, with the names
beside (``param_names``). So it loads on one device, under any strategy, and into any other number of stages.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Layout", "keep_only", "layout_of", "load_state", "merge_states", "own_state"]

Layout = list[list[str]]
"""Names of the parameters of each group, in order, of the whole model."""


def layout_of(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> Layout:
    """Return the names of the parameters in each group.

    Raises:
        KeyError: for a parameter without a name.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups
    return [[names[p] for p in group["params"]] for group in groups]


def keep_only(optimizer: Optimizer, own: Collection[nn.Parameter]) -> None:
    """Take all other parameters out of an optimizer; groups and their settings stay, even if empty."""
    mine = set(own)
    for group in optimizer.param_groups:
        kept = [index for index, p in enumerate(group["params"]) if p in mine]
        if "param_names" in group:
            group["param_names"][:] = [group["param_names"][index] for index in kept]
        foreign = [p for p in group["params"] if p not in mine]
        group["params"][:] = [group["params"][index] for index in kept]
        for parameter in foreign:
            optimizer.state.pop(parameter, None)


def own_state(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """Return this stage's part: state by name, and the settings of each group, on the CPU."""
    found: dict[Any, Any] = optimizer.state
    settings = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in optimizer.param_groups]
    state = {names[p]: {k: _to_cpu(v) for k, v in s.items()} for p, s in found.items() if p in names}
    return {"state": state, "groups": settings}


def merge_states(parts: Sequence[Mapping[str, Any]], layout: Layout) -> dict[str, Any]:
    """Return the state of the whole model's optimizer; the settings are those of the first part."""
    number = {name: index for index, name in enumerate(name for group in layout for name in group)}
    merged = {number[name]: values for part in parts for name, values in part["state"].items()}
    groups, begin = [], 0
    for settings, names in zip(parts[0]["groups"], layout, strict=True):
        groups.append({**settings, "params": list(range(begin, begin + len(names))), "param_names": list(names)})
        begin += len(names)
    return {"state": dict(sorted(merged.items())), "param_groups": groups}


def load_state(
    optimizer: Optimizer, saved: Mapping[str, Any], names: Mapping[nn.Parameter, str], layout: Layout
) -> None:
    """Load this stage's part of a whole model's state, by name, or by number where it was saved without names.

    Raises:
        ValueError: if it is the state of another model.
    """
    groups = saved["param_groups"]
    numbered: dict[str, int] = {}
    for group, mine in zip(groups, layout, strict=False):
        known = group.get("param_names", mine)
        numbered.update(zip(known, group["params"], strict=False))
    count = sum(len(group["params"]) for group in groups)
    wanted = [name for group in layout for name in group]
    if len(groups) != len(layout) or count != len(wanted) or any(name not in numbered for name in wanted):
        raise ValueError(
            "The optimizer state in the checkpoint must be that of the same parameters: got "
            f"{count} in {len(groups)} groups for {len(wanted)} in {len(layout)}. Load the weights alone, or use the same model."
        )
    own = optimizer.state_dict()
    begin = 0
    state: dict[int, Any] = {}
    for index, (group, theirs) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        for offset, parameter in enumerate(group["params"]):
            entry = saved["state"].get(numbered[names[parameter]])
            if entry is not None:
                state[begin + offset] = entry
        begin += len(group["params"])
        settings = {k: v for k, v in theirs.items() if k not in ("params", "param_names")}
        own["param_groups"][index].update(settings)
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


def _to_cpu(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
