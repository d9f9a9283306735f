"""What replicas do not have in common goes into one checkpoint and out again, into as many replicas or others."""

from __future__ import annotations

import torch

from lightning_distopt.strategies.replica_state import merge_parts, state_for


def test_each_replica_gets_back_its_own_and_others_the_mean() -> None:
    def part(value: float, name: str, **more: int) -> dict[str, object]:
        return {"residuals": {name: torch.full((2,), value)}, "queries": {}, "rounds": {name: 3}, **more}

    saved = merge_parts(
        [(0, part(1.0, "a", random=7)), (0, part(2.0, "b")), (1, part(3.0, "a")), (1, part(6.0, "b"))], 2
    )
    assert {name: float(e[0]) for name, e in state_for(saved, 1, 2)["residuals"].items()} == {"a": 3.0, "b": 6.0}
    assert state_for(saved, 0, 2)["random"] == 7
    for replica in range(3):
        found = state_for(saved, replica, 3)
        assert {name: float(e[0]) for name, e in found["residuals"].items()} == {"a": 2.0, "b": 4.0}
        assert found["rounds"] == {"a": 3, "b": 3}
        assert "random" not in found
    assert state_for([], 0, 2) == {}
