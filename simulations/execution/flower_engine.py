"""Flower's Simulation Runtime with a backend that runs every client in this process.

Flower's link state, grid and message queues carry each message as in any Flower simulation; only
the Ray actors are replaced, because each of them would load the base model again. Clients take
turns: their arithmetic uses all the cores it is given.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Queue
from typing import cast

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import RUN_ID_NUM_BYTES, SUPERLINK_NODE_ID, TASK_ID_NUM_BYTES
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.fleet.vce.backend import Backend
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.server.superlink.linkstate.utils import generate_rand_int_from_bytes
from flwr.serverapp import Grid
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

PULL_SECONDS = 0.01


class InProcessBackend(Backend):
    """Runs one ClientApp at a time in the calling thread."""

    def __init__(self) -> None:
        super().__init__({})
        self._app: ClientApp | None = None

    def build(self, app_fn: Callable[[], ClientApp]) -> None:
        self._app = app_fn()

    @property
    def num_workers(self) -> int:
        return 1

    def is_worker_idle(self) -> bool:
        return True

    def terminate(self) -> None:
        self._app = None

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        assert self._app is not None
        return self._app(message, context), context


def simulate(server: Callable[[Grid], object], client: ClientApp, sites: int) -> None:
    """Run `server` on a Flower grid with `sites` simulated nodes; returns when it has finished.

    A node's `partition-id` in its config runs from 0 to sites - 1. What `server` raises is raised.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    factory = LinkStateFactory(
        FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory()
    )
    run = FlowerRun.create_empty(run_id=generate_rand_int_from_bytes(RUN_ID_NUM_BYTES))
    run.primary_task_id = generate_rand_int_from_bytes(TASK_ID_NUM_BYTES)
    run.federation_id = NOOP_FEDERATION_ID
    TaskIdentity.task_id, TaskIdentity.run_id = 1, run.run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    state = cast(InMemoryLinkState, factory.state())
    state.run_ids[run.run_id] = RunRecord(run=run)
    state.task_store[run.primary_task_id] = Task(task_id=run.primary_task_id, run_id=run.run_id)
    nodes = vce_api._register_nodes(sites, factory)
    contexts = vce_api._register_node_info_stores(nodes, run)
    grid = InMemoryGrid(state_factory=factory, pull_interval=PULL_SECONDS)
    grid.set_run(run)

    stop = threading.Event()
    failure: Queue[BaseException] = Queue()

    def serve() -> None:
        try:
            server(grid)
        except BaseException as error:
            failure.put(error)
        finally:
            stop.set()

    thread = threading.Thread(target=serve, name="server-app")
    thread.start()
    try:
        vce_api.run_api(
            lambda: client, InProcessBackend, nodes, factory, contexts, stop, VceMetrics()
        )
    finally:
        stop.set()
        thread.join()
    if not failure.empty():
        raise failure.get()
