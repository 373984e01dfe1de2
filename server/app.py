"""The Flower ServerApp of a deployment: builds the run its run config names, and carries it out."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from silotune.common import contract as contracts
from silotune.common.errors import SilotuneError
from silotune.common.model import build
from silotune.server.evaluate import PublicTest
from silotune.server.registry import Registry
from silotune.server.rounds import Run
from silotune.server.strategy import SilotuneStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run config: `contract` (TOML file), `model` (folder or ""), `run` (id), `runs` (folder),
    `test` (public rows, CSV, or ""); `resume`: go on with the run that is there, or "skip": and
    without its next round."""
    config = {key: str(value) for key, value in context.run_config.items()}
    contract = contracts.load(Path(config["contract"]))
    model = build(contract, Path(config["model"]) if config["model"] else None)
    runs = Path(config["runs"])
    begin = Registry.open if config["resume"] else Registry.create
    registry = begin(runs / config["run"], contract, runs / ".receipts")
    try:
        evaluate = None
        if config["test"]:
            evaluate = PublicTest(contract, model, {"": Path(config["test"])}).metrics
        run = Run(contract, registry, config["run"], model.initial_arrays(), evaluate=evaluate)
        if config["resume"]:
            run.restore()
        if config["resume"] == "skip" and not run.done:
            run.skip()
        SilotuneStrategy(run).start(grid)
    except Exception as error:
        code = error.code if isinstance(error, SilotuneError) else "E500"
        registry.event("failed", code=code, why=str(error))
        raise
