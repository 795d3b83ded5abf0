"""Every kernel and configuration that attention_triton can choose, compiled for two GPUs, without one, and what it uses
compared with attention_limits.toml, whose rows are those of csrc/cuda/limits.py: no register is spilled, shared memory
suffices, 16-bit products are matrix instructions, and float32's are not, as none would keep its bits.

    pytest --compile-kernels tests/test_attention_compiled.py     takes minutes, so that a plain `pytest` leaves it out
    python tests/test_attention_compiled.py                       makes the table say what the kernels use now

The table is Triton 3.6's, which comes with torch 2.11; another version's registers differ.
"""

from __future__ import annotations

import itertools
import subprocess
import tempfile
import tomllib
from pathlib import Path

import pytest
import torch
from test_cuda_limits import limits

pytest.importorskip("triton")

TABLE = Path(__file__).with_name("attention_limits.toml")
FILE = "attention_triton.py"
CAPABILITIES = {"sm_80": 80, "sm_90a": 90}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90a": 227 << 10}  # most that a block may have
MATRIX = {"sm_80": "mma.sync", "sm_90a": "wgmma.mma_async"}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SHORT = "short_fwd_kernel", "short_bwd_kernel"
LONG = "long_fwd_kernel", "long_bwd_q_kernel", "long_bwd_kv_kernel"


def rows() -> dict[str, dict]:
    return tomllib.loads(TABLE.read_text())[FILE]


def variants() -> dict[str, tuple]:
    """row of the table -> (kernel, dtype, width, config): all that can be chosen for any number of rows."""
    from clmfast.ops import attention_triton as ours

    found = {}
    for dtype, width in itertools.product(ours.DTYPES, ours.WIDTHS):
        chosen = {ours.choose(dtype, width, T) for T in range(1, 2049)}
        for is_short, config in chosen:
            for name in SHORT if is_short else LONG:
                row = f"{name} {str(dtype)[6:]} {width}"
                assert row not in found, "two configurations: a row for each"
                found[row] = (name, dtype, width, config)
    return found


def compiled(name, dtype, width, config, device):
    """As the launchers would have it: pointers to numbers are aligned, no integer is a constant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from clmfast.ops import attention_triton

    kernel = getattr(attention_triton, name)
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
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITIES[device], 32), options=options)


def use_of(variant: tuple, device: str):
    """What one kernel uses, as Triton's own ptxas tells. Shared memory is given at the launch, so ptxas sees none."""
    import triton

    kernel = compiled(*variant, device)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(kernel.asm["ptx"])
        command = [ptxas, "-v", f"--gpu-name={device}", path, "-o", path.with_suffix(".cubin")]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    use = limits.use_of(told, kernel.metadata.name, device, kernel.asm["ptx"])
    return use._replace(shared=kernel.metadata.shared)


@pytest.mark.compile_kernels
@pytest.mark.parametrize("row", variants())
def test_resources(row):
    uses = {device: use_of(variants()[row], device) for device in CAPABILITIES}
    assert limits.complaints({row: rows()[row]}, {row: uses}) == []
    is_float32 = "float32" in row
    for device, use in uses.items():
        found = [product for product in MATRIX.values() if product in use.ptx]
        assert found == ([] if is_float32 else [MATRIX[device]])


def test_the_table_has_what_can_be_chosen_and_no_more():
    assert list(rows()) == sorted(variants())
    for name, row in rows().items():
        for device, most in SHARED_BYTES.items():
            registers, shared, stack = row[device]
            assert registers <= 255 and shared <= most and stack == 0
        assert row.get("matrix") == (None if "float32" in name else MATRIX)


def write() -> None:
    found = {}
    for row, variant in sorted(variants().items()):
        uses = {device: list(use_of(variant, device)[:3]) for device in CAPABILITIES}
        found[row] = uses if "float32" in row else {**uses, "matrix": MATRIX}
    TABLE.write_text(limits.table_text({FILE: found}, Path(__file__).name))


if __name__ == "__main__":
    write()
