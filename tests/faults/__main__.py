"""python -m tests.faults [--long] [harness ...]: look for faults; the exit code is 1 if there is one."""

from __future__ import annotations

import argparse
import importlib
import sys
import time

# By name: what it looks for, as this help tells. Each is a module of this package with main(is_long, seed) -> number of
# faults.
HARNESSES = {
    "fuzz": "random calls of all ops, random damage to all files that are read",
    "sweep": "kills and disk faults at every change that a run makes to its directory",
    "endurance": "a toy run of very many steps: memory, open files and time per step stay as they are",
    "leaks": "memory that calls of ops, good and refused ones, do not give back",
    "sanitize": "op tests and some of the fuzz under AddressSanitizer and UndefinedBehaviorSanitizer",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description="Look for faults that no test was written for. The exit code is 1 if there is one.",
        epilog="harnesses: " + "; ".join(f"{name}: {text}" for name, text in HARNESSES.items()),
    )
    parser.add_argument("harness", nargs="*", help="which ones; default: all")
    parser.add_argument("--long", action="store_true", help="the sizes of an hour instead of those of minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the random cases; default: 0, the same every time")
    parser.add_argument("--case", metavar="KIND:N", help="fuzz: run this one case, and say all about it")
    parser.add_argument("--cases", type=int, help="fuzz: so many of each kind")
    parser.add_argument("--only", metavar="KIND", nargs="+", default=(), help="fuzz: public, raw, readers")
    parser.add_argument("--sanitized", action="store_true", help="fuzz: this process runs under sanitizers")
    asked = parser.parse_args()
    if unknown := [name for name in asked.harness if name not in HARNESSES]:
        parser.error(f"harness must be from {', '.join(HARNESSES)}, got {', '.join(unknown)}")
    n_faults, began = 0, time.monotonic()
    for name in asked.harness or HARNESSES:
        module = importlib.import_module(f"tests.faults.{name}")
        if name == "fuzz" and asked.case:
            n_faults += module.one(asked.seed, asked.case)
        elif name == "fuzz":
            n_faults += module.main(asked.long, asked.seed, asked.cases, tuple(asked.only), asked.sanitized)
        else:
            n_faults += module.main(asked.long, asked.seed)
    print(f"{n_faults} faults in {time.monotonic() - began:.0f} s")
    return 1 if n_faults else 0


if __name__ == "__main__":
    sys.exit(main())
