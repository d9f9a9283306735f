"""Black boxes: sparse classification, universal perturbations, fine-tuning by queries; see the README of this folder."""

from recipes.black_box.attack import UniversalAttack
from recipes.black_box.classifier import DigitClassifier
from recipes.black_box.data import AttackData, LibsvmData, MnistData, TextData
from recipes.black_box.sparse import SparseClassifier
from recipes.black_box.transformer import FineTuning, Transformer, TransformerLM

__all__ = [
    "AttackData",
    "DigitClassifier",
    "FineTuning",
    "LibsvmData",
    "MnistData",
    "SparseClassifier",
    "TextData",
    "Transformer",
    "TransformerLM",
    "UniversalAttack",
]
