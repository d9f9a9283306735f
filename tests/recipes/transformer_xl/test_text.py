"""Texts become ordered rows of tokens; official sizes are asserted; tokens are encoded once and mapped."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.transformer_xl import Enwik8, StandardLibrary, Text8, TextFile, WikiText
from recipes.transformer_xl.data.segments import Segments
from recipes.transformer_xl.vocabulary import Vocabulary
from tests.recipes.transformer_xl.models import Letters


@given(st.integers(2, 200), st.integers(1, 5), st.integers(1, 3), st.integers(1, 9))
def test_segments_are_the_rows_in_order_and_targets_one_token_later(
    size: int, rows: int, replicas: int, length: int
) -> None:
    tokens = torch.arange(size)
    if size // (rows * replicas) < length + 1:
        with pytest.raises(ValueError, match="must have at least"):
            Segments(tokens, length, rows, replicas)
        return
    whole = []
    for replica in range(replicas):
        for keep_last in (False, True):
            data = Segments(tokens, length, rows, replicas, replica, keep_last)
            parts = [data[step] for step in range(len(data))]
        assert all(torch.equal(y, x + 1) for x, y in parts)
        assert all(x.shape == (rows, length) for x, _ in parts[:-1])
        whole.append(torch.cat([parts[0][0][:, :1], *(y for _, y in parts)], dim=1))
    assert torch.equal(torch.cat(whole).flatten(), tokens[: size // (rows * replicas) * rows * replicas])


def test_training_drops_the_short_segment_and_evaluation_keeps_it() -> None:
    assert [len(Segments(torch.arange(24), 5, 2, keep_last=keep)) for keep in (False, True)] == [2, 3]
    assert Segments(torch.arange(24), 5, 2, keep_last=True)[2][0].tolist() == [[10], [22]]


def test_lengths_that_do_not_fit_are_refused_with_the_numbers() -> None:
    data = Letters(size=100, tgt_len=24, batch_size=4, eval_tgt_len=6)
    with pytest.raises(
        ValueError, match=r"must have at least 100 tokens for 4 rows of segments of 24: got 50.*at most 11"
    ):
        Segments(torch.arange(50), 24, 4)
    data.setup("fit")
    assert (data.row_length("train"), data.row_length("val")) == (25, 12)
    with pytest.raises(
        ValueError, match="The validation text must have at least 52 tokens for 4 rows of segments of 12"
    ):
        Letters(size=100, tgt_len=12, batch_size=4).setup("fit")
    with pytest.raises(ValueError, match="`tgt_len` must be an integer >= 1: got 0"):
        Letters(tgt_len=0)
    with pytest.raises(ValueError, match="`prompt` must have at least one symbol"):
        Letters(prompt="")


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_is_read_as_characters(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("text.gz" if packed else "text")
    text = "Grüße, 世界\n" * 40
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    data = TextFile(str(path), held_out=0.1, tgt_len=5, batch_size=2, prompt="Grüße")
    data.setup("fit")
    assert "".join(data.vocabulary.symbols) == "".join(sorted(set(text)))
    assert [len(data.streams[split]) for split in ("train", "val", "test")] == [320, 40, 40]
    assert "".join(data.vocabulary.decode(data.streams[split]) for split in ("train", "val", "test")) == text
    assert data.vocabulary.decode(next(iter(data.predict_dataloader()))[0]) == "Grüße"


def test_words_have_an_end_of_line_and_the_most_frequent_come_first(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("b b b a\n\nc a\n" * 20)
    data = TextFile(str(path), level="words", tgt_len=3, batch_size=1)
    data.setup("fit")
    assert data.vocabulary.symbols == ("<eos>", "b", "a", "c")
    assert data.streams["train"][:9].tolist() == [1, 1, 1, 2, 0, 0, 3, 2, 0]
    assert data.vocabulary.decode(torch.tensor([1, 2, 0, 3])) == "b a \nc"


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no '.*nothing'"):
        TextFile(str(tmp_path / "nothing")).setup("fit")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty' is empty"):
        TextFile(str(tmp_path / "empty")).setup("fit")
    (tmp_path / "binary").write_bytes(b"ab\xff\xfe")
    with pytest.raises(ValueError, match="binary' is not, at byte 2"):
        TextFile(str(tmp_path / "binary")).setup("fit")
    with pytest.raises(ValueError, match=r"`held_out` must be above 0 and below 0\.5: got 0\.5"):
        TextFile("x", held_out=0.5)


def test_the_standard_library_needs_nothing() -> None:
    data = StandardLibrary(characters=20_000, tgt_len=16, batch_size=2)
    data.setup("fit")
    assert len(data.vocabulary) == 128
    assert [len(data.streams[split]) for split in ("train", "val", "test")] == [18_000, 1_000, 1_000]
    assert "import" in data.vocabulary.decode(data.streams["train"][:10_000])


def test_characters_outside_of_another_vocabulary_are_named(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("abcd" * 50)
    data = TextFile(str(path), tgt_len=4, batch_size=1, prompt="a")
    data.setup("fit")
    data.adopt(Vocabulary("dcba!", "characters"))
    assert data.streams["train"][:4].tolist() == [3, 2, 1, 0]
    with pytest.raises(ValueError, match=r"\(train\) has 2 characters outside the vocabulary of 2: 'b', 'c'"):
        data.adopt(Vocabulary("ad", "characters"))
    with pytest.raises(ValueError, match="has characters and the checkpoint was trained on words"):
        data.adopt(Vocabulary(["a"], "words"))
    with pytest.raises(ValueError, match="The text has 1 characters outside the vocabulary of 2: 'é'"):
        Vocabulary("ab", "characters").encode("abé")


def test_bytes_are_shown_as_text() -> None:
    vocabulary = Vocabulary([chr(code) for code in range(256)], "bytes")
    assert vocabulary.decode(vocabulary.encode("é!")) == "é!"
    assert vocabulary.encode("é").tolist() == [0xC3, 0xA9]


class _Small8(Text8):
    size, held_out, distinct = 4000, 200, 3


class _Small9(Enwik8):
    size, held_out, distinct = 4000, 200, 3


@pytest.mark.parametrize("packed", [False, True])
def test_official_bytes_are_split_and_mapped(tmp_path: Path, packed: bool) -> None:
    text = b"ab " * 1333 + b"a"
    if packed:
        with zipfile.ZipFile(tmp_path / "text8.zip", "w") as archive:
            archive.writestr("text8", text)
    else:
        (tmp_path / "text8").write_bytes(text)
    data = _Small8(str(tmp_path), str(tmp_path / "cache"), tgt_len=8, batch_size=4)
    data.prepare_data()
    (key,) = (tmp_path / "cache").iterdir()
    about = (key / "about.json").stat().st_mtime_ns
    data.setup("fit")
    assert (key / "about.json").stat().st_mtime_ns == about  # encoded once
    assert [len(data.streams[s]) for s in ("train", "val", "test")] == [3600, 200, 200]
    assert data.streams["train"].dtype == torch.uint8
    assert data.vocabulary.decode(data.streams["train"]).encode() == text[:3600]
    assert data.vocabulary.decode(data.streams["test"]).encode() == text[-200:]


def test_enwik8_leaves_ends_of_lines_out(tmp_path: Path) -> None:
    (tmp_path / "enwik8").write_bytes(b"a\nb\xff" * 1000)
    data = _Small9(str(tmp_path), str(tmp_path / "cache"), tgt_len=8, batch_size=4, prompt="a")
    data.setup("fit")
    assert data.vocabulary.symbols == ("a", "b", "\xff")
    assert [len(data.streams[s]) for s in ("train", "val", "test")] == [2700, 150, 150]


def test_texts_that_are_not_the_official_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'enwik8' or 'enwik8.zip': there is none in"):
        Enwik8(str(tmp_path)).setup("fit")
    (tmp_path / "enwik8").touch()
    with pytest.raises(ValueError, match="is empty"):
        Enwik8(str(tmp_path), str(tmp_path / "cache")).setup("fit")
    (tmp_path / "enwik8").write_bytes(b"abc" * 100)
    with pytest.raises(ValueError, match=r"enwik8 must have 100,000,000 bytes: got 300 from"):
        Enwik8(str(tmp_path), str(tmp_path / "cache")).setup("fit")
    (tmp_path / "text8").write_bytes(b"abcd" * 1000)
    with pytest.raises(ValueError, match="text8 must have 3 different symbols: got 4"):
        _Small8(str(tmp_path), str(tmp_path / "cache")).setup("fit")
    assert not list((tmp_path / "cache").iterdir())  # nothing half written
    data = Enwik8(str(tmp_path), str(tmp_path / "cache"), check_sizes=False, tgt_len=2, batch_size=1, prompt="a")
    data.setup("fit")
    assert [len(data.streams[s]) for s in ("train", "val", "test")] == [270, 15, 15]


def test_wikitext_is_counted_in_words_with_ends_of_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text(" \n = Title = \n a a <unk> b \n")
    (tmp_path / "wiki.test.tokens").write_text(" a new \n")
    with pytest.raises(ValueError, match="WikiText-103 must have 267,735 different words: got 6"):
        WikiText(str(tmp_path), cache=str(tmp_path / "cache")).setup("fit")
    monkeypatch.setitem(WikiText.counts, "103", (10, 10, 4, 6))
    with pytest.raises(ValueError, match="WikiText-103 must have 4 test tokens: got 3"):
        WikiText(str(tmp_path), cache=str(tmp_path / "cache")).setup("fit")
    monkeypatch.setitem(WikiText.counts, "103", (10, 10, 3, 6))
    data = WikiText(str(tmp_path), cache=str(tmp_path / "cache"), tgt_len=3, batch_size=1)
    data.setup("fit")
    assert data.vocabulary.symbols == ("<eos>", "=", "a", "Title", "<unk>", "b")
    assert data.streams["test"].tolist() == [2, 4, 0]  # a word that training has not seen
    assert data.streams["train"].tolist() == [0, 1, 3, 1, 0, 2, 2, 4, 5, 0]
    with pytest.raises(ValueError, match="`version` must be one of '103', '2': got '104'"):
        WikiText(str(tmp_path), version="104")
