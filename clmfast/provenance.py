"""Which code made a result."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commit() -> str:
    """Short hash of the clone that this package runs from, with "-dirty" where tracked files differ from it; "unknown"
    where it runs from no clone."""
    if not (ROOT / ".git").exists():
        return "unknown"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
    try:
        told = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    except OSError:  # no git
        return "unknown"
    return told.stdout.strip() or "unknown"
