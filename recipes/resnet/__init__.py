"""Residual networks on images: digits, CIFAR, ImageNet; see the README of this folder."""

from recipes.resnet.data import CifarData, DigitsData, ImageData, ImageFolderData
from recipes.resnet.layered import LayeredClassifier
from recipes.resnet.module import ImageClassifier

__all__ = ["CifarData", "DigitsData", "ImageClassifier", "ImageData", "ImageFolderData", "LayeredClassifier"]
