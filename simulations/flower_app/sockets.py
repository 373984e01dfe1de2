"""Where a simulated site's worker answers: the ClientApp's processes look for it there.

Imports no torch: each of Ray's actors imports this file.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from flwr.app import Context


def socket_folder(run_id: int) -> Path:
    """The folder of a run's sockets: short, for Unix allows 107 bytes."""
    return Path(tempfile.gettempdir()) / f"silotune-{run_id:x}"


def socket_path(run_id: int, place: int) -> Path:
    """The socket of the site in that place of the contract's roster, from 0."""
    return socket_folder(run_id) / f"{place}.sock"


def socket_of(context: Context) -> Path:
    """The socket of the site that a simulated node stands for."""
    return socket_path(context.run_id, int(str(context.node_config["partition-id"])))
