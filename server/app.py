"""The Flower ServerApp of a deployment: builds the run its run config names, and carries it out."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from silotune.common import contract as contracts
from silotune.common.errors import RunError, SilotuneError
from silotune.common.model import build
from silotune.common.reading import Reading
from silotune.server import events
from silotune.server.registry import Registry
from silotune.server.rounds import Run
from silotune.server.strategy import SilotuneStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run config: `contract` (TOML file), `model` (folder or ""), `run` (id), `runs` (folder),
    `test` (a file of public rows, or "") and its `encoding` and `delimiter`; `resume`: go on with
    the run that is there, or "skip": and without its next round; `token`: what its own events of
    this process carry."""
    config = {key: str(value) for key, value in context.run_config.items()}
    folder, begun, own = Path(config["runs"]) / config["run"], False, {"token": config["token"]}
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    try:
        events.append(folder, "starting", **own)
        contract = contracts.load(Path(config["contract"]))
        model = build(contract, Path(config["model"]) if config["model"] else None)
        evaluate = None
        if config["test"]:
            from silotune.server.evaluate import PublicTest

            reading = Reading.of(config["encoding"], config["delimiter"] or None,
                                 "--{key} '{value}'")
            evaluate = PublicTest(contract, model, {"": Path(config["test"])}, reading).metrics
        begin = Registry.open if config["resume"] else Registry.create
        registry = begin(folder, contract, folder.parent / ".receipts")
        begun = True
        registry.event("taken", **own)
        run = Run(contract, registry, config["run"], model.initial_arrays(), evaluate=evaluate)
        if config["resume"]:
            run.restore()
        if config["resume"] == "skip" and not run.done:
            run.skip()
        SilotuneStrategy(run).start(grid)
    except Exception as error:
        code = error.code if isinstance(error, SilotuneError) else "E500"
        events.append(folder, "failed" if begun else "refused", code=code, why=str(error), **own)
        raise


def _stop(*_: object) -> None:
    """The round in hand is given up; what its sites have answered they will answer again."""
    raise RunError("The server was told to stop.", code="E603")
