"""The size of what git tracks: a clone of the tree stays small enough to be carried to a machine without a network."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_BYTES = 15_000_000


def complaint(bytes_of: dict[str, int]) -> str:
    """Empty where the files are small enough; names the largest where they are not."""
    total = sum(bytes_of.values())
    if total <= MAX_BYTES:
        return ""
    largest = sorted(bytes_of.items(), key=lambda item: -item[1])[:5]
    named = ", ".join(f"{path} {size / 1e6:.2f} MB" for path, size in largest)
    return f"tracked files must be at most {MAX_BYTES / 1e6:.0f} MB, got {total / 1e6:.1f} MB; the largest: {named}"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only in a clone")
def test_tracked_files_are_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [path for path in listed.split("\0") if path and (ROOT / path).is_file()]
    assert paths
    assert complaint({path: (ROOT / path).stat().st_size for path in paths}) == ""


def test_too_large_files_are_named():
    found = complaint({f"file{i}": 2_500_000 + i for i in range(7)})
    assert "got 17.5 MB" in found and "file6 2.50 MB" in found and "file1 " not in found
