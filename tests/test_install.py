"""Where the package lies: read-only, without a home, and a clone seen from the folder above it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USE = """
from conftest import SMALL
from clmfast.data.tasks import make_tasks
tasks = make_tasks(SMALL.task, 0)
print(len(tasks.pack(tasks.splits["train"]).tokens))
"""


def in_a_child(environment, **options):
    done = subprocess.run(
        [sys.executable, "-c", USE], capture_output=True, text=True, timeout=300, env=environment, **options
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def environment(package=ROOT):
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    return kept | {"PYTHONPATH": f"{package}{os.pathsep}{ROOT / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}


def test_without_a_place_for_compiled_functions():
    # numba is told to look for one only where notebooks keep theirs: it finds none, as on a read-only disk with no home
    in_a_child(environment() | {"NUMBA_CACHE_LOCATOR_CLASSES": "IPythonCacheLocator"})


@pytest.mark.parametrize("damage", [b"", b"\x80\x04nonsense"])
def test_a_damaged_cache_is_compiled_anew(damage, tmp_path):
    place = environment() | {"NUMBA_CACHE_DIR": str(tmp_path)}
    in_a_child(place)
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".nbi", ".nbc")]
    assert len(files) >= 4
    for path in files:
        path.write_bytes(damage)
    in_a_child(place)
    assert all(path.stat().st_size > 100 for path in files if path.suffix == ".nbi")  # mended


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_without_a_home_and_a_read_only_package(tmp_path):
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents:
        if not folder.stat().st_mode & 0o005:
            if folder.owner() != "root" or "pytest" not in folder.name:
                pytest.skip(f"{folder} is closed to others")
            folder.chmod(0o755)
    try:
        subprocess.run([sys.executable, "-c", "import numba"], capture_output=True, cwd="/", check=True, **nobody)
    except (PermissionError, subprocess.CalledProcessError):
        pytest.skip("this Python is closed to others")
    shutil.copytree(ROOT / "clmfast", tmp_path / "clmfast", ignore=shutil.ignore_patterns("__pycache__"))
    in_a_child(environment(tmp_path), cwd="/", **nobody)
    assert not list(tmp_path.rglob("*.nbi"))


def test_an_editable_install_adds_the_clone_to_the_path(tmp_path):
    # Without setup.py, which compiles for minutes; the way of installing does not depend on it.
    clone = tmp_path / "above" / "clmfast"
    shutil.copytree(ROOT / "clmfast", clone / "clmfast", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    code = "from setuptools import build_meta; print(build_meta.build_editable('..'))"
    subprocess.run([sys.executable, "-c", code], cwd=clone, check=True, capture_output=True, timeout=300)
    (wheel,) = clone.parent.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # Without the installation that runs this test, which lies on the path, too.
    code = f"""import os, site, sys
sys.path[:] = [path for path in sys.path if not os.path.isfile(os.path.join(path, "clmfast", "__init__.py"))]
site.addsitedir({str(site)!r})
import clmfast.config; print(clmfast.__file__)"""
    options = {"capture_output": True, "text": True, "timeout": 300, "env": os.environ | {"PYTHONPATH": ""}}
    found = subprocess.run([sys.executable, "-c", code], cwd=clone.parent, **options)
    assert found.stdout.strip() == str(clone / "clmfast" / "__init__.py"), found.stderr
