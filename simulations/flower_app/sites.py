"""The sites of a Flower app in a local simulation: each with keys, records and a ledger on disk.

FOLDER/records/SITE.csv
FOLDER/sites/SITE/keys/    FOLDER/sites/SITE/state/    made once; the ledger lasts over runs
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import uvicorn
from flwr.serverapp import Grid

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.relay import transport
from silotune.client.site.policy import Budgets, Policy, permissive_policy
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.errors import UsageError
from silotune.simulations.flower_app.sockets import socket_folder, socket_path

LOOK_SECONDS = 0.5  # between two looks at the simulated nodes


def make_sites(folder: Path, names: list[str]) -> Mapping[str, str]:
    """Give each site keys and an empty ledger.

    Args:
        folder: The app's folder.
        names: The sites' names, fit for a file.

    Returns:
        Each site's public key, for the contract's roster.
    """
    public = {}
    for name in names:
        place = folder / "sites" / name
        keys = Keys.create(place / "keys")
        PrivacyLedger.create(place / "state", keys, name)
        public[name] = keys.public
    return public


def check_nodes(grid: Grid, contract: Contract) -> None:
    """Refuse a simulation with more or fewer nodes than the contract has sites.

    Args:
        grid: Flower's grid. Its nodes are registered all at once, while the ServerApp starts.
        contract: The contract of the run.

    Raises:
        UsageError: If the numbers differ; it names both, and the option that sets one.
    """
    count = -1
    while (now := len(list(grid.get_node_ids()))) != count or count == 0:
        count = now
        time.sleep(LOOK_SECONDS)
    if count != len(contract.sites):
        raise UsageError(
            f"The simulation has {count} SuperNodes, and the contract has {len(contract.sites)} "
            "sites, one for each node: flwr run . --federation-config "
            f'"num-supernodes={len(contract.sites)}"'
        )


class Sites:
    """The workers of all sites, which answer on sockets of the run while this is entered.

    Args:
        contract: The contract of the run.
        folder: The app's folder.
        model: The folder of the base model; None for a model that needs none.
        run_id: Flower's number of the run.
        epsilon: The lifetime budget of each site's records, over all runs.

    Raises:
        RefusalError: If a site refuses the contract: its budget is spent, for example.
    """

    def __init__(
        self, contract: Contract, folder: Path, model: Path | None, run_id: int, epsilon: float
    ) -> None:
        self._folder, self._servers = socket_folder(run_id), list[uvicorn.Server]()
        self._threads = list[threading.Thread]()
        self._workers = []
        for site in contract.sites:
            place = folder / "sites" / site.name
            policy = _policy(contract, site.name, folder, model, epsilon)
            ledger = PrivacyLedger.open(place / "state", Keys.load(place / "keys"))
            self._workers.append(Worker(policy, contract, ledger))
        self._sockets = [socket_path(run_id, place) for place in range(len(self._workers))]

    def __enter__(self) -> Self:
        for path, worker in zip(self._sockets, self._workers, strict=True):
            server = transport.server(worker.handle)
            thread = threading.Thread(
                target=server.run, kwargs={"sockets": [transport.listen(path)]}, name=path.stem
            )
            thread.start()
            self._servers.append(server)
            self._threads.append(thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for server in self._servers:
            server.should_exit = True
        for thread in self._threads:
            thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)


def _policy(
    contract: Contract, site: str, folder: Path, model: Path | None, epsilon: float
) -> Policy:
    """What the contract needs, with a budget that more than one run can use."""
    policy = permissive_policy(contract, site, folder / "records" / f"{site}.csv", model)
    budget = Budgets.Budget(epsilon=epsilon, delta=contract.target_of(site).delta)
    return policy.model_copy(update={"budgets": Budgets(**{contract.privacy.unit: budget})})
