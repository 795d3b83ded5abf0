"""Checks that a compiled library needs nothing that torch 2.11, or the oldest Linux it is carried to, does not have.

    python csrc/abi.py                      of clmfast/ops/_C.so
    python csrc/abi.py LIBRARY              of another one

The library is built against a newer torch and runs with torch 2.11 if it needs only the C functions that 2.11 exports,
listed in torch-2.11-symbols.txt, and only versions of the C and C++ libraries that are old enough. Reads its dynamic
symbols with readelf, of binutils, which comes with every compiler.
"""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = HERE.parent / "clmfast" / "ops" / "_C.so"
# Those of manylinux_2_34: Linux from 2021 on.
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (11, 0)}
TORCH = "libtorch_cpu.so"  # and no CUDA library: a torch for the CPU has none, and a torch for GPUs has loaded its own.
OF_THE_SYSTEM = re.compile(r"(libstdc\+\+|libm|libgcc_s|libc|libdl|librt|libpthread|ld-linux\S*)\.so\.\d")


def exported_by_torch() -> dict[str, set[str]]:
    """torch's library -> the C functions it exports."""
    text = (HERE / "torch-2.11-symbols.txt").read_text()
    return {part.split()[0]: set(part.split()[1:]) for part in re.split(r"\n(?=lib)", text)[1:]}


def needs_of(library: Path) -> tuple[list[str], list[str]]:
    """(shared libraries, undefined symbols with their @VERSION if they have one, less those that need not be there)."""
    command = ["readelf", "--dynamic", "--dyn-syms", "--wide", str(library)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    libraries = re.findall(r"\(NEEDED\)\s+Shared library: \[(.+)\]", told)
    symbols = re.findall(r" (GLOBAL|WEAK) +DEFAULT +UND +(\S+)", told)
    return libraries, [name for binding, name in symbols if binding == "GLOBAL" or "@" in name]


def complaints(libraries: Iterable[str], symbols: Iterable[str]) -> tuple[list[str], list[str]]:
    """(what torch 2.11 lacks, what an old Linux lacks)."""
    known = exported_by_torch()[TORCH]
    foreign = [name for name in libraries if name != TORCH and not OF_THE_SYSTEM.fullmatch(name)]
    not_in_torch = [f"needs the library {name}" for name in foreign]
    too_new = []
    for symbol in symbols:
        name, _, version = symbol.partition("@")
        if not version:
            if name not in known:
                not_in_torch.append(f"needs {name}, which torch 2.11 does not export")
            continue
        node, _, number = version.lstrip("@").partition("_")
        newest = NEWEST.get(node)
        if newest is None or not re.fullmatch(r"[\d.]+", number):
            too_new.append(f"needs {name} of {version}, which is not known")
        elif tuple(map(int, number.split("."))) > newest:
            too_new.append(f"needs {name} of {version}, at most {node}_{'.'.join(map(str, newest))}")
    return not_in_torch, too_new


def main(arguments: list[str]) -> int:
    library = Path(arguments[0]) if arguments else LIBRARY
    if not library.is_file():
        print(f"WRONG: {library} must be a compiled library, there is none")
        return 1
    libraries, symbols = needs_of(library)
    wrong = [text for texts in complaints(libraries, symbols) for text in texts]
    for text in wrong:
        print(f"WRONG: {library.name} {text}")
    print(f"{len(symbols)} symbols of {len(libraries)} libraries: {len(wrong)} complaints")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
