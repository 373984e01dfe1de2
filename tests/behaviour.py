"""What must not change while files and names do: adapters' hashes for fixed seeds, and messages.

    python -m tests.behaviour            prints it as JSON
    python -m tests.behaviour --check    compares it with behaviour.json, made on the same machine

Adapters: three recipes (one round a phase, eight records a site), a masked run, and a masked run
whose server dies after its second round and is resumed. Messages: every kind that such a run
packs, with the contract's hash, digests, signatures and keys replaced by constants.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from silotune.common.contract.contract import Contract, parse
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Agree, Describe, Message
from silotune.server.rounds.exchange import drive_round
from silotune.server.storage.run_store import RunStore
from silotune.simulations.comparison.recipe import load_recipe
from silotune.simulations.datasets import catalog
from silotune.simulations.datasets.tables import TABLES
from silotune.simulations.execution.job import run_job
from silotune.simulations.execution.variants import Job
from tests.client.worker.test_secagg import SITES, Answer, Federation, released_contract
from tests.conftest import TABLE_CONTRACT
from tests.server.rounds.test_resume import server

STORED = Path(__file__).with_suffix(".json")
RECIPES = ("heart-diagnosis", "disease-ner", "service-intents")
SEED = 7
HEXADECIMAL = re.compile(r'"[0-9a-f]{16,}"')


def hash_of(arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return found.hexdigest()


def recipe_adapter(name: str, folder: Path) -> str:
    recipe = load_recipe(name)
    contract = recipe.contract.changed(
        phases=[phase.model_dump(mode="json") | {"rounds": 1} for phase in recipe.contract.phases]
    )
    table = TABLES[recipe.table].make()
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        for site in contract.weights():
            rows = table[table["site"] == site].drop(columns="site")
            rows.sample(8, random_state=len(part)).to_csv(folder / part / f"{site}.csv")
    model = catalog.fetch(contract.model.name)
    run_job(
        Job(
            "federated-lora",
            0,
            contract,
            folder / "run",
            model,
            folder,
            True,
            1,
            insecure_seed=SEED,
        ),
        lambda *_: None,
    )
    return hash_of(RunStore(folder / "run").adapter())


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    lines = [
        f"{int(rng.integers(20, 90))},{('yes', 'no')[int(rng.integers(2))]},{int(rng.integers(2))}"
        for _ in range(count)
    ]
    path.write_text("\n".join(["age,smoker,outcome", *lines]) + "\n")
    return path


def constant(value: Any) -> Any:
    """JSON with each long hexadecimal number replaced: keys, digests, signatures, hashes."""
    text = HEXADECIMAL.sub('"HEX"', json.dumps(value, sort_keys=True))
    return json.loads(re.sub(r'"attempt": \d+', '"attempt": 0', text))


def shown(message: Message) -> dict[str, Any]:
    return {
        "header": constant(message.header.model_dump(mode="json")),
        "arrays": {name: hash_of({name: array}) for name, array in message.arrays.items()},
        "blobs": {name: len(blob) for name, blob in message.blobs.items()},
    }


def run_of(
    contract: Contract, folder: Path, *, masked: bool = True, dies: bool = False
) -> tuple[str, dict[str, Any]]:
    """The adapter's hash, and the first message of each kind."""
    folder.mkdir()
    federation, seen = Federation(contract, folder, write_rows), dict[str, Any]()
    if not masked:
        federation.contract = federation.contract.changed(secure_aggregation=None)
        for site in SITES:
            federation.restart(site)
    handles = federation.handles()

    def noted(site: str) -> Answer:
        def answer(wire: bytes) -> bytes:
            reply = handles[site](wire)
            for one in (wire, reply):
                message = messages.unpack(one)
                seen.setdefault(f"{message.header.kind}", shown(message))
            return reply

        return answer

    answers = {site: noted(site) for site in SITES}
    for ask in (
        Describe(contract=federation.contract.hash, challenge="0" * 64),
        Agree(contract=federation.contract.hash, run="run-1", round=99, attempt=1),
    ):
        answers["north"](messages.pack(Message(ask)))
    run, rounds = server(federation), 0
    while not run.done:
        # In the third round a site is gone before its update, so that the rest endorse.
        gone = {"west": lambda wire: b"" if _kind(wire) == "train" else noted("west")(wire)}
        drive_round(run.stages(list(SITES)), answers | (gone if rounds == 2 else {}))
        rounds += 1
        if dies and rounds == 2:
            run.registry.close()
            run = server(federation, resume=True)
    run.registry.close()
    return hash_of(run.registry.adapter()), seen


def _kind(wire: bytes) -> str:
    return messages.unpack(wire).header.kind


def behaviour() -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapters = {recipe: recipe_adapter(recipe, folder / recipe) for recipe in RECIPES}
        contract = released_contract(parse(TABLE_CONTRACT)).changed(
            phases=[
                {
                    "trains": "head",
                    "rounds": 2,
                    "sampling_rate": 0.5,
                    "budget_share": 0.5,
                    "head_lr": 0.5,
                },
                {
                    "trains": "head",
                    "rounds": 2,
                    "sampling_rate": 0.3,
                    "budget_share": 0.5,
                    "head_lr": 0.2,
                },
            ]
        )
        adapters["plain"], plain = run_of(contract, folder / "plain", masked=False)
        adapters["masked"], masked = run_of(contract, folder / "masked")
        adapters["resumed"], _ = run_of(contract, folder / "resumed", dies=True)
    seen = {f"plain {kind}": message for kind, message in plain.items()}
    return {"adapters": adapters, "messages": seen | masked}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with behaviour.json")
    asked = parser.parse_args()
    found = behaviour()
    if not asked.check:
        print(json.dumps(found, indent=1, sort_keys=True))
        return 0
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    for part in stored:
        for name in sorted(stored[part] | found[part]):
            same = stored[part].get(name) == found[part].get(name)
            print(f"{'same' if same else 'OTHER':<6} {part} {name}")
    return 0 if found == stored else 1


if __name__ == "__main__":
    sys.exit(main())
