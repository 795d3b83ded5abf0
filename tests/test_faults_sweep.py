"""The sweep of kills and disk faults finds what is planted; without that, that it finds nothing says nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# In a process of its own: the sweep forks, which a process with threads should not.
CODE = """
import random, tempfile
from pathlib import Path
from unittest.mock import patch
from clmfast import files
from tests.faults import sweep

def once(file, data, offset=None):
    files.os.write(file, data) if offset is None else files.os.pwrite(file, data, offset)

def in_order(rows, row, values):
    once(rows._file, values.astype(rows.dtype).tobytes(), rows._offset + row * rows._row_bytes)

PLANTED = {
    "short write": patch.object(files, "write_all", once),  # is not continued
    "kill inside": patch.object(files.RowFile, "write", in_order),  # a row counts as written before it is
    "power cut": patch.object(sweep.Disk, "fsync", lambda disk, file: None),  # a name before its content
}
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    sweep.prepare(folder)
    known = sweep.scenarios(folder)
    for mode, fault in PLANTED.items():
        jobs = [job for job in sweep.strikes(known, True, random.Random(0)) if job[0].startswith(f"new: {mode} ")]
        with fault:
            pool = sweep.Pool(folder, 10)
            for job in jobs[:: len(jobs) // 10]:
                pool.add(*job)
            print(f"{mode}: found {pool.finish()}")
"""


def test_what_is_planted_is_found():
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    found = [line for line in done.stdout.splitlines() if ": found " in line]
    assert len(found) == 3, done.stderr
    assert not [line for line in found if line.endswith("found 0")]
