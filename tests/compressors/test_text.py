"""Compressors from text: every known form, and every way to get it wrong."""

from __future__ import annotations

import pytest

from lightning_distopt.compressors import Dense, TopK, parse
from lightning_distopt.compressors.text import KNOWN, as_compressor


@pytest.mark.parametrize("name", KNOWN)
def test_every_listed_example_is_readable(name: str) -> None:
    assert parse(KNOWN[name].example) is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("topk:0.01", "TopK(ratio=0.01)"),
        ("topk:1", "TopK(ratio=1.0)"),
        ("topk:1e-3", "TopK(ratio=0.001)"),
        ("topk", "TopK(ratio=0.01)"),
        ("sign", "ScaledSign()"),
        ("scaled_sign", "ScaledSign()"),
        ("random_block:0.015625", "RandomBlock(ratio=0.015625)"),
        ("dense", "Dense(dtype='float32')"),
        ("dense:bfloat16", "Dense(dtype='bfloat16')"),
        ("none", "Dense(dtype='float32')"),
        ("bingrad", "BinGradB(bucket_size=2048, threshold='mean')"),
        ("bingrad_b:threshold=exact", "BinGradB(bucket_size=2048, threshold='exact')"),
        ("bingrad_pb:bucket_size=none", "BinGradPB(bucket_size=None)"),
        ("orq:9, bucket_size=512, clip=2.5", "ORQ(levels=9, bucket_size=512, clip=2.5)"),
        ("qsgd:3,norm=l2", "QSGD(levels=3, norm='l2', bucket_size=2048, clip=None)"),
        ("terngrad", "TernGrad(clip=2.5, bucket_size=None)"),
        ("linear:grid=quantile", "LinearQuantizer(levels=5, grid='quantile', bucket_size=2048, clip=None)"),
        ("onebit", "OneBit()"),
        ("fp32", "Dense(dtype='float32')"),
        ("fp16", "Dense(dtype='float16')"),
        ("bf16", "Dense(dtype='bfloat16')"),
        ("float32", "Dense(dtype='float32')"),
        ("float16", "Dense(dtype='float16')"),
        ("bfloat16", "Dense(dtype='bfloat16')"),
        ("powersgd", "PowerSGD(rank=2)"),
        ("PowerSGD:4", "PowerSGD(rank=4)"),
        ("signsgd", "SignSGD()"),
    ],
)
def test_a_text_builds_what_it_names(text: str, expected: str) -> None:
    assert repr(parse(text)) == expected


@pytest.mark.parametrize("text", [" TopK:0.5 ", "topk: 0.5", "topk :0.5"])
def test_case_and_spaces_do_not_matter(text: str) -> None:
    assert repr(parse(text)) == "TopK(ratio=0.5)"


@pytest.mark.parametrize("text", ["tokp:0.01", "", ":", "demo", "topk 0.01"])
def test_an_unknown_name_is_refused_with_all_known_forms(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be one of") as caught:
        parse(text)
    assert all(repr(form.example) in str(caught.value) for form in KNOWN.values())
    assert f"got {text!r}" in str(caught.value)


@pytest.mark.parametrize("name", ["topk", "random_block"])
@pytest.mark.parametrize(
    ("ratio", "value"), [("0", "0.0"), ("-1", "-1.0"), ("1.5", "1.5"), ("nan", "nan"), ("inf", "inf")]
)
def test_a_ratio_outside_its_range_is_refused_with_value_and_rule(name: str, ratio: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"`ratio` must be in \(0, 1\].*got {value}"):
        parse(f"{name}:{ratio}")


@pytest.mark.parametrize("argument", ["abc", "True", "1%", "0.1:0.2", ""])
def test_an_unreadable_ratio_is_refused_with_an_example(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"'{argument.lower()}' is not a number.*'topk:0.01'"):
        parse(f"topk:{argument}")


@pytest.mark.parametrize("text", ["sign:2", "bf16:1", "float32:float16", "sign:", "signsgd:1"])
def test_a_superfluous_argument_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(ValueError, match=rf"takes no argument: got '{text}'\. Write '"):
        parse(text)


@pytest.mark.parametrize(("text", "known"), [("orq:5,size=3", "levels, bucket_size, clip"), ("sign:scale=1", "none")])
def test_an_unknown_option_is_refused_with_the_known_ones(text: str, known: str) -> None:
    with pytest.raises(ValueError, match=rf"has no option '(size|scale)': it takes {known}\."):
        parse(text)


@pytest.mark.parametrize("text", ["orq:5,levels=3", "topk:0.1,ratio=0.2", "orq:levels=3,levels=5"])
def test_an_argument_that_is_said_twice_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"twice: write each once, for example '(orq:5|topk:0.01)'"):
        parse(text)


@pytest.mark.parametrize("name", ["int8", ""])
def test_an_unknown_dense_format_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'float32', 'float16', 'bfloat16'.*got '{name}'"):
        parse(f"dense:{name}")


def test_a_compressor_stays_itself() -> None:
    compressor = TopK(0.1)
    assert as_compressor(compressor) is compressor


def test_a_text_becomes_a_compressor() -> None:
    assert isinstance(as_compressor("bf16"), Dense)


@pytest.mark.parametrize("value", [None, 0.01, TopK])
def test_anything_else_is_refused_by_kind(value: object) -> None:
    with pytest.raises(TypeError, match=rf"got {type(value).__name__}"):
        as_compressor(value)  # type: ignore[arg-type]
