"""A worker killed anywhere: what was computed is charged, what was sent is charged and released.

victim.py forks and kills the workers; here the ledger they left is judged by what they said.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site.policy import permissive_policy
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Message, Refusal, Train, Update

VICTIM = Path(__file__).with_name("victim.py")
RUN = "killed"
SEED = 2024
POINTS = 9  # in victim.py


@pytest.fixture
def contract(table_contract: Contract) -> Contract:
    """Many cheap rounds, of two steps so that there is a middle; without sampling, so that the ε
    after each one is quick to find."""
    return table_contract.changed(
        privacy={"epsilon": 100.0},
        phases=[
            {
                "trains": "head",
                "rounds": 20_000,
                "sampling_rate": 1.0,
                "local_steps": 2,
                "head_lr": 0.5,
            }
        ],
    )


class Judge:
    """The ledger that the killed left in `folder`, and what they said; `wrong` is what must not be.

    ended: how many died in which state. A line cut short by death counts as far as it got.
    """

    def __init__(self, folder: Path, contract: Contract) -> None:
        self.folder, self.contract = folder, contract
        self.wrong: list[str] = []
        self.computed: Counter[str] = Counter()
        self.sent: dict[str, set[str]] = {}
        self.ended: Counter[str] = Counter()
        self.points: Counter[str] = Counter()
        for line in (folder / "notes.jsonl").read_text().splitlines():
            self._hear(json.loads(line))
        # It opens, or the chain, the MACs and the head are not whole.
        self.ledger = PrivacyLedger.open(folder / "state", Keys.load(folder / "keys"))
        self._compare()
        self._ask_again()

    def _hear(self, note: dict[str, Any]) -> None:
        state = "open"
        for line in note["said"].splitlines():
            word, _, rest = line.partition(" ")
            key, _, data = rest.partition(" ")
            if word == "failed":
                self.wrong.append(f"a worker did not survive the one before: {rest}")
            elif word == "compute":
                self.computed[key] += 1
            elif word == "reply" and data:
                self.sent.setdefault(key, set()).add(data)
            state = word
        if not note["killed"]:
            self.wrong.append(f"not killed: {note['how']}")
        self.ended[state] += 1
        self.points[note["how"]] += 1

    def _compare(self) -> None:
        ledger = self.ledger
        self.charged = {f"{c.round}.{c.attempt}": c for c in ledger.charges.values()}
        self.released = {
            key: ledger.releases[c.sequence].reply
            for key, c in self.charged.items()
            if c.sequence in ledger.releases
        }
        self.wrong += [f"{k} computed, not charged" for k in self.computed if k not in self.charged]
        self.wrong += [f"{k} computed {n} times" for k, n in self.computed.items() if n > 1]
        for key, said in self.sent.items():
            for data in said:
                self._check_sent(key, data)

    def _check_sent(self, key: str, data: str) -> None:
        if key in self.released:
            wire = (self.folder / "state" / "replies" / self.released[key]).read_bytes()
            if hashlib.sha256(wire).hexdigest() != self.released[key]:
                self.wrong.append(f"the kept reply of {key} is not the one released")
            if wire.hex().startswith(data):
                return
            self.wrong.append(f"{key} was sent other bytes than it released")
            return
        # The children say whole lines: only a refusal may leave without a release.
        header = messages.unpack(bytes.fromhex(data)).header
        if not isinstance(header, Refusal):
            self.wrong.append(f"{key} was sent, not released")
        elif header.code != "E204" or key not in self.charged:
            self.wrong.append(f"{key} was refused with {header.code}")

    def _ask_again(self) -> None:
        policy = permissive_policy(self.contract, "north", self.folder / "rows.csv", None)
        worker = Worker(policy, self.contract, self.ledger)
        adapter, before = worker.model.initial_arrays(), len(self.ledger.entries)
        for key, charge in self.charged.items():
            header = Train(
                contract=self.contract.hash, run=RUN, round=charge.round, attempt=charge.attempt
            )
            reply = worker.handle(messages.pack(Message(header, adapter)))
            found = messages.unpack(reply).header
            if key in self.released:
                if hashlib.sha256(reply).hexdigest() != self.released[key]:
                    self.wrong.append(f"{key} asked again: other bytes")
                if not isinstance(found, Update):
                    self.wrong.append(f"{key} asked again: no update")
            elif not isinstance(found, Refusal) or found.code != "E204":
                self.wrong.append(f"{key} lost, asked again: not E204")
        if len(self.ledger.entries) != before:
            self.wrong.append("asking again was charged")


Killing = Callable[..., list[Judge]]


@pytest.fixture
def killing(
    contract: Contract,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> Killing:
    """killing(random, each, *names): kill workers on a new ledger for each name, and judge."""
    caplog.set_level(logging.CRITICAL, "silotune")

    def kill(random: int, each: int, *names: str) -> list[Judge]:
        folders = [tmp_path / name for name in names]
        for folder in folders:
            write_rows(folder / "rows.csv", 40)
            (folder / "contract.json").write_text(contract.model_dump_json())
            PrivacyLedger.create(folder / "state", Keys.create(folder / "keys"), "north")
        done = subprocess.run(
            [sys.executable, VICTIM, str(SEED), str(random), str(each), *folders],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=170,
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return [Judge(folder, contract) for folder in folders]

    return kill


@pytest.mark.system
def test_two_hundred_deaths_lose_no_charge_and_leak_no_reply(killing: Killing) -> None:
    [judge] = killing(200, 5, "as-it-is")
    assert not judge.wrong, judge.wrong[:20]
    kills = sum(judge.points.values())
    print(f"\n{kills} kills; died after saying: {dict(judge.ended)}; at: {dict(judge.points)}")
    print(f"{len(judge.charged)} charged, {len(judge.released)} released")
    assert judge.points["random"] >= 200
    assert kills == 200 + 5 * POINTS
    # They fell everywhere, or nothing was shown.
    assert {"open", "ask", "compute", "computed"} <= set(judge.ended)
    assert len(judge.charged) > len(judge.released) > 100


@pytest.mark.system
def test_a_worker_in_the_wrong_order_is_found(killing: Killing) -> None:
    """The judge's own proof: the charge after training, or the reply before its release."""
    for judge, wrong in zip(
        killing(0, 1, "trains_first", "sends_first"),
        ("computed, not charged|computed 2 times", "was sent, not released"),
        strict=True,
    ):
        print(f"\n{judge.folder.name}: {len(judge.wrong)} wrong, such as {judge.wrong[:2]}")
        assert any(re.search(wrong, line) for line in judge.wrong), judge.wrong
