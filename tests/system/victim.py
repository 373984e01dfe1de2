"""Forks workers on one ledger and kills them; what they said is in the parent's notes.

Run by test_kills.py: python victim.py SEED RANDOM EACH FOLDER... It loads torch once; each child
opens the ledger of its folder anew, answers requests and says on a pipe what it is doing:
ready · ask KEY · compute KEY · computed KEY · handled KEY · reply KEY HEX. The parent writes one
JSON line a child to FOLDER/notes.jsonl. A folder with the name of a mutant gets that mutant.
"""

from __future__ import annotations

import gc
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from silotune.client.privacy import accountant, stored_files
from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.ledger_entries import Charged, Released
from silotune.client.privacy.reply_store import ReplyStore
from silotune.client.site.policy import permissive_policy
from silotune.client.training.noise import NoiseSource
from silotune.client.worker import worker as workers
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract, load
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Arrays, Message, Train

RUN = "killed"


def request(contract: Contract, adapter: Arrays, key: str) -> bytes:
    """The request of a key 'round.attempt'; always the same bytes."""
    number, attempt = map(int, key.split("."))
    header = Train(contract=contract.hash, run=RUN, round=number, attempt=attempt)
    return messages.pack(Message(header, adapter))


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


# Each plants one death at a chosen point of the first new request that the child answers.


def before_commit() -> None:
    """The charge is inserted, its transaction still open."""
    original = PrivacyLedger.append

    def append(self: PrivacyLedger, kind: Any, **facts: Any) -> Any:
        entry = original(self, kind, **facts)
        return die() if kind is Charged else entry

    PrivacyLedger.append = append  # type: ignore[method-assign]


def _at_head(kind: type, deed: Callable[[], object]) -> None:
    last: list[Any] = [None]
    remember = PrivacyLedger._remember

    def noting(self: PrivacyLedger, entry: Any, body: str, mac: bytes) -> None:
        remember(self, entry, body, mac)
        last[0] = entry

    write_head = Keys.write_head

    def writing(self: Keys, number: int, head: str) -> None:
        if isinstance(last[0], kind):
            deed()
        write_head(self, number, head)

    PrivacyLedger._remember = noting  # type: ignore[method-assign]
    Keys.write_head = writing  # type: ignore[method-assign]


def charged_before_head() -> None:
    """The charge is committed, keys/head still names the entry before."""
    _at_head(Charged, die)


def released_before_head() -> None:
    """The release is committed, keys/head still names the charge."""
    _at_head(Released, die)


def _half_written() -> None:
    def write(descriptor: int, _: str) -> None:
        os.write(descriptor, b"12 a")
        die()

    os.fdopen = write  # type: ignore[assignment]


def in_head() -> None:
    """Half of the new head is written."""
    _at_head(Charged, _half_written)


def in_training() -> None:
    """One of the round's two steps is done."""
    drawn = [0]
    original = NoiseSource.poisson_sample

    def sample(self: NoiseSource, n: int, rate: float) -> Any:
        drawn[0] += 1
        return die() if drawn[0] == 2 else original(self, n, rate)

    NoiseSource.poisson_sample = sample  # type: ignore[method-assign]


def in_reply_file() -> None:
    """Half of the reply is written."""
    original = stored_files.write_durably

    def write(path: Path, data: bytes) -> None:
        if path.parent.name == "replies":
            _half_written()
        original(path, data)

    stored_files.write_durably = write


def before_rename() -> None:
    """The reply is on disk whole, under its temporary name."""
    original = Path.rename

    def rename(self: Path, target: Any) -> Path:
        return die() if self.parent.name == "replies" else original(self, target)

    Path.rename = rename  # type: ignore[method-assign]


def before_release() -> None:
    """The reply is on disk, the ledger does not name it."""
    original = PrivacyLedger.append

    def append(self: PrivacyLedger, kind: Any, **facts: Any) -> Any:
        return die() if kind is Released else original(self, kind, **facts)

    PrivacyLedger.append = append  # type: ignore[method-assign]


def before_send() -> None:
    """The reply is released and handed over, and not sent."""
    original = Worker.handle

    def handle(self: Worker, wire: bytes) -> bytes:
        before = len(self.ledger.charges)
        reply = original(self, wire)
        return die() if len(self.ledger.charges) > before else reply

    Worker.handle = handle  # type: ignore[method-assign]


POINTS = {
    point.__name__: point
    for point in (
        before_commit,
        charged_before_head,
        in_head,
        in_training,
        in_reply_file,
        before_rename,
        before_release,
        released_before_head,
        before_send,
    )
}


# Two workers that a test must not let pass.


