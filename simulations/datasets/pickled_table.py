"""A pickled data frame as CSV. A pickle is code, so it is read by another process, which ends.

The package index has R's data sets as pickles and in no other form. Whoever calls this has checked
the file's SHA-256: that, not the process of its own, is what makes reading it safe.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from silotune.common.errors import DataError

CSV = "table.csv"


def convert(file: Path, folder: Path) -> None:
    """Write `file`, xz-compressed, to the new `folder` as CSV; an absent value is an empty cell."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(file), str(folder / CSV)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={key: os.environ[key] for key in ("PATH", "OPENBLAS_CORETYPE") if key in os.environ},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise DataError(f"{file.name} could not be converted: {reason}")


def _convert(file: Path, to: Path) -> None:
    import pandas as pd

    pd.read_pickle(file, compression="xz").to_csv(to, index=False)  # noqa: S301


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
