"""Ordered texts as data modules."""

from recipes.transformer_xl.data.base import TokenData
from recipes.transformer_xl.data.official import Enwik8, Text8, WikiText
from recipes.transformer_xl.data.text import StandardLibrary, TextFile

__all__ = ["Enwik8", "StandardLibrary", "Text8", "TextFile", "TokenData", "WikiText"]
