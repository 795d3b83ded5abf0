"""Builds the compiled ops; everything else about the package stands in pyproject.toml.

    python setup.py build_ext --inplace      builds clmfast/ops/_C.so where it is imported from

Where nvcc is found (CUDA_HOME, PATH, /usr/local/cuda), the CUDA ops are built in, whichever torch stands beside: the
library asks for nothing of CUDA until a tensor on a GPU arrives. CLMFAST_CUDA=0 leaves them out, =1 insists on them.
CLMFAST_SANITIZE=1 instruments them for AddressSanitizer and UndefinedBehaviorSanitizer: see tests/faults/sanitize.py.
CLMFAST_CUDA_DEVICE=9.0 compiles them for devices of that compute capability alone, which takes less than half the
time: for whoever builds on the machine that has the GPU.

The library holds torch operators and no Python module, and is compiled against torch's stable ABI: it is tied neither
to one Python nor to one torch version. It finds torch's libraries because torch is imported before it, so no path of
the machine that built it is left inside.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
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
# -O1: at -O3 the instrumented build takes several times as long. vptr needs run-time types, which torch has not.
SANITIZE_FLAGS = [
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",
    "-fno-sanitize-recover=undefined",
]
OLDEST_NVCC = (12, 0)  # that knows sm_90a
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",  # as -ffp-contract=off above: kernels say fmaf where they want one
    "-Xcompiler=-fPIC,-g0,-fvisibility=hidden,-Wall,-Wextra,-Wno-unused-parameter",
]
FOR_8X = "-gencode=arch=compute_80,code=sm_80"
FOR_90 = "-gencode=arch=compute_90a,code=sm_90a"
FOR_LATER = "-gencode=arch=compute_90,code=compute_90"  # PTX, which the driver compiles


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("clmfast: building needs torch >= 2.11: install it first, or leave out --no-build-isolation")
    return Path(spec.origin).parent


def find_nvcc() -> str | None:
    """The compiler of the CUDA ops; None to build without them."""
    wish = os.environ.get("CLMFAST_CUDA", "")
    if wish == "0":
        return None
    folders = [f"{os.environ['CUDA_HOME']}/bin"] if "CUDA_HOME" in os.environ else []
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    missing = None
    if nvcc is None:
        missing = "no nvcc in CUDA_HOME, PATH or /usr/local/cuda"
    elif (release := release_of(nvcc)) < OLDEST_NVCC:
        missing = f"{nvcc} is release {release[0]}.{release[1]}, and sm_90a needs {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]}"
    if missing is None:
        return nvcc
    if wish == "1":
        raise SystemExit(f"clmfast: CLMFAST_CUDA=1, but {missing}")
    if nvcc is not None:
        print(f"clmfast: building without the CUDA ops: {missing}", flush=True)
    return None


def release_of(nvcc: str) -> tuple[int, int]:
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", told)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def device_flags() -> list[str]:
    """nvcc's flags for every device, or for those of one compute capability."""
    wish = os.environ.get("CLMFAST_CUDA_DEVICE", "")
    if not wish:
        return [FOR_8X, FOR_90, FOR_LATER]
    if wish in ("8.0", "8.6", "8.7", "8.9"):
        return [FOR_8X.replace("sm_80", f"sm_{wish.replace('.', '')}")]
    if not re.fullmatch(r"(9|[1-9]\d)\.\d", wish):
        raise SystemExit(
            f"clmfast: CLMFAST_CUDA_DEVICE must be a compute capability, 8.0, 8.6, 8.7, 8.9 or from 9.0 on, got {wish}"
        )
    return [FOR_90 if wish == "9.0" else FOR_LATER]


def cuda_library_folders(nvcc: str) -> list[str]:
    """As nvcc itself would tell the linker: it may be started by a link or a script elsewhere."""
    told = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    for line in told.splitlines():
        if line.startswith("#$ LIBRARIES="):
            words = shlex.split(line.removeprefix("#$ LIBRARIES="))
            return [word.removeprefix("-L") for word in words if word.startswith("-L")]
    raise SystemExit(f"clmfast: {nvcc} does not work: {told.strip()[:500]}\nCLMFAST_CUDA=0 builds without it")


class BuildOps(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = getattr(self.compiler, "compiler_cxx", None) or ["c++"]
        if shutil.which(compiler[0]) is None:
            raise SystemExit(
                f"clmfast: no C++ compiler found (looked for {compiler[0]}): install one, such as g++, and try again"
            )

        def compile_cuda(source: str) -> str:
            built = Path(self.build_temp, source).with_suffix(".cu.o")
            built.parent.mkdir(parents=True, exist_ok=True)
            command = [str(nvcc), *NVCC_FLAGS, *gencode, "-c", source, "-o", str(built)]
            if subprocess.run(command, cwd=ROOT).returncode:
                raise SystemExit(f"clmfast: {nvcc} failed on {source}, see above; CLMFAST_CUDA=0 builds without CUDA")
            return str(built)

        def compile_one(source: str) -> str:
            if source.endswith(".cu"):
                return compile_cuda(source)
            (built,) = self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=ext.extra_compile_args
            )
            return built

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sorted(ext.sources, key=lambda source: not source.endswith(".cu"))))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".unfinished")
        self.compiler.link_shared_object(
            objects,
            str(unfinished),
            library_dirs=ext.library_dirs,
            libraries=ext.libraries,
            extra_postargs=ext.extra_link_args,
            target_lang="c++",
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


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").rglob(pattern))


torch = torch_folder()
nvcc = find_nvcc()
library_dirs = [str(torch / "lib")]
libraries = ["torch_cpu"]
link_args = []
gencode = device_flags() if nvcc else []
sanitize_flags = SANITIZE_FLAGS if os.environ.get("CLMFAST_SANITIZE", "0") == "1" else []
link_args += sanitize_flags
if nvcc:
    library_dirs += cuda_library_folders(nvcc)
    libraries += ["cudart_static", "dl", "rt", "pthread"]
    link_args.append("-Wl,--exclude-libs,libcudart_static.a")  # torch's own CUDA runtime and ours stay apart
setup(
    ext_modules=[
        Extension(
            "clmfast.ops._C",
            sources=files("*.cpp", "*.cu") if nvcc else files("*.cpp"),
            depends=files("*.h", "*.cuh"),
            library_dirs=library_dirs,
            libraries=libraries,
            extra_link_args=link_args,
            # the prefix map: torch's error messages name its header files, without the folder they were built in
            extra_compile_args=[
                *COMPILE_FLAGS,
                *sanitize_flags,
                *(["-DCLMFAST_CUDA"] if nvcc else []),
                "-isystem",
                str(torch / "include"),
                f"-fmacro-prefix-map={torch}=torch",
            ],
        )
    ],
    cmdclass={"build_ext": BuildOps, "bdist_wheel": PlatformWheel},
)
