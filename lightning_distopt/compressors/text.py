"""Compressors by name, for strings on the command line and in YAML: ``"topk:0.01"``, ``"sign"``, ``"bf16"``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

from lightning_distopt.compressors.base import Compressor
from lightning_distopt.compressors.bin_grad_b import BinGradB
from lightning_distopt.compressors.bin_grad_pb import BinGradPB
from lightning_distopt.compressors.dense import Dense
from lightning_distopt.compressors.linear import LinearQuantizer
from lightning_distopt.compressors.one_bit import OneBit
from lightning_distopt.compressors.orq import ORQ
from lightning_distopt.compressors.qsgd import QSGD
from lightning_distopt.compressors.random_block import RandomBlock
from lightning_distopt.compressors.scaled_sign import ScaledSign
from lightning_distopt.compressors.specifications import PowerSGD, SignSGD, Specification
from lightning_distopt.compressors.terngrad import TernGrad
from lightning_distopt.compressors.topk import TopK

__all__ = ["KNOWN", "as_compressor", "parse"]


class _Form(NamedTuple):
    make: Callable[..., Compressor | Specification]
    argument: Callable[[str], object] | None  # how to read what follows the colon; None: nothing may follow
    example: str


KNOWN: dict[str, _Form] = {
    "topk": _Form(TopK, float, "topk:0.01"),
    "sign": _Form(ScaledSign, None, "sign"),
    "random_block": _Form(RandomBlock, float, "random_block:0.01"),
    "bingrad_b": _Form(BinGradB, None, "bingrad_b"),
    "bingrad_pb": _Form(BinGradPB, None, "bingrad_pb"),
    "orq": _Form(ORQ, int, "orq:5"),
    "qsgd": _Form(QSGD, int, "qsgd:5"),
    "terngrad": _Form(TernGrad, None, "terngrad"),
    "linear": _Form(LinearQuantizer, int, "linear:5"),
    "onebit": _Form(OneBit, None, "onebit"),
    "dense": _Form(Dense, str, "dense:float32"),
    "fp32": _Form(lambda: Dense("float32"), None, "fp32"),
    "fp16": _Form(lambda: Dense("float16"), None, "fp16"),
    "bf16": _Form(lambda: Dense("bfloat16"), None, "bf16"),
    "powersgd": _Form(PowerSGD, int, "powersgd:2"),
    "signsgd": _Form(SignSGD, None, "signsgd"),
}
_ALIASES = {
    "scaled_sign": "sign",
    "bingrad": "bingrad_b",
    "none": "fp32",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
}


def parse(text: str) -> Compressor | Specification:
    """Build a compressor (or a specification, such as PowerSGD's) from a text.

    Forms: ``"name"``, ``"name:number"``, ``"name:option=value"``, ``"name:number,option=value"``.

    Raises:
        TypeError: for something that is not a text.
        ValueError: for an unknown name (the known ones are listed), a missing, superfluous or unreadable argument.

    Example:
        >>> parse("topk:0.01")
        TopK(ratio=0.01)
        >>> parse("orq:9,bucket_size=512")
        ORQ(levels=9, bucket_size=512, clip=None)
    """
    if not isinstance(text, str):
        raise TypeError(f"`compressor` must be a text such as 'topk:0.01': got {text!r}. Use for example 'sign'.")
    name, colon, arguments = (part.strip() for part in text.lower().partition(":"))
    form = KNOWN.get(_ALIASES.get(name, name))
    if form is None:
        known = ", ".join(f"'{known.example}'" for known in KNOWN.values())
        raise ValueError(f"`compressor` must be one of {known} (or a `Compressor`): got {text!r}.")
    if not colon:
        return form.make()
    first, *rest = (argument.strip() for argument in arguments.split(","))
    given = [first, *rest] if "=" in first else rest
    options = dict(_option(name, form, argument) for argument in given)
    taken = None if "=" in first else next(iter(inspect.signature(form.make).parameters), None)
    if len(options) < len(given) or taken in options:
        twice = taken if taken in options else "an option"
        raise ValueError(f"`compressor={text!r}` says {twice} twice: write each once, for example {form.example!r}.")
    if "=" in first:
        return form.make(**options)
    if form.argument is None:
        raise ValueError(f"`compressor={name!r}` takes no argument: got {text!r}. Write {form.example!r}.")
    try:
        value = form.argument(first)
    except ValueError as error:
        raise ValueError(
            f"`compressor={text!r}`: {first!r} is not a number. Write for example {form.example!r}."
        ) from error
    return form.make(value, **options)


def _option(name: str, form: _Form, argument: str) -> tuple[str, object]:
    """Read one ``option=value``; what is neither a number nor ``none`` stays text."""
    option, _, value = (part.strip() for part in argument.partition("="))
    known = list(inspect.signature(form.make).parameters)
    if option not in known:
        raise ValueError(
            f"`compressor={name!r}` has no option {option!r}: it takes {', '.join(known) or 'none'}. Write for example "
            f"{form.example!r}."
        )
    for read in (int, float):
        try:
            return option, read(value)
        except ValueError:
            continue
    return option, None if value == "none" else value


def as_compressor(compressor: Compressor | Specification | str) -> Compressor | Specification:
    """Return a compressor as it is, or the one that a text names.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(compressor, (Compressor, Specification)):
        return compressor
    if isinstance(compressor, str):
        return parse(compressor)
    raise TypeError(
        f"`compressor` must be a `Compressor` or a text such as 'topk:0.01': got {type(compressor).__name__}. "
        "Use for example `compressor=TopK(0.01)`."
    )
