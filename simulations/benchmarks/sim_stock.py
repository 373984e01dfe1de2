"""The stock Flower simulation in sim.py: Flower's run_simulation with its Ray actors, a core each.

The client is what Flower's examples teach: each message builds model and tokenizer, reads and
tokenises the client's texts, takes the server's weights, makes its step and sends them back. The
server is Flower's FedAvg. Here too only B and the head move; both factors go down to the clients.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from silotune.simulations.benchmarks import command_line, sim_workload

client = ClientApp()
SAMPLED = 0.5  # seconds between two looks at the memory of all processes


@client.train()
def train(message: Message, context: Context) -> Message:
    import torch
    from transformers import AutoTokenizer

    config, arrays = message.content["config"], message.content["arrays"]
    assert isinstance(config, ConfigRecord)
    assert isinstance(arrays, ArrayRecord)
    model, case = str(config["model"]), str(config["case"])
    base, head = sim_workload.encoder(model, case), torch.nn.Linear(384, len(sim_workload.LABELS))
    found = sim_workload.tensors(base, head)
    with torch.no_grad():
        for name, value in arrays.to_torch_state_dict().items():
            found[name].copy_(value)
    who = sim_workload.WHO[int(context.node_config["partition-id"])]
    batch = sim_workload.batch(
        AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False),
        *sim_workload.rows_of(Path(str(config["folder"])), who),
    )
    trained = [p for p in found.values() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=sim_workload.RATE)

    outputs = sim_workload.logits(base, head, batch["ids"], batch["mask"])
    loss = torch.nn.functional.cross_entropy(outputs, batch["labels"])
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()

    metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(batch["labels"])})
    reply = ArrayRecord({name: p.detach() for name, p in found.items()})
    return Message(RecordDict({"arrays": reply, "metrics": metrics}), reply_to=message)


def serve(grid: Grid, case: str, folder: Path, rounds: int, clock: sim_workload.Clock) -> None:
    """Flower's FedAvg over all clients."""
    import torch

    def mark(server_round: int, arrays: ArrayRecord) -> None:
        if server_round:  # 0 is before the first
            clock.done({n: a.numpy() for n, a in arrays.to_torch_state_dict().items()})

    first = {n: torch.from_numpy(a) for n, a in sim_workload.read(folder / case).items()}
    settings: Mapping[str, Any] = {
        "model": sim_workload.facts_of(folder)["model"],
        "case": case,
        "folder": str(folder),
    }
    FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=sim_workload.CLIENTS,
        min_available_nodes=sim_workload.CLIENTS,
    ).start(
        grid,
        ArrayRecord(first),
        num_rounds=rounds,
        train_config=ConfigRecord(dict(settings)),
        evaluate_fn=mark,
    )


class Tree(threading.Thread):
    """The memory of this process and all below it (PSS: what processes share counts once)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.libraries, self._most, self._end = self._now(), 0, threading.Event()

    def run(self) -> None:
        while not self._end.wait(SAMPLED):
            self._most = max(self._most, self._now())

    def found(self) -> dict[str, int]:
        self._end.set()
        return {"peak": self._most - self.libraries, "libraries": self.libraries}

    @staticmethod
    def _now() -> int:
        import psutil

        total, own = 0, psutil.Process()
        for process in (own, *own.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except psutil.Error:  # it has just ended
                continue
        return total


def main(case: str, folder: Path, rounds: int, out: Path) -> None:
    sim_workload.libraries()
    from flwr.simulation import run_simulation

    warnings.simplefilter("ignore")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    server, memory = ServerApp(), Tree()

    @server.main()
    def run(grid: Grid, _context: Context) -> None:
        serve(grid, case, folder, rounds, clock)

    memory.start()
    clock = sim_workload.Clock(out)
    run_simulation(
        server,
        client,
        sim_workload.CLIENTS,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": sim_workload.cores(), "log_to_driver": False},
        },
    )
    sim_workload.report(clock, memory.found())


if __name__ == "__main__":
    # The module by its name, which Ray's actors import; __main__ they would get as a copy.
    from silotune.simulations.benchmarks import sim_stock

    _, case, folder, rounds, out = command_line.side(__doc__)
    sim_stock.main(case, folder, rounds, out)
