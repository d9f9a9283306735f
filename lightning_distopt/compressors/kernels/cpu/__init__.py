"""Kernels for the CPU, compiled by numba: each works through a tensor in blocks that stay in the first-level cache.

Loops are written so that the compiler turns them into vector instructions: one simple statement each, no branch, slices
instead of offsets (an index that may be negative costs a look). Non-finite values need no check of their own: seen as
integers, the bits of ``|v|`` rise with it, and NaN is above infinity.
"""

from lightning_distopt.compressors.kernels.cpu.codes import add_levels_, encode_binary, round_randomly
from lightning_distopt.compressors.kernels.cpu.largest import scatter_add_, select_largest
from lightning_distopt.compressors.kernels.cpu.levels import best_magnitudes, optimal_levels
from lightning_distopt.compressors.kernels.cpu.packing import pack, unpack
from lightning_distopt.compressors.kernels.cpu.signs import absolute_sum, add_signs_, encode_signs
from lightning_distopt.compressors.kernels.cpu.statistics import deviations, largest_magnitudes, lengths, ranges
from lightning_distopt.compressors.kernels.cpu.steps import displace_

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
