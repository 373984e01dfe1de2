"""Small federations of real workers, in this process: for tests of whole rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site.policy import permissive_policy
from silotune.client.worker.worker import Worker
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.models.factory import build
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Arrays, Message, Train
from silotune.server.rounds.exchange import drive_round
from silotune.server.rounds.run import FederatedRun, RoundRecord
from silotune.server.storage.run_store import RunStore
from tests import tiny

EXACT = Performance(bf16="off", device="cpu", micro_batch=4)
SITES = ("north", "south", "east")
Answer = Callable[[bytes], bytes]


def worker_of(
    contract: Contract,
    kind: str,
    model: str,
    folder: Path,
    site: str = "north",
    ledger: PrivacyLedger | None = None,
    seed: int = 0,
) -> Worker:
    file = tiny.write(folder / f"{site}.csv", tiny.rows_of(kind, 24, seed))
    policy = permissive_policy(
        contract, site, file, None if model == "one-hot" else tiny.folder_of(model), EXACT
    )
    ledger = ledger or PrivacyLedger.in_memory(site)
    return Worker(
        policy, contract, ledger, insecure_seed=None if ledger.folder is not None else seed + 1
    )


def ask(worker: Worker, number: int, arrays: Arrays) -> Message:
    header = Train(contract=worker.contract.hash, run="r", round=number)
    return messages.unpack(worker.handle(messages.pack(Message(header, arrays))))


def team(
    contract: Contract, kind: str, model: str, folder: Path, keys: dict[str, Keys]
) -> dict[str, Worker]:
    """A worker for each site, with rows of its own in a new folder."""
    folder.mkdir()
    return {
        site: worker_of(
            contract, kind, model, folder, site, PrivacyLedger.in_memory(site, keys[site]), place
        )
        for place, site in enumerate(SITES)
    }


def play(
    contract: Contract, kind: str, model: str, folder: Path, keys: dict[str, Keys]
) -> tuple[Arrays, list[RoundRecord], list[Message]]:
    """A whole run: the adapter, the rounds' facts, what the sites replied."""
    workers = team(contract, kind, model, folder, keys)
    seen: list[Message] = []

    def answer(site: str, wire: bytes) -> bytes:
        reply = workers[site].handle(wire)
        seen.append(messages.unpack(reply))
        return reply

    handles: dict[str, Answer] = {s: lambda wire, s=s: answer(s, wire) for s in SITES}
    network = build(contract, None if model == "one-hot" else tiny.folder_of(model), EXACT)
    run = FederatedRun(
        contract, RunStore.create(folder / "run", contract), "run-1", network.initial_arrays()
    )
    facts = []
    while not run.done:
        facts.append(drive_round(run.stages(list(handles)), handles))
    return run.registry.adapter(), facts, seen


def of_method(method: str, keys: dict[str, Keys], **more: Any) -> Contract:
    """Two phases, the second of four rounds that train LoRA."""
    plain = tiny.contract_of("classification", "bert")
    head, both = plain.model_dump(mode="json")["phases"]
    rates = {"head_lr": 0.1, "adapter_lr": 3.0}
    return plain.changed(
        sites=[{"name": site, "public_key": keys[site].public} for site in SITES],
        quorum=3,
        phases=[head, both | rates | {"rounds": 4}],
        aggregation={"method": method, "server_momentum": 0.0, "averaging_start": 0.75},
        **more,
    )
