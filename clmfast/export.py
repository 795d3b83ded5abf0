"""The step table as one long file for pandas, polars, DuckDB or R.

python -m clmfast.export DIR --parquet      DIR/measurements.parquet (needs pyarrow)
python -m clmfast.export DIR --csv          DIR/measurements.csv
... --out FILE_OR_FOLDER                    elsewhere: the run's directory may be read-only
"""

from __future__ import annotations

import argparse
import csv
import io
import sys

from clmfast.config import ConfigError
from clmfast.files import write_file
from clmfast.paths import expanded, target
from clmfast.record import NotARun, Run
from clmfast.screen import complain, forgiving
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


@forgiving()
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m clmfast.export", description="Write a run's record as one long table."
    )
    parser.add_argument("dir", help="a run directory")
    parser.add_argument("--out", metavar="FILE_OR_FOLDER", help="where to; by default into DIR")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--parquet", action="store_true", help="DIR/measurements.parquet")
    kind.add_argument("--csv", action="store_true", help="DIR/measurements.csv")
    asked = parser.parse_args(arguments)
    try:
        path = expanded(asked.dir)
        file = target(asked.out, "measurements.parquet" if asked.parquet else "measurements.csv", path)
        run = Run(path)
        with computing(NotARun, f"{one_line(path)} must be a run directory with a record to export"):
            content = to_parquet(run) if asked.parquet else to_csv(run)
        write_file(file, content)
    except ImportError:
        complain("clmfast.export", "--parquet needs pyarrow: pip install 'clmfast[export]'")
        return 2
    except (ConfigError, NotARun, OSError) as error:
        complain("clmfast.export", error)
        return 2
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
