"""Every kernel and configuration that attention_triton can choose, compiled for two GPUs, without one: no register is
spilled, shared memory suffices, and 16-bit products are matrix instructions.

Not part of a plain `pytest`, as it takes minutes: pytest --compile-kernels tests/test_attention_compiled.py
"""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")


class Limit(NamedTuple):
    shared_kib: int
    """Most shared memory of a block."""
    half_product: str
    """What bfloat16 and float16 are multiplied with."""


LIMITS = {80: Limit(163, "mma.sync"), 90: Limit(227, "wgmma.mma_async")}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
KERNELS = (
    *(("short", name) for name in ("short_fwd_kernel", "short_bwd_kernel")),
    *(("long", name) for name in ("long_fwd_kernel", "long_bwd_q_kernel", "long_bwd_kv_kernel")),
)


def compiled(kernel, dtype, width, config, capability):
    """As the launchers would have it: pointers to numbers are aligned, no integer is a constant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"W": width, "OWN": config.own, "WALKED": config.walked}
    integers = {"extent_ptr": "*i64", "prefix_ptr": "*i64"}
    of_name = {
        "scale": "fp32",
        "lse_ptr": "*fp32",
        "delta_ptr": "*fp32",
        **integers,
        **dict.fromkeys(constants, "constexpr"),
    }
    names = kernel.arg_names
    signature = {n: of_name.get(n, POINTERS[dtype] if n.endswith("_ptr") else "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") and n not in integers}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(ptx, capability, folder):
    """(registers, bytes spilled) as ptxas reports them."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    (folder / "kernel.ptx").write_text(ptx)
    arch = "sm_90a" if capability == 90 else f"sm_{capability}"
    command = [ptxas, "-v", f"--gpu-name={arch}", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    return int(re.search(r"Used (\d+) registers", report)[1]), sum(spilled)


@pytest.mark.compile_kernels
@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("dtype", POINTERS, ids=lambda dtype: str(dtype)[6:])
def test_resources(dtype, width, capability, tmp_path, capsys):
    from clmfast.ops import attention_triton

    assert attention_triton.WIDTHS == (32, 64, 128) and set(attention_triton.DTYPES) == set(POINTERS)
    chosen = {attention_triton.choose(dtype, width, T) for T in (1, 16, 32, 33, 64, 65, 128, 2048, 100_000)}
    config_of = {"short" if is_short else "long": config for is_short, config in chosen}
    assert len(chosen) == len(config_of) == 2
    for path, name in KERNELS:
        kernel = compiled(getattr(attention_triton, name), dtype, width, config_of[path], capability)
        ptx, shared = kernel.asm["ptx"], kernel.metadata.shared
        registers, spilled = resources(ptx, capability, tmp_path)
        with capsys.disabled():
            print(
                f"\n{name} {str(dtype)[6:]} {width} sm_{capability}: {registers} registers, {shared} B shared", end=""
            )
        assert spilled == 0, name
        assert shared <= LIMITS[capability].shared_kib * 1024, name
        # float32 stays float32: no matrix instruction would keep its bits
        has = {product: product in ptx for product in ("mma.sync", "wgmma.mma_async")}
        assert has == {p: dtype != torch.float32 and p == LIMITS[capability].half_product for p in has}, name


def test_every_length_has_one_of_the_checked_configurations():
    from clmfast.ops import attention_triton

    for dtype, width in itertools.product(attention_triton.DTYPES, attention_triton.WIDTHS):
        both = {
            (True, attention_triton.short_config(dtype, width)),
            (False, attention_triton.long_config(dtype, width)),
        }
        assert {attention_triton.choose(dtype, width, T) for T in range(1, 300)} == both
