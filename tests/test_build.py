"""setup.py finds a compiler for the CUDA ops, or says why it builds without them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "setup.py").is_file():
    pytest.skip("only in a clone", allow_module_level=True)


def setup(nvcc: Path, wish: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_HOME": str(nvcc.parent.parent), "CLMFAST_CUDA": wish}
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
