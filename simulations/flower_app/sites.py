"""The sites of a Flower app in a local simulation: each with keys, records and a ledger on disk.

FOLDER/records/SITE.csv
FOLDER/sites/SITE/keys/    FOLDER/sites/SITE/state/    made once; the ledger lasts over runs
FOLDER/sites/site-epsilon  the largest lifetime budget that a run config can have
FOLDER/sites.log           what goes wrong at a site, for the owner of its records alone
"""

from __future__ import annotations

import logging
import math
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from silotune.common.errors import ErrorCode, RunError, SilotuneError, UsageError
from silotune.simulations.flower_app.sockets import socket_folder, socket_path

log = logging.getLogger(__name__)

LIMIT, LOG = "sites/site-epsilon", "sites.log"  # in the app's folder
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


def lifetime_epsilon(folder: Path, asked: object) -> float:
    """The lifetime budget of each site, which no run config can raise.

    Args:
        folder: The app's folder.
        asked: `site-epsilon` of the run config.

    Returns:
        The budget, at most the one that the app was made with.

    Raises:
        UsageError: If it is larger, or no number; or if the app has none.
    """
    try:
        limit = float((folder / LIMIT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(
            f"{folder / LIMIT} is missing or holds no number: make the app again with "
            "`silotune sim flower-app`.",
            code=ErrorCode.CONFIG_UNREADABLE,
        ) from None
    epsilon = float(asked) if isinstance(asked, int | float) else math.nan
    if not 0 < epsilon <= limit:
        raise UsageError(
            f"site-epsilon = {asked!r} in the run config must be a number above 0 and at most "
            f"{limit:g}, the limit that the app's ledgers were made with: correct it.",
            code=ErrorCode.CONFIG_INVALID,
        )
    return epsilon


@contextmanager
def sites_log(folder: Path) -> Iterator[None]:
    """What Silotune logs goes to a file of the owner's and not to `flwr log`: it can name columns
    and rows of records."""
    file = folder / LOG
    file.touch(mode=0o600)
    file.chmod(0o600)
    handler, logger = logging.FileHandler(file, encoding="utf-8"), logging.getLogger("silotune")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
        handler.close()


class Sites:
    """The workers of all sites, which answer on sockets of the run while this is entered.

    Args:
        contract: The contract of the run.
        folder: The app's folder.
        model: The folder of the base model; None for a model that needs none.
        run_id: Flower's number of the run.
        epsilon: The lifetime budget of each site's records, over all runs.

    Raises:
        RunError: If a site refuses the contract (its budget is spent, for example) or cannot read
            its records. It has the code and the site's name; the sentence is logged.
    """

    def __init__(
        self, contract: Contract, folder: Path, model: Path | None, run_id: int, epsilon: float
    ) -> None:
        self._folder, self._servers = socket_folder(run_id), list[uvicorn.Server]()
        self._threads = list[threading.Thread]()
        self._workers = []
        for site in contract.sites:
            place = folder / "sites" / site.name
            try:
                policy = _policy(contract, site.name, folder, model, epsilon)
                ledger = PrivacyLedger.open(place / "state", Keys.load(place / "keys"))
                self._workers.append(Worker(policy, contract, ledger))
            except Exception as error:
                log.exception("site %s", site.name)
                code = error.code if isinstance(error, SilotuneError) else ErrorCode.UNEXPECTED
                raise RunError(
                    f"Site {site.name} does not take part ({code}): its reason is in "
                    f"{folder / LOG}.",
                    code=code,
                ) from None
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
