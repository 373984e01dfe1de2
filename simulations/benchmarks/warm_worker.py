"""A site's worker for rounds.py: the product's, with a clock around each round's training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.relay.transport import listen, serve
from silotune.client.site.policy import permissive_policy
from silotune.client.training.local_round import train_round
from silotune.client.worker import worker
from silotune.common.contract.contract import load
from silotune.simulations.benchmarks import command_line


def clocked(file: Path) -> Callable[..., Any]:
    """train_round, which adds a line with its seconds to `file`."""

    def train(*args: Any) -> Any:
        began = time.perf_counter()
        found = train_round(*args)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(f"{time.perf_counter() - began}\n")
        return found

    return train


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("folder", type=Path, help="of the site: keys/, state/, rows.csv")
    parser.add_argument("name", help="the site's name in the contract")
    parser.add_argument("contract", type=Path, help="the contract's file")
    parser.add_argument("model", type=Path, help="the base model's folder")
    words = parser.parse_args()
    torch.set_num_threads(1)
    contract, folder = load(words.contract), words.folder
    keys = Keys.load(folder / "keys")

    with mock.patch.object(worker, "train_round", clocked(folder / "seconds")):
        served = worker.Worker(
            permissive_policy(contract, words.name, folder / "rows.csv", words.model),
            contract,
            PrivacyLedger.open(folder / "state", keys),
        )
        serve(served.handle, listen(folder / "socket" / "worker.sock"))


if __name__ == "__main__":
    main()
