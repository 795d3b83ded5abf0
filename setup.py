"""Builds the compiled ops; everything else about the package stands in pyproject.toml.

    python setup.py build_ext --inplace      builds clmfast/ops/_C.so where it is imported from

The library holds torch operators and no Python module, and is compiled against torch's stable ABI: it is tied neither
to one Python nor to one torch version. It finds torch's libraries because torch is imported before it, so no path of
the machine that built it is left inside.
"""

import importlib.util
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
STABLE_ABI_OF = "0x020B000000000000"  # torch 2.11, the oldest that the library runs with
COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # vectors never leave a function: what takes or returns one is always inlined
    "-ffp-contract=off",  # no value depends on fused multiply-add; what includes csrc/cpu/fused.h opts out
    "-fno-math-errno",  # a square root is an instruction
    f"-DTORCH_TARGET_VERSION={STABLE_ABI_OF}",
]


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("clmfast: building needs torch >= 2.11: install it first, or leave out --no-build-isolation")
    return Path(spec.origin).parent


class BuildOps(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = getattr(self.compiler, "compiler_cxx", None) or ["c++"]
        if shutil.which(compiler[0]) is None:
            raise SystemExit(
                f"clmfast: no C++ compiler found (looked for {compiler[0]}): install one, such as g++, and try again"
            )

        def compile_one(source: str) -> str:
            (built,) = self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=ext.extra_compile_args
            )
            return built

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".unfinished")
        self.compiler.link_shared_object(
            objects, str(unfinished), library_dirs=ext.library_dirs, libraries=ext.libraries, target_lang="c++"
        )
        os.replace(unfinished, target)

    def copy_extensions_to_source(self) -> None:
        # By renaming: a process that has the old library loaded keeps it whole.
        for ext in self.extensions:
            target = ROOT / self.get_ext_filename(ext.name)
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            unfinished = target.with_suffix(".unfinished")
            shutil.copyfile(built, unfinished)
            os.replace(unfinished, target)


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


torch = torch_folder()
setup(
    ext_modules=[
        Extension(
            "clmfast.ops._C",
            sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            # the prefix map: torch's error messages name its header files, without the folder they were built in
            extra_compile_args=[
                *COMPILE_FLAGS,
                "-isystem",
                str(torch / "include"),
                f"-fmacro-prefix-map={torch}=torch",
            ],
        )
    ],
    cmdclass={"build_ext": BuildOps, "bdist_wheel": PlatformWheel},
)
