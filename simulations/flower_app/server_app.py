"""The ServerApp: starts the sites' workers, runs the contract's rounds, and writes the result.

The workers of a simulation live in this process, since Ray's actors would each load the model, and
keep nothing from one message to the next. In a deployment each is a process at its site, and this
file is `silotune/server/flower/server_app.py`.
"""

import json
import logging
from contextlib import closing
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from silotune.common import Contract
from silotune.common.models.factory import build
from silotune.server import FederatedRun
from silotune.server.flower.run_config import check_run_config
from silotune.server.flower.strategy import SilotuneStrategy
from silotune.server.rounds.evaluation import PublicTest
from silotune.server.storage.run_store import RunStore
from silotune.simulations.flower_app.sites import Sites, check_nodes, lifetime_epsilon, sites_log

log = logging.getLogger("flwr")  # what `flwr log` shows
log.propagate = False  # Opacus gives the root logger a handler: each line would come twice

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    folder = Path(str(config["folder"]))
    model_folder = Path(str(config["model"])) if config["model"] else None
    contract = Contract.load(folder / "contract.json")
    check_run_config(config, contract)
    epsilon = lifetime_epsilon(folder, config["site-epsilon"])
    check_nodes(grid, contract)

    model = build(contract, model_folder)
    test = PublicTest(contract, model, {"": folder / "test.csv"})
    place = folder / "runs" / str(context.run_id)
    registry = RunStore.create(place, contract, folder / "runs" / ".receipts")
    run = FederatedRun(
        contract, registry, str(context.run_id), model.initial_arrays(), evaluate=test.metrics
    )
    with (
        closing(registry),
        sites_log(folder),  # before the sites: what one says of its records is not for `flwr log`
        Sites(contract, folder, model_folder, context.run_id, epsilon),
    ):
        result = SilotuneStrategy(run).start(grid)

    log.info("%s", result)
    figures = {
        "train": {n: dict(m) for n, m in result.train_metrics_clientapp.items()},
        "evaluate": {n: dict(m) for n, m in result.evaluate_metrics_serverapp.items()},
        "arrays": {name: array.shape for name, array in result.arrays.items()},
    }
    (place / "metrics.json").write_text(json.dumps(figures, indent=1))
    log.info("adapter and metrics: %s", place)
