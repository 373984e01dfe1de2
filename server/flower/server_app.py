"""The Flower ServerApp of a deployment: builds the run its run config names, and carries it out."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import RunNotRunningException

from silotune.common.contract import contract as contracts
from silotune.common.data.text_decoding import Reading
from silotune.common.errors import ErrorCode, RunError, SilotuneError
from silotune.common.models.factory import build
from silotune.server.flower.strategy import SilotuneStrategy
from silotune.server.rounds.run import FederatedRun
from silotune.server.storage import events
from silotune.server.storage.disk import no_room
from silotune.server.storage.run_store import RunStore

STOPPED = "The server was told to stop the run."

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run config: `contract` (TOML file), `model` (folder or ""), `run` (id), `runs` (folder),
    `test` (a file of public rows, some of which calibrate the adapter, or "") and its `encoding`
    and `delimiter`; `resume`: go on with the run that is there, or "skip": and without its next
    round; `token`: what its own events of this process carry."""
    config = {key: str(value) for key, value in context.run_config.items()}
    folder, begun, own = Path(config["runs"]) / config["run"], False, {"token": config["token"]}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):  # SIGINT: Flower's own, of `flwr stop`
            signal.signal(number, _stop)
    try:
        events.append(folder, "starting", **own)
        contract = contracts.load(Path(config["contract"]))
        model = build(contract, Path(config["model"]) if config["model"] else None)
        evaluate = calibrating = None
        if config["test"]:
            from silotune.server.rounds.evaluation import PublicTest

            reading = Reading.of(
                config["encoding"], config["delimiter"] or None, "--{key} '{value}'"
            )
            public = PublicTest(contract, model, {"": Path(config["test"])}, reading)
            test, calibrating = public.divided()
            evaluate = test.metrics
        begin = RunStore.open if config["resume"] else RunStore.create
        registry = begin(folder, contract, folder.parent / ".receipts")
        begun = True
        events.reserve(folder)
        registry.event("taken", **own)
        run = FederatedRun(
            contract, registry, config["run"], model.initial_arrays(), evaluate=evaluate
        )
        if config["resume"]:
            run.restore()
        if config["resume"] == "skip" and not run.done:
            run.skip()
        SilotuneStrategy(run).start(grid)
        if calibrating is not None and (
            found := calibrating.calibration(
                registry.adapter(), adapter_active=contract.adapter is not None
            )
        ):
            found.write(folder)
    except (Exception, RunNotRunningException) as error:
        code, why = _code_and_reason(error, folder)
        with contextlib.suppress(OSError):  # on a full disk `server run` sees it by itself
            what = "failed" if begun else "refused"
            events.append(folder, what, code=code, why=why, **own)
        raise


def _code_and_reason(error: BaseException, folder: Path) -> tuple[str, str]:
    """The code and the sentence about what ended a run."""
    if isinstance(error, RunNotRunningException):  # what Flower raises after `flwr stop`
        return ErrorCode.RUN_INTERRUPTED, STOPPED
    if not isinstance(error, SilotuneError) and (full := no_room(folder, error)):
        error = full
    return (error.code if isinstance(error, SilotuneError) else ErrorCode.UNEXPECTED), str(error)


def _stop(*_: object) -> None:
    """The round in hand is given up; what its sites have answered they will answer again."""
    raise RunError(STOPPED, code=ErrorCode.RUN_INTERRUPTED)
