"""A table's header compared with the columns that were named."""

from __future__ import annotations

import re
from collections.abc import Sequence

from silotune.common.contract.drafting import Answers
from silotune.common.data.text_decoding import DELIMITERS
from silotune.common.errors import DataError, ErrorCode, did_you_mean


def columns_like(names: Sequence[str], header: Sequence[str]) -> str:
    """What may be wrong with a header that lacks `names`: how it is divided, or a name's spelling;
    begins with a space, or is ''."""
    undivided = next(
        (
            found
            for found in header
            if any(re.search(rf"\b{re.escape(n)}\b", found) for n in names)
            and re.search(r"[,;:\t|]", found)
        ),
        None,
    )
    if undivided is None:
        return "".join(did_you_mean(name, header) for name in names)
    allowed = " ".join(DELIMITERS.values())
    return (
        f" '{undivided}' looks like several columns: set the delimiter of the file, one of "
        f"{allowed}, or save it with one of these between its cells."
    )


def check_header(names: Sequence[str], answers: Answers, source: str) -> None:
    """DataError E302 for each column of the answers that is not there. A file without a header has
    a record in its first line, so what there is stands in `local` alone."""
    absent = [name for name in answers.used if name not in names]
    if absent:
        raise DataError(
            " ".join(f"Column '{name}' is not in {source}." for name in absent),
            code=ErrorCode.SCHEMA_MISMATCH,
            local=f"its first line has: {', '.join(names[:40])}." + columns_like(absent, names),
        )