def trains_first() -> None:
    """Computes, then charges."""
    original = Worker._train_once

    def train_once(self: Worker, message: Message) -> bytes:
        asked = message.header
        assert isinstance(asked, Train)
        if (self.contract.hash, asked.run, asked.round, asked.attempt) in self.ledger.charges:
            return original(self, message)
        train_round, plan = workers.train_round, self.contract.round_plan(asked.round)
        mechanism = accountant.mechanism_of(self.contract, self.plan, asked.round)
        found = train_round(
            self.contract,
            plan,
            mechanism,
            self.model,
            self.data,
            message.arrays,
            self.source,
            self.contract.privacy.clip_norm,
        )
        workers.train_round = lambda *_: found
        try:
            return original(self, message)
        finally:
            workers.train_round = train_round

    Worker._train_once = train_once  # type: ignore[method-assign]


def sends_first() -> None:
    """Sends the reply, then makes it durable and releases it."""
    original = ReplyStore.release

    def release(self: ReplyStore, charge: Charged, wire: bytes, own: bytes | None) -> None:
        say(f"reply {charge.round}.{charge.attempt} {wire.hex()}")
        original(self, charge, wire, own)

    ReplyStore.release = release  # type: ignore[method-assign]


MUTANTS = {mutant.__name__: mutant for mutant in (trains_first, sends_first)}

pipe = -1


def say(line: str) -> None:
    os.write(pipe, line.encode() + b"\n")


def child(folder: Path, contract: Contract, fresh: int, rng: random.Random) -> None:
    """Answer requests until killed: new ones from round `fresh` on, and earlier ones again."""
    current = [""]
    train_round = workers.train_round

    def announced(*args: Any) -> Any:
        say(f"compute {current[0]}")
        found = train_round(*args)
        say(f"computed {current[0]}")
        return found

    workers.train_round = announced
    ledger = PrivacyLedger.open(folder / "state", Keys.load(folder / "keys"))
    policy = permissive_policy(contract, "north", folder / "rows.csv", None)
    worker = Worker(policy, contract, ledger)
    adapter = worker.model.initial_arrays()
    say("ready")
    while True:
        if fresh > 1 and rng.random() < 0.3:
            key = f"{rng.randrange(max(1, fresh - 40), fresh)}.1"
        else:
            key, fresh = f"{fresh}.1", fresh + 1
        current[0] = key
        say(f"ask {key}")
        reply = worker.handle(request(contract, adapter, key))
        say(f"handled {key}")
        say(f"reply {key} {reply.hex()}")


def drain(descriptor: int, until: float | None, stop: bytes | None = None) -> bytes:
    """What the child says until `until` (None: until it is dead) or until it says `stop`."""
    said = b""
    while stop is None or stop not in said:
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            break
        if select.select([descriptor], [], [], left)[0]:
            part = os.read(descriptor, 1 << 16)
            if not part:
                break
            said += part
    return said


def one(folder: Path, contract: Contract, fresh: int, seed: int, how: str) -> dict[str, Any]:
    """Fork one child, see it killed; the note about it. how: 'random' or one of POINTS."""
    global pipe  # noqa: PLW0603
    rng = random.Random(seed)  # noqa: S311
    readable, writable = os.pipe()
    process = os.fork()
    if process == 0:
        signal.alarm(60)  # nobody waits for it longer
        try:
            os.close(readable)
            pipe = writable
            MUTANTS.get(folder.name, lambda: None)()
            if how != "random":
                POINTS[how]()
            child(folder, contract, fresh, rng)
        except BaseException as error:  # the judge reads it
            say(f"failed {error!r}")
        finally:
            os._exit(1)
    os.close(writable)
    said = b""
    if how == "random":
        now = time.monotonic()
        if rng.random() < 0.3:
            said += drain(readable, now + rng.uniform(0, 0.03))
        else:
            said += drain(readable, now + 30, b"ready\n")
            said += drain(readable, time.monotonic() + rng.uniform(0, 0.06))
        os.kill(process, signal.SIGKILL)
    said += drain(readable, None if how == "random" else time.monotonic() + 30)
    os.close(readable)
    _, status = os.waitpid(process, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return {"how": how, "killed": killed, "said": said.decode()}


def main(seed: int, kills: int, each: int, folder: Path) -> None:
    contract = load(folder / "contract.json")
    # Warm what children inherit: the accountant's plan and torch's own start.
    policy = permissive_policy(contract, "north", folder / "rows.csv", None)
    warm = Worker(policy, contract, PrivacyLedger.in_memory("north"))
    warm.handle(request(contract, warm.model.initial_arrays(), "1.1"))
    gc.freeze()  # or children collect what they inherit, which takes longer than they live
    rng = random.Random(seed)  # noqa: S311
    order = ["random"] * kills + [point for point in POINTS for _ in range(each)]
    rng.shuffle(order)
    fresh = 1
    with (folder / "notes.jsonl").open("w") as notes:
        for how in order:
            note = one(folder, contract, fresh, rng.randrange(1 << 30), how)
            notes.write(json.dumps(note) + "\n")
            asked = [line.split() for line in note["said"].splitlines()]
            rounds = [int(w[1].split(".")[0]) for w in asked if w[0] == "ask" and len(w) == 2]
            fresh = max([fresh, *(number + 1 for number in rounds)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[4:]:
        main(*map(int, sys.argv[1:4]), Path(name))
