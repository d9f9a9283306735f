"""Language models over characters; see the docstrings of :class:`CharModel` and :class:`StandardLibraryText`."""

from recipes.text.data import StandardLibraryText
from recipes.text.module import CharModel

__all__ = ["CharModel", "StandardLibraryText"]
