"""Tokens on disk: encoded once, mapped into memory by every process.

    <cache>/<key>/about.json       vocabulary, sizes, type
    <cache>/<key>/{train,val,test}.bin

A folder appears whole or not at all.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.transformer_xl.vocabulary import Vocabulary

SPLITS = ("train", "val", "test")


def key_of(name: str, files: list[Path], **settings: Any) -> str:
    """Return a name that changes with the files' sizes and times and with the settings."""
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files], sorted(settings.items())
    return f"{name}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def cached(
    folder: Path, key: str, make: Callable[[Callable[[str, Tensor], None]], Vocabulary]
) -> tuple[Vocabulary, dict[str, Tensor]]:
    """Return vocabulary and mapped streams, which ``make`` writes on first use.

    Args:
        folder: of all caches.
        key: of this one.
        make: called with ``append(split, tokens)``, which it calls with parts of the streams in order; returns the vocabulary.
    """
    home = folder / key
    if not (home / "about.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            part = Path(name) / "part"
            _write(part, make)
            try:
                os.replace(part, home)
            except OSError:  # another process was faster, or an older one left a part
                if not (home / "about.json").is_file():
                    shutil.rmtree(home)
                    os.replace(part, home)
    about = json.loads((home / "about.json").read_text())
    dtype = torch.uint8 if about["bytes"] == 1 else torch.int32
    streams = {
        split: torch.from_file(str(home / f"{split}.bin"), shared=False, size=size, dtype=dtype)
        for split, size in about["sizes"].items()
    }
    return Vocabulary.from_state(about["vocabulary"]), streams


def _write(home: Path, make: Callable[[Callable[[str, Tensor], None]], Vocabulary]) -> None:
    home.mkdir()
    sizes, widths = dict.fromkeys(SPLITS, 0), set()
    files = {split: open(home / f"{split}.bin", "wb") for split in SPLITS}  # noqa: SIM115

    def append(split: str, tokens: Tensor) -> None:
        widths.add(tokens.element_size())
        sizes[split] += len(tokens)
        files[split].write(tokens.contiguous().numpy().tobytes())

    try:
        vocabulary = make(append)
    finally:
        for file in files.values():
            file.close()
    (width,) = widths
    about = {"vocabulary": vocabulary.state(), "sizes": sizes, "bytes": width}
    (home / "about.json").write_text(json.dumps(about))
