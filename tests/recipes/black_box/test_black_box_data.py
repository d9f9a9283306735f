"""Readers of LIBSVM and idx files, on files written here."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch

from recipes.black_box import LibsvmData, TextData
from recipes.black_box.data import read_idx, read_libsvm


def test_libsvm_lines_become_rows(tmp_path: Path) -> None:
    text = "+1 1:0.5 3:1\n\n-1 2:2 \n0\n"
    (tmp_path / "plain").write_text(text)
    (tmp_path / "packed.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("plain", "packed.gz"):
        features, labels = read_libsvm(tmp_path / name)
        assert features.tolist() == [[0.5, 0.0, 1.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
        assert labels.tolist() == [1.0, -1.0, 0.0]
    assert read_libsvm(tmp_path / "plain", 5)[0].shape == (3, 5)
    with pytest.raises(ValueError, match="got 2 for 3"):
        read_libsvm(tmp_path / "plain", 2)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_libsvm(tmp_path / "nowhere")
    (tmp_path / "bad").write_text("1 1:1\n1 a:2\n")
    with pytest.raises(ValueError, match="Line 2"):
        read_libsvm(tmp_path / "bad")


def test_a_part_of_the_samples_is_chosen_once(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("".join(f"{i % 2} 1:{i}\n" for i in range(50)))
    parts = []
    for _ in range(2):
        data = LibsvmData(str(tmp_path / "data"), str(tmp_path / "data"), limit=10, steps=3)
        data.setup("fit")
        assert data.train_set is not None
        parts.append(data.train_set.tensors)
        assert set(parts[-1][1].tolist()) == {-1.0, 1.0}
        assert len(data.train_dataloader()) == 3
        assert len(next(iter(data.val_dataloader()))[1]) == 50
    assert torch.equal(parts[0][0], parts[1][0])


def write_idx(path: Path, tensor: torch.Tensor) -> None:
    head = struct.pack(">HBB", 0, 8, tensor.dim()) + struct.pack(f">{tensor.dim()}I", *tensor.shape)
    path.write_bytes(gzip.compress(head + tensor.numpy().tobytes()))


def test_idx_files_become_tensors(tmp_path: Path) -> None:
    tensor = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    write_idx(tmp_path / "a.gz", tensor)
    assert torch.equal(read_idx(tmp_path / "a.gz"), tensor)
    whole = gzip.decompress((tmp_path / "a.gz").read_bytes())
    (tmp_path / "short").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="60 bytes"):
        read_idx(tmp_path / "short")
    (tmp_path / "other").write_bytes(b"\x01" + whole[1:])
    with pytest.raises(ValueError, match="magic"):
        read_idx(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "nowhere")


def test_text_becomes_windows(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(97, 107)) * 20 + b"\xff")
    data = TextData(str(tmp_path / "text"), length=10, steps=2, limit=5)
    data.setup("fit")
    assert data.parts is not None
    assert [len(part) for part in data.parts] == [5, 2]
    assert data.parts[0][0][0].tolist() == list(range(97, 107))
    assert len(data.train_dataloader()) == 2
