"""The build: setup.py finds a compiler for the CUDA ops, or says why not; the library is loadable under torch 2.11."""

import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from clmfast import ops

ROOT = Path(__file__).parent.parent
if not (ROOT / "setup.py").is_file():
    pytest.skip("only in a clone", allow_module_level=True)
SPEC = importlib.util.spec_from_file_location("abi", ROOT / "csrc" / "abi.py")
abi = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(abi)
LIBRARY = Path(ops.__file__).parent / "_C.so"
NEWEST_TRIED_GLIBC = (2, 36)  # Debian 12, g++ 12: what is built there asks for nothing newer than abi.NEWEST
needs_binutils = pytest.mark.skipif(not (shutil.which("readelf") and shutil.which("c++")), reason="no readelf, no c++")


def setup(nvcc: Path, wish: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_HOME": str(nvcc.parent.parent), "CLMFAST_CUDA": wish, **variables}
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def old_nvcc(tmp_path: Path) -> Path:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    return nvcc


def test_an_old_nvcc_is_left_aside_and_named(old_nvcc):
    told = setup(old_nvcc, "")
    assert told.returncode == 0
    assert f"building without the CUDA ops: {old_nvcc} is release 11.8" in told.stdout


def test_whoever_insists_on_an_old_nvcc_is_told(old_nvcc):
    told = setup(old_nvcc, "1")
    assert told.returncode == 1
    assert "CLMFAST_CUDA=1, but" in told.stderr and "12.0" in told.stderr and "Traceback" not in told.stderr


@pytest.mark.parametrize(
    ("device", "codes"),
    [
        ("", ["sm_80", "sm_90a", "compute_90"]),
        ("8.0", ["sm_80"]),
        ("8.6", ["sm_86"]),
        ("9.0", ["sm_90a"]),
        ("9.1", ["compute_90"]),
        ("12.0", ["compute_90"]),
    ],
)
def test_the_cuda_code_is_compiled_for_one_device_if_asked(device, codes, monkeypatch):
    for name, value in (("CLMFAST_CUDA", "0"), ("CLMFAST_CUDA_DEVICE", device)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    flags = runpy.run_path(str(ROOT / "setup.py"))["device_flags"]()
    assert [flag.split(",code=")[1] for flag in flags] == codes


@pytest.mark.parametrize("device", ["8.3", "7.5", "90", "sm_90a"])
def test_a_device_that_is_none_is_one_line(device, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'release 12.8'\necho '#$ LIBRARIES=-L/nowhere' >&2\n")
    nvcc.chmod(0o755)
    told = setup(nvcc, "1", CLMFAST_CUDA_DEVICE=device)
    assert told.returncode == 1 and told.stderr.count("\n") == 1
    assert (
        f"CLMFAST_CUDA_DEVICE must be a compute capability, 8.0, 8.6, 8.7, 8.9 or from 9.0 on, got {device}"
        in told.stderr
    )


@needs_binutils
def test_the_library_is_loadable_under_torch_2_11():
    not_in_torch, too_new = abi.complaints(*abi.needs_of(LIBRARY))
    assert not_in_torch == []
    own = tuple(map(int, platform.libc_ver()[1].split(".")[:2]))
    if too_new and own > NEWEST_TRIED_GLIBC:
        pytest.skip(f"built on a newer Linux, and runs only there: {'; '.join(too_new)}")
    assert too_new == []


def test_what_is_looked_up_while_running_is_in_torch_2_11():
    names = set(re.findall(r'"(aoti_torch_\w+|torch_\w+)"', (ROOT / "csrc" / "ops.cpp").read_text()))
    assert names and names <= abi.exported_by_torch()["libtorch_cuda.so"]


@needs_binutils
def test_a_function_that_torch_2_11_lacks_is_named(tmp_path):
    source, library = tmp_path / "made_up.cpp", tmp_path / "made_up.so"
    source.write_text(
        'extern "C" void torch_of_tomorrow(); extern "C" long torch_get_const_data_ptr(void*, void*);\n'
        "void call() { torch_of_tomorrow(); torch_get_const_data_ptr(nullptr, nullptr); }\n"
    )
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    told = subprocess.run([sys.executable, str(ROOT / "csrc" / "abi.py"), str(library)], capture_output=True, text=True)
    assert told.returncode == 1
    assert "WRONG: made_up.so needs torch_of_tomorrow, which torch 2.11 does not export" in told.stdout
    assert "1 complaints" in told.stdout


def test_newer_libraries_and_foreign_ones_are_named():
    symbols = ["clone@GLIBC_2.34", "strtol@GLIBC_2.38", "run@GLIBCXX_3.4.29", "init@GLIBCXX_3.4.32", "x@LIBCUDART_13"]
    not_in_torch, too_new = abi.complaints(["libc.so.6", "libm.so.6", "libcudart.so.13", "libtorch_cuda.so"], symbols)
    assert not_in_torch == ["needs the library libcudart.so.13", "needs the library libtorch_cuda.so"]
    assert too_new == [
        "needs strtol of GLIBC_2.38, at most GLIBC_2.34",
        "needs init of GLIBCXX_3.4.32, at most GLIBCXX_3.4.29",
        "needs x of LIBCUDART_13, which is not known",
    ]
