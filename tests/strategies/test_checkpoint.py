"""Files beside a checkpoint: written whole or not at all, found again through links, removed without a trace."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from lightning_distopt.strategies.checkpoint import (
    forget_other_saves,
    forget_save,
    read_sidecar,
    remove_sidecars,
    saves_of,
    write_sidecar,
)
from lightning_distopt.strategies.random_states import collect_random_states, restore_random_states

CONTENT = {"rank": 1, "state": {"weight": torch.arange(3.0)}, "names": ["a", "b"], "none": None}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "model.ckpt")
    write_sidecar(path, "s", 1, CONTENT)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")] == [
        "new/model.ckpt.ranks",
        "new/model.ckpt.ranks/s/1.pt",
    ]
    content = read_sidecar(path, "s", 1)
    assert torch.equal(content.pop("state")["weight"], CONTENT["state"]["weight"])
    assert content == {name: value for name, value in CONTENT.items() if name != "state"}


def test_writing_again_replaces(tmp_path: Path) -> None:
    path = str(tmp_path / "model.ckpt")
    for rank in (1, 2):
        write_sidecar(path, "s", 0, {"rank": rank})
    assert read_sidecar(path, "s", 0) == {"rank": 2}


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "model.ckpt")
    write_sidecar(path, "s", 0, {"rank": 1})

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_sidecar(path, "s", 0, {"rank": 2})
    assert read_sidecar(path, "s", 0) == {"rank": 1}


def test_a_part_of_a_buffer_is_not_saved_with_all_of_it(tmp_path: Path) -> None:
    buffer = torch.zeros(1000)
    path = str(tmp_path / "model.ckpt")
    write_sidecar(path, "s", 0, {"a": buffer[:500], "b": buffer[500:]})
    assert (tmp_path / "model.ckpt.ranks" / "s" / "0.pt").stat().st_size < 4000 + 2500  # the buffer once


def test_a_link_leads_to_the_sidecars_of_its_target(tmp_path: Path) -> None:
    target, link = tmp_path / "a" / "model.ckpt", tmp_path / "last.ckpt"
    write_sidecar(str(target), "s", 0, {"rank": 0})
    target.touch()
    link.symlink_to(Path("a") / "model.ckpt")
    assert read_sidecar(str(link), "s", 0) == {"rank": 0}


def test_removing_takes_everything_and_may_find_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "model.ckpt")
    for rank in (0, 1):
        write_sidecar(path, "s", rank, {"rank": rank})
    remove_sidecars(path)
    assert list(tmp_path.iterdir()) == []
    remove_sidecars(path)


def test_a_checkpoint_that_is_a_folder(tmp_path: Path) -> None:
    write_sidecar(f"{tmp_path}/model.ckpt/", "s", 0, {"rank": 0})
    assert read_sidecar(f"{tmp_path}/model.ckpt", "s", 0) == {"rank": 0}


def test_remote_paths() -> None:
    path = "memory://sidecars/model.ckpt"
    write_sidecar(path, "s", 0, {"rank": 0})
    assert read_sidecar(path, "s", 0) == {"rank": 0}
    remove_sidecars(path)
    with pytest.raises(FileNotFoundError):
        read_sidecar(path, "s", 0)


def test_random_states_are_plain_values_and_restore_all_generators(tmp_path: Path) -> None:
    def draw() -> tuple[float, ...]:
        return (float(torch.rand(())), random.random(), random.gauss(0, 1), float(numpy.random.randn()))

    draw()  # leaves half a pair of gaussian numbers in two of the generators
    write_sidecar(str(tmp_path / "model.ckpt"), "s", 0, collect_random_states())
    drawn = [draw() for _ in range(3)]
    restore_random_states(read_sidecar(str(tmp_path / "model.ckpt"), "s", 0))
    assert [draw() for _ in range(3)] == drawn


def test_a_new_save_is_beside_the_old_one_until_that_is_forgotten(tmp_path: Path) -> None:
    path = str(tmp_path / "model.ckpt")
    for save in ("old", "new"):
        for rank in (0, 1):
            write_sidecar(path, save, rank, {"save": save})
    assert saves_of(path) == {"old": {0, 1}, "new": {0, 1}}
    forget_other_saves(path, "new")
    assert saves_of(path) == {"new": {0, 1}}
    assert read_sidecar(path, "new", 1) == {"save": "new"}
    forget_save(path, "new")
    assert list(tmp_path.iterdir()) == []
    forget_save(path, "new")
    forget_other_saves(path)
    assert saves_of(path) == {}


def test_a_save_over_a_link_leaves_the_sidecars_of_its_target_alone(tmp_path: Path) -> None:
    target, link = tmp_path / "model.ckpt", tmp_path / "last.ckpt"
    write_sidecar(str(target), "old", 0, {"of": "the target"})
    target.touch()
    link.symlink_to(target)
    write_sidecar(str(link), "new", 0, {"of": "the link"})
    forget_other_saves(str(link), "new")
    assert saves_of(str(link)) == saves_of(str(target)) == {"old": {0}}
    link.unlink()
    link.touch()
    assert saves_of(str(link)) == {"new": {0}}
