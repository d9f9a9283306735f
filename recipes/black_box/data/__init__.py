"""Readers of the formats that the data come in, and data modules over them."""

from recipes.black_box.data.idx import read_idx
from recipes.black_box.data.libsvm import LibsvmData, read_libsvm
from recipes.black_box.data.mnist import AttackData, MnistData
from recipes.black_box.data.text import TextData

__all__ = ["AttackData", "LibsvmData", "MnistData", "TextData", "read_idx", "read_libsvm"]
