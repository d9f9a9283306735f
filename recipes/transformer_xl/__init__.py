"""Transformer-XL: a language model that remembers, for one device and every pipeline; see ``docs/language_models.md``."""

from recipes.transformer_xl.context import Context
from recipes.transformer_xl.data import Enwik8, StandardLibrary, Text8, TextFile, WikiText
from recipes.transformer_xl.metrics import BitsPerCharacter, Perplexity, TokenLoss
from recipes.transformer_xl.module import TransformerXL
from recipes.transformer_xl.sampling import Sampling
from recipes.transformer_xl.schedule import WarmupCosine

__all__ = [
    "BitsPerCharacter",
    "Context",
    "Enwik8",
    "Perplexity",
    "Sampling",
    "StandardLibrary",
    "Text8",
    "TextFile",
    "TokenLoss",
    "TransformerXL",
    "WarmupCosine",
    "WikiText",
]
