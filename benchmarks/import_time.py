"""What `import lightning_distopt` costs over `import lightning.pytorch`, in fresh processes, interleaved.

    python -m benchmarks.import_time [--runs 9]

Target: a ratio of at most 1.10.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time

import lightning
import torch


def seconds(module: str) -> float:
    """Return the wall-clock seconds of a new interpreter that imports ``module``."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main() -> int:
    """Time both imports in turn and print medians, spread and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.import_time", description=__doc__)
    parser.add_argument("--runs", type=int, default=9, help="counted runs of each (default: %(default)s)")
    runs = parser.parse_args().runs
    modules = ("lightning.pytorch", "lightning_distopt")
    for module in modules:
        seconds(module)  # fills the disk cache
    times = {module: [] for module in modules}
    for _ in range(runs):
        for module in modules:
            times[module].append(seconds(module))
    print(
        f"torch {torch.__version__}, lightning {lightning.__version__}, Python {platform.python_version()}, {runs} runs each"
    )
    for module in modules:
        low, middle, high = min(times[module]), statistics.median(times[module]), max(times[module])
        print(f"import {module:18} median {middle:.3f} s ({low:.3f} to {high:.3f})")
    pairs = [b / a for a, b in zip(*times.values(), strict=True)]
    print(f"ratio, median of pairs: {statistics.median(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f}); target 1.10")
    return 0


if __name__ == "__main__":
    sys.exit(main())
