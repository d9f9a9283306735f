"""GPU kernels without a GPU: equal to their twins in Triton's interpreter, and valid for the compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_distopt.compressors import kernels
from lightning_distopt.compressors.kernels import kernels_for, kernels_of
from tests.compressors.kernels.interpreted import CHECKS
from tests.compressors.table import gaussian

triton = pytest.importorskip("triton", reason="needs triton, which torch's CUDA packages bring")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def failed() -> dict[str, str]:
    """Tracebacks by check, of all checks, run in one process that interprets."""
    pytest.importorskip("numba", reason="the twins of the GPU's kernels are the CPU's")
    run = subprocess.run(
        [sys.executable, "-m", "tests.compressors.kernels.interpreted"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    report: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    assert report["checks"] == list(CHECKS)
    tracebacks: dict[str, str] = report["failed"]
    return tracebacks


@pytest.mark.timeout(180)  # the first waits for all
@pytest.mark.parametrize("name", CHECKS)
def test_interpreted_kernels_are_equal_to_their_twins(name: str, failed: dict[str, str]) -> None:
    assert name not in failed, failed[name]


# ---- the real compiler -----------------------------------------------------------------------------------------------


def use_all(numel: int, size: int, symbols: tuple[int, ...]) -> None:
    """Call every kernel."""
    from lightning_distopt.compressors.kernels import cuda

    v, scale = gaussian(numel), torch.ones(1)
    for statistic in (cuda.largest_magnitudes, cuda.ranges, cuda.lengths, cuda.deviations, cuda.best_magnitudes):
        statistic(v, size)
    cuda.absolute_sum(v)
    cuda.add_signs_(cuda.encode_signs(v, scale, True), scale, v)
    cuda.encode_binary(v, size, True)
    for count in symbols:
        table = torch.zeros(-(-numel // size), count)
        codes = torch.zeros_like(cuda.round_randomly(v, table, size, 2**64 - 1, True))
        cuda.add_levels_(cuda.unpack(cuda.pack(codes, count), numel, count), table, size, v)
        if count in (3, 5, 9):
            cuda.optimal_levels(v, size, count, None)
    cuda.displace_(v, v.clone(), v.clone(), 0.0)
    cuda.displace_(v, v.clone(), v.clone(), 0.5)
    places = cuda.select_largest(v, 1 + numel // 10)
    cuda.scatter_add_(v, torch.zeros_like(places), v[: places.numel()], 0.5)


def compile_launch(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], architecture: int) -> Any:
    """Compile a kernel for the types, constants and alignment that Triton would see in a launch with ``args``."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    names = {torch.float32: "fp32", torch.float64: "fp64", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}
    signature, aligned = {}, {}
    for place, (parameter, value) in enumerate(zip(kernel.params, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + names[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif parameter.do_not_specialize:
            signature[parameter.name] = "u64"
        elif value == 1:
            constants[parameter.name] = 1
        else:
            signature[parameter.name] = "i32"
        if isinstance(value, torch.Tensor) or (signature.get(parameter.name) == "i32" and value % 16 == 0):
            aligned[(place,)] = [["tt.divisibility", 16]]
    ordered = {parameter.name: signature.get(parameter.name, "constexpr") for parameter in kernel.params}
    source = ASTSource(kernel, ordered, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("architecture", "cases"),
    [
        (80, [(10_016, 2048, (3, 5))]),
        pytest.param(80, [(20_001, 20_001, (2, 9)), (1, 2048, (2, 255)), (300, 48, (5,))], marks=pytest.mark.slow),
        pytest.param(90, [(10_016, 2048, (2, 3, 5, 9)), (20_001, 20_001, (5,))], marks=pytest.mark.slow),
    ],
)
def test_every_kernel_compiles_for_a_gpu_and_fuses_nothing(
    architecture: int, cases: list[tuple[int, int, tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.runtime.jit import JITFunction

    try:
        get_ptxas(architecture)
    except RuntimeError as error:
        pytest.skip(f"needs ptxas: {error}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches: dict[str, tuple[Any, ...]] = {}

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        types = [(a.dtype if isinstance(a, torch.Tensor) else (a == 1, a % 16 == 0)) for a in args]
        launches.setdefault(f"{self.__name__} {types} {constants}", (self, args, constants))

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        for case in cases:
            use_all(*case)
    found = {kernel.__name__ for kernel, _, _ in launches.values()}
    assert len(found) >= 15, found
    for kernel, args, constants in launches.values():
        ptx = compile_launch(kernel, args, constants, architecture).asm["ptx"]
        assert "fma.rn" not in ptx, f"{kernel.__name__}: a product and a sum became one, with other bits"
        assert ".ftz" not in ptx, f"{kernel.__name__}: denormal values are flushed"


# ---- choice ----------------------------------------------------------------------------------------------------------


def test_a_gpu_gets_triton_and_only_for_float32() -> None:
    class OnGPU:
        def __init__(self, dtype: torch.dtype, numel: int = 3) -> None:
            self.dtype, self.device, self.numel = dtype, torch.device("cuda"), lambda: numel

    assert kernels_of(torch.device("cuda")) == "cuda"
    found: Any = kernels_for(OnGPU(torch.float32))  # type: ignore[arg-type]
    assert found.__name__.endswith("kernels.cuda")
    assert kernels_for(OnGPU(torch.bfloat16)) is None  # type: ignore[arg-type]
    assert kernels_for(OnGPU(torch.float32, 0)) is None  # type: ignore[arg-type]


def test_both_devices_offer_the_same_kernels() -> None:
    pytest.importorskip("numba")
    from lightning_distopt.compressors.kernels import cpu, cuda

    assert cuda.__all__ == cpu.__all__


@pytest.mark.parametrize("why", ["missing", "first launch"])
def test_without_triton_there_is_one_warning_and_the_plain_code(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lightning_distopt.compressors.kernels.cuda")]:
        monkeypatch.delitem(sys.modules, name)
    if why == "missing":
        monkeypatch.setitem(sys.modules, "triton", None)
    else:  # torch says that there is a GPU, and it cannot be used
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch, "ones", _out_of_order)
    kernels._load.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"on cuda falls back to plain torch.*`triton` cannot be used.*C compiler"):
            assert kernels_of(torch.device("cuda")) == "torch"
        with warnings.catch_warnings(record=True) as again:
            assert kernels_of(torch.device("cuda")) == "torch"
        assert not again
    finally:
        kernels._load.cache_clear()


def _out_of_order(*size: int, device: str) -> torch.Tensor:
    raise OSError(f"no {device}")
