"""An agreement on keys as a run's folder holds it."""

from __future__ import annotations

from typing import NamedTuple

from silotune.common.protocol.messages import (
    Blobs,
)


class Agreed(NamedTuple):
    """An agreement on keys as the server stores it. keys: name -> what it published; sealed:
    receiver -> sender -> sealed shares."""

    first: int
    attempt: int
    keys: Blobs
    sealed: dict[str, Blobs]
