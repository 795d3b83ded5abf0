"""The check of what kernels use: it must fail when a kernel spills, grows, or loses its matrix instructions."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
SPEC = importlib.util.spec_from_file_location("limits", CSRC / "cuda" / "limits.py")
limits = importlib.util.module_from_spec(SPEC)
sys.modules["limits"] = limits
SPEC.loader.exec_module(limits)

ROWS = {
    "multiply": {"sm_80": [40, 1024, 0], "sm_90a": [64, 1024, 0], "matrix": {"sm_80": "mma.sync", "sm_90a": "wgmma"}}
}


def uses(**changed):
    within = limits.Use(registers=40, shared=1024, stack=0, spilled=0, ptx="mma.sync.aligned wgmma.mma_async")
    return {"multiply": {"sm_80": within._replace(**changed), "sm_90a": within}}


def test_a_kernel_within_its_limits():
    assert limits.complaints(ROWS, uses()) == []
    assert limits.complaints(ROWS, uses(registers=32, shared=0)) == []


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"registers": 41}, "multiply on sm_80: registers 41, at most 40"),
        ({"shared": 2048}, "multiply on sm_80: shared 2048, at most 1024"),
        ({"stack": 8}, "multiply on sm_80: stack 8, at most 0"),
        ({"spilled": 4}, "multiply on sm_80: spills 4 bytes"),
        ({"ptx": "fma.rn.f32"}, "multiply on sm_80: no mma.sync in its PTX"),
    ],
)
def test_a_kernel_beyond_them(changed, complaint):
    assert limits.complaints(ROWS, uses(**changed)) == [complaint]


def test_kernels_and_rows_belong_together():
    assert limits.complaints({}, uses()) == ["multiply: has no row"]
    assert limits.complaints(ROWS, {}) == ["multiply: has a row, but is not there"]


BROKEN = """
#include "{cuda}/ptx.cuh"
template <class T>
__global__ void __launch_bounds__(1024, 2) broken(const T* x, T* y, int n) {{
  T kept[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  for (int j = 0; j < n; ++j)
#pragma unroll
    for (int i = 0; i < 64; ++i) kept[i] = kept[i] * kept[(i + 7) % 64] + x[j];
#pragma unroll
  for (int i = 0; i < 64; ++i) y[i * 1024 + threadIdx.x] = kept[i];
}}
template __global__ void broken<float>(const float*, float*, int);
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_a_broken_kernel_is_found(tmp_path):
    """A kernel that wants more registers than its launch bounds leave, and has lost its matrix instructions."""
    source = tmp_path / "broken.cu"
    source.write_text(BROKEN.format(cuda=CSRC / "cuda"))
    row = {"sm_80": [32, 0, 0], "sm_90a": [32, 0, 0], "matrix": {"sm_90a": "wgmma"}}
    found = limits.complaints({"broken<float>": row}, limits.uses_of(source))
    assert any("sm_80: spills" in text for text in found) and any("sm_90a: spills" in text for text in found)
    assert any("no wgmma" in text for text in found)
    source.write_text("__global__ void wrong() { int unused = 1 }")
    with pytest.raises(RuntimeError, match="does not compile"):
        limits.uses_of(source)
