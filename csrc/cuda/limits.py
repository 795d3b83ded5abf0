"""Compiles every kernel for every device and compares what it uses with limits.toml: no GPU is needed.

    python csrc/cuda/limits.py              says what exceeds its row, spills, lacks a row or its matrix instructions
    python csrc/cuda/limits.py --write      makes the rows say what the kernels use now (matrix instructions are kept)

A row of limits.toml: kernel = { sm_80 = [registers, bytes of static shared memory, bytes of stack], ... }, upper limits
all; and `matrix`, the instructions that the PTX for a device must hold. A device that a row leaves out has the kernel,
but never launches it.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
TABLE = HERE / "limits.toml"
DEVICES = {"sm_80": "compute_80", "sm_90a": "compute_90a"}
PTX_ONLY = "compute_90"  # what later devices compile for themselves


class Use(NamedTuple):
    registers: int
    shared: int
    stack: int
    spilled: int
    ptx: str


def nvcc_flags() -> list[str]:
    """Those of the build, without its devices."""
    text = (HERE.parent.parent / "setup.py").read_text()
    return re.findall(r'"([^"]+)"', text.split("NVCC_FLAGS = [", 1)[1].split("\n]", 1)[0])


def short_names(mangled: list[str]) -> dict[str, str]:
    """capture_kernel<float> of _ZN7clmfast..., without namespaces, result and arguments."""
    full = subprocess.run(["c++filt", "-p", *mangled], check=True, capture_output=True, text=True).stdout.splitlines()
    plain = (
        re.sub(r"\(anonymous namespace\)::|clmfast::|\((?:int|bool|long|unsigned int)\)", "", name) for name in full
    )
    return {m: re.sub(r"^void ", "", name) for m, name in zip(mangled, plain, strict=True)}


def uses_of(source: Path) -> dict[str, dict[str, Use]]:
    """kernel -> device -> what it uses. Raises where the source does not compile without a warning."""
    targets = [f"-gencode=arch={ptx},code={device}" for device, ptx in DEVICES.items()]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "nvcc", *nvcc_flags(), *targets, f"-gencode=arch={PTX_ONLY},code={PTX_ONLY}", "-Xptxas=-v",
            "--keep", f"--keep-dir={folder}", "-c", str(source), "-o", f"{folder}/out.o",
        ]  # fmt: skip
        told = subprocess.run(command, capture_output=True, text=True)
        output = told.stdout + told.stderr
        if told.returncode or "warning" in output.lower():
            raise RuntimeError(f"{source.name} does not compile cleanly:\n{output}")
        texts = {device: _ptx(Path(folder), source.stem, ptx) for device, ptx in DEVICES.items()}
    found: dict[str, dict[str, Use]] = {}
    for device, bodies in texts.items():
        names = short_names(list(bodies)) if bodies else {}
        for mangled, body in bodies.items():
            found.setdefault(names[mangled], {})[device] = use_of(output, mangled, device, body)
    return found


def _ptx(folder: Path, stem: str, architecture: str) -> dict[str, str]:
    """mangled kernel -> its text, of one architecture."""
    paths = [*folder.glob(f"{stem}.{architecture}.ptx"), *folder.glob(f"{stem}.ptx")]
    text = next(
        text for path in paths if f".target {architecture.replace('compute', 'sm')}" in (text := path.read_text())
    )
    entries = re.split(r"\.entry (\w+)\(", text)[1:]
    return dict(zip(entries[::2], entries[1::2], strict=True))


def use_of(output: str, mangled: str, device: str, ptx: str) -> Use:
    """From what ptxas -v tells."""
    told = output.split(f"Compiling entry function '{mangled}' for '{device}'", 1)[1].split("Compiling entry", 1)[0]

    def number(pattern: str) -> int:
        found = re.search(pattern, told)
        return int(found[1]) if found else 0

    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    stack = number(r"(\d+) bytes stack frame")
    return Use(number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), stack, spilled, ptx)


def complaints(rows: dict[str, dict], uses: dict[str, dict[str, Use]]) -> list[str]:
    """What is wrong with the kernels of one file."""
    wrong = [f"{kernel}: has no row" for kernel in uses if kernel not in rows]
    wrong += [f"{kernel}: has a row, but is not there" for kernel in rows if kernel not in uses]
    for kernel, row in rows.items():
        for device, use in uses.get(kernel, {}).items():
            if device not in row:
                continue
            for what, limit in zip(("registers", "shared", "stack"), row[device], strict=True):
                if getattr(use, what) > limit:
                    wrong.append(f"{kernel} on {device}: {what} {getattr(use, what)}, at most {limit}")
            if use.spilled:
                wrong.append(f"{kernel} on {device}: spills {use.spilled} bytes")
            instruction = row.get("matrix", {}).get(device)
            if instruction and instruction not in use.ptx:
                wrong.append(f"{kernel} on {device}: no {instruction} in its PTX")
    return wrong


def table_text(rows: dict[str, dict[str, dict]], writer: str = "limits.py") -> str:
    lines = [f"# What each kernel may use; see {writer}, which can write it anew."]
    for file, kernels in rows.items():
        lines += ["", f'["{file}"]']
        for kernel, row in kernels.items():
            cells = [f"{device} = {row[device]}" for device in DEVICES if device in row]
            if "matrix" in row:
                cells.append("matrix = { " + ", ".join(f'{d} = "{i}"' for d, i in row["matrix"].items()) + " }")
            lines.append(f'"{kernel}" = {{ {", ".join(cells)} }}')
    return "\n".join(lines) + "\n"


def main() -> int:
    table = tomllib.loads(TABLE.read_text()) if TABLE.exists() else {}
    sources = sorted(HERE.glob("*.cu"))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        uses = dict(zip((source.name for source in sources), pool.map(uses_of, sources), strict=True))
    if "--write" in sys.argv[1:]:
        rows: dict[str, dict[str, dict]] = {}
        for file, kernels in uses.items():
            before = table.get(file, {})
            for kernel, by_device in sorted(kernels.items()):
                row = before.get(kernel, {})
                new = {d: list(use[:3]) for d, use in by_device.items() if not row or d in row}
                rows.setdefault(file, {})[kernel] = new | ({"matrix": row["matrix"]} if "matrix" in row else {})
        TABLE.write_text(table_text(rows))
        table = rows
    wrong = [f"{file}: {text}" for file in uses | table for text in complaints(table.get(file, {}), uses.get(file, {}))]
    for file, kernels in uses.items():
        for kernel, by_device in kernels.items():
            print(f"{file:16} {kernel:48} " + "  ".join(f"{d} {list(u[:3])}" for d, u in by_device.items()))
    for text in wrong:
        print(f"WRONG: {text}")
    print(f"{sum(map(len, uses.values()))} kernels in {len(uses)} files: {len(wrong)} complaints")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
