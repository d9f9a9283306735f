"""Images for the ResNet recipe: digits that need no download, CIFAR in the official format, any image folder."""

from recipes.resnet.data.base import ImageData
from recipes.resnet.data.cifar import CifarData
from recipes.resnet.data.digits import DigitsData
from recipes.resnet.data.image_folder import ImageFolderData

__all__ = ["CifarData", "DigitsData", "ImageData", "ImageFolderData"]
