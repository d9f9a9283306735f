"""Kernels for GPUs, written in Triton: the names, arguments and results of the CPU kernels, on tensors that stay there.

A program works on one tile of about 2048 elements: some whole buckets, or a part of one. What is asked of a bucket that
is longer than a tile is found in two stages, tile by tile and then over tiles by torch. So no result depends on the order
in which programs end, every run gives the same bits, and nothing waits for the GPU: scales and levels never visit the host.
Against the CPU kernels, only sums are taken in another order, all but those of BinGrad-pb in float64.
"""

import torch

from lightning_distopt.compressors.kernels.cuda.codes import add_levels_, encode_binary, round_randomly
from lightning_distopt.compressors.kernels.cuda.largest import scatter_add_, select_largest
from lightning_distopt.compressors.kernels.cuda.levels import optimal_levels
from lightning_distopt.compressors.kernels.cuda.magnitudes import best_magnitudes
from lightning_distopt.compressors.kernels.cuda.packing import pack, unpack
from lightning_distopt.compressors.kernels.cuda.signs import absolute_sum, add_signs_, encode_signs
from lightning_distopt.compressors.kernels.cuda.statistics import deviations, largest_magnitudes, lengths, ranges
from lightning_distopt.compressors.kernels.cuda.steps import displace_

__all__ = [
    "absolute_sum",
    "add_levels_",
    "add_signs_",
    "best_magnitudes",
    "deviations",
    "displace_",
    "encode_binary",
    "encode_signs",
    "largest_magnitudes",
    "lengths",
    "optimal_levels",
    "pack",
    "ranges",
    "round_randomly",
    "scatter_add_",
    "select_largest",
    "unpack",
]

if torch.cuda.is_available():
    # What a first launch lacks (a C compiler, a newer GPU) shows here, not in the middle of a fit.
    try:
        absolute_sum(torch.ones(1, device="cuda"))
    except Exception as error:
        raise RuntimeError(f"a first kernel failed with {type(error).__name__}: {error}") from error
