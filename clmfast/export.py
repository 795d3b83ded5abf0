"""The step table as one long file for pandas, polars, DuckDB or R.

python -m clmfast.export DIR --parquet      DIR/measurements.parquet (needs pyarrow)
python -m clmfast.export DIR --csv          DIR/measurements.csv
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from pathlib import Path

from clmfast.files import write_file
from clmfast.record import NotARun, Run
from clmfast.untrusted import computing, one_line


def to_parquet(run: Run) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(run.long()), buffer, compression="zstd")
    return buffer.getvalue()


def to_csv(run: Run) -> bytes:
    table = run.long()
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*(column.tolist() for column in table.values()), strict=True))
    return buffer.getvalue().encode()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m clmfast.export", description="Write a run's record as one long table."
    )
    parser.add_argument("dir", type=Path, help="a run directory")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--parquet", action="store_true", help="DIR/measurements.parquet")
    kind.add_argument("--csv", action="store_true", help="DIR/measurements.csv")
    asked = parser.parse_args(arguments)
    try:
        run = Run(asked.dir)
        target = asked.dir / ("measurements.parquet" if asked.parquet else "measurements.csv")
        with computing(NotARun, f"{one_line(asked.dir)} must be a run directory with a record to export"):
            content = to_parquet(run) if asked.parquet else to_csv(run)
        write_file(target, content)
    except ImportError:
        print("clmfast.export: --parquet needs pyarrow: pip install 'clmfast[export]'", file=sys.stderr)
        return 2
    except (NotARun, OSError) as error:
        print(f"clmfast.export: {error}", file=sys.stderr)
        return 2
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
