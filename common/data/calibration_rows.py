"""Which of labelled public rows are set aside to calibrate by, so that no figure uses them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 2026
# This share of the rows, but never fewer than these, and none at all where they would be more than
# the largest share. Rows of one person or query count as one.
SHARE, LEAST, LARGEST_SHARE = 0.2, 40, 1 / 3
NEEDED = math.ceil(LEAST / LARGEST_SHARE)


def calibration_rows(strata: Sequence[Any], together: Sequence[str]) -> NDArray[np.bool_]:
    """Draw the rows to calibrate by: every so-manieth in the order of `strata`, equal ones in an
    order that is drawn by a fixed seed.

    Args:
        strata: Of each row what the rows are drawn in proportion to, its label say, in an order.
        together: Of each row whose it is; all rows of one are drawn, or none.

    Returns:
        Of each row whether it is one of them; none is where there are too few rows.
    """
    drawn = np.random.default_rng(SEED)
    shuffled = drawn.random(len(together))
    first: dict[str, int] = {}
    for row, own in enumerate(together):
        first.setdefault(own, row)
    n = len(first)
    count = max(math.ceil(SHARE * n), LEAST)
    if count > LARGEST_SHARE * n:
        return np.zeros(len(together), dtype=np.bool_)
    order = sorted(first, key=lambda own: (strata[first[own]], shuffled[first[own]]))
    places = ((np.arange(count) + drawn.random()) * n / count).astype(int)
    chosen = {order[place] for place in places}
    return np.array([own in chosen for own in together])
