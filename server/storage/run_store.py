"""A run on disk. A round exists when its folder has its final name: one atomic rename commits it.

runs/<run>/contract.json  events.jsonl  rounds/0001/{adapter,state}.safetensors, round.json
           agreement.safetensors, survivors.json (secure aggregation)
           adapter.safetensors (when it is done)

round.json holds the SHA-256 of the round's other files. A round that is damaged is set aside, and
the run goes on from the one before: the sites give their stored replies to what is asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract
from silotune.common.errors import ErrorCode, RunError
from silotune.common.protocol.messages import Arrays, Receipt
from silotune.common.runtime.atomic_files import rename_durably, write_durably
from silotune.common.runtime.process_lock import try_lock
from silotune.server.storage import events
from silotune.server.storage.events import RunStatus
from silotune.server.storage.stored_agreement import Agreed

LOCK_SECONDS = 1.0
ARRAYS = ("adapter.safetensors", "state.safetensors")
AGREEMENT, SURVIVORS = "agreement.safetensors", "survivors.json"


class Stored(NamedTuple):
    """A committed round."""

    server_round: int
    adapter: Arrays
    state: Arrays
    facts: dict[str, Any]


class RunStore:
    """The folder of one run; `create` refuses a folder that already holds one, `open` one that
    holds another contract's. Both refuse a folder that another process writes.

    receipts: where the sites' last receipts are kept; one folder for all runs of an operator lets
    a later run see that a site's ledger went back.
    """

    def __init__(self, folder: Path, receipts: Path | None = None) -> None:
        self.folder, self._receipts = folder, receipts or folder / "receipts"

    @classmethod
    def create(cls, folder: Path, contract: Contract, receipts: Path | None = None) -> RunStore:
        if (folder / "contract.json").exists():
            raise RunError(
                f"{folder} already holds a run. Take it up again with `silotune server resume`, or "
                "name another folder."
            )
        (folder / "rounds").mkdir(parents=True, exist_ok=True)
        registry = cls(folder, receipts)
        registry._lock()
        if (folder / "contract.json").exists():  # another was faster
            registry.close()
            return cls.create(folder, contract, receipts)
        text = json.dumps(contract.model_dump(mode="json"), indent=1, ensure_ascii=False)
        write_durably(folder / "contract.json", text.encode())
        return registry

    @classmethod
    def open(cls, folder: Path, contract: Contract, receipts: Path | None = None) -> RunStore:
        """A run to go on with."""
        path = folder / "contract.json"
        if not path.is_file():
            raise RunError(f"{folder} holds no run.")
        registry = cls(folder, receipts)
        registry._lock()
        if (found := contracts.load(path).hash) != contract.hash:
            raise RunError(
                f"{folder} is a run of the contract {found[:12]}…, not of {contract.hash[:12]}…."
            )
        shutil.rmtree(folder / "rounds" / ".half", ignore_errors=True)
        return registry

    def _lock(self) -> None:
        """For as long as this process lives; the kernel frees it however it ends."""
        end = time.monotonic() + LOCK_SECONDS  # somebody may just be looking (`is_running`)
        while (found := _try_lock(self.folder)) is None:
            if time.monotonic() > end:
                raise RunError(
                    f"Another server is carrying out the run in {self.folder}. Wait, or stop it "
                    "first.",
                    code=ErrorCode.RUN_IN_PROGRESS,
                )
            time.sleep(0.05)
        self._locked = found

    def close(self) -> None:
        """Let another process go on with the run."""
        os.close(self._locked)

    def event(self, what: str, **facts: Any) -> None:
        events.append(self.folder, what, **facts)

    def commit(
        self, server_round: int, adapter: Arrays, state: Arrays, facts: dict[str, Any]
    ) -> None:
        """Write a round and rename it into place; a half-written one is never seen."""
        rounds = self.folder / "rounds"
        half = rounds / ".half"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        for name, arrays in zip(ARRAYS, (adapter, state), strict=True):
            write_durably(half / name, _bytes(arrays))
        facts = facts | {"sha256": {name: _sha256(half / name) for name in ARRAYS}}
        write_durably(half / "round.json", json.dumps(facts, indent=1).encode())
        rename_durably(half, rounds / f"{server_round:04d}")

    def newest(self) -> Stored | None:
        """The last round that is whole. Later ones that are not are set aside, and it is said."""
        folders = (self.folder / "rounds").glob("[0-9]*")
        for folder in sorted(folders, key=lambda f: int(f.name), reverse=True):
            try:
                facts = json.loads((folder / "round.json").read_text(encoding="utf-8"))
                if any(_sha256(folder / name) != facts["sha256"][name] for name in ARRAYS):
                    raise ValueError("not what was written")
                adapter, state = (dict(load_file(folder / name)) for name in ARRAYS)
                return Stored(int(facts["round"]), adapter, state, facts)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError):
                aside = folder.with_name(f".damaged-{folder.name}-{time.time_ns()}")
                folder.rename(aside)
                self.event("damaged", round=int(folder.name), aside=aside.name)
        return None

    def keep_agreement(self, agreed: Agreed) -> None:
        """Write the agreement on keys that is in force."""
        blobs = {f"keys/{site}": data for site, data in agreed.keys.items()}
        for receiver, sealed in agreed.sealed.items():
            blobs |= {f"sealed/{receiver}/{sender}": data for sender, data in sealed.items()}
        write_durably(
            self.folder / AGREEMENT,
            save(
                {name: np.frombuffer(data, dtype=np.uint8) for name, data in blobs.items()},
                {"first": str(agreed.first), "attempt": str(agreed.attempt)},
            ),
        )

    def agreement(self) -> Agreed | None:
        """The agreement on keys that was in force, if there is a whole one."""
        try:
            with safe_open(self.folder / AGREEMENT, "np") as file:
                facts = file.metadata()
                blobs = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
            found = Agreed(int(facts["first"]), int(facts["attempt"]), {}, {})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            self.event("damaged", agreement=True)
            return None
        for name, data in blobs.items():
            kind, *who = name.split("/")
            if kind == "keys":
                found.keys[who[0]] = data
            else:
                found.sealed.setdefault(who[0], {})[who[1]] = data
        return found

    def keep_survivors(self, server_round: int, adapter: str, sites: Collection[str]) -> None:
        """Note whose masked updates a round's sum is of: the sites open none of others that began
        with the same adapter, be it in this round or in a later one.

        adapter: its digest (common/protocol/tensors.py).
        """
        facts = {"round": server_round, "adapter": adapter, "survivors": sorted(sites)}
        write_durably(self.folder / SURVIVORS, json.dumps(facts).encode())

    def forget_survivors(self) -> None:
        (self.folder / SURVIVORS).unlink(missing_ok=True)

    def survivors(self, adapter: str) -> set[str] | None:
        """The sites noted for the last sum, if it began with this adapter; None otherwise."""
        try:
            facts = json.loads((self.folder / SURVIVORS).read_text(encoding="utf-8"))
            if facts["adapter"] == adapter:
                return set(facts["survivors"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def release(self, adapter: Arrays) -> Path:
        """Write the run's final adapter."""
        path = self.folder / "adapter.safetensors"
        write_durably(path, _bytes(adapter))
        return path

    def adapter(self) -> Arrays:
        """The released adapter; RunError if the run has none."""
        path = self.folder / "adapter.safetensors"
        if not path.is_file():
            raise RunError(f"{self.folder} has no released adapter: the run did not finish.")
        return dict(load_file(path))

    def receipt(self, public: str) -> Receipt | None:
        """The last receipt signed by the key `public`; RunError if the file is damaged."""
        path = self._receipts / f"{public}.json"
        try:
            return Receipt.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise RunError(
                f"{path} is damaged. It shows where a site's ledger stood; restore it from a "
                "backup, or delete it if there is none."
            ) from None

    def keep_receipt(self, public: str, receipt: Receipt) -> None:
        self._receipts.mkdir(parents=True, exist_ok=True)
        write_durably(self._receipts / f"{public}.json", receipt.model_dump_json().encode())

    def rounds(self) -> list[dict[str, Any]]:
        """The facts of each committed round, in order."""
        return [
            json.loads((folder / "round.json").read_text(encoding="utf-8"))
            for folder in sorted((self.folder / "rounds").glob("[0-9]*"), key=lambda f: int(f.name))
        ]


def is_running(folder: Path) -> bool:
    """Whether a process carries out the run in this folder."""
    if (found := _try_lock(folder)) is None:
        return True
    os.close(found)
    return False


def died(folder: Path, found: RunStatus) -> bool:
    """Whether the process that carried out the run in this folder ended and did not say so.

    found: what the run's events say.
    """
    if not found.planned or found.why or found.released:
        return False
    return not (folder / "adapter.safetensors").is_file() and not is_running(folder)


def _try_lock(folder: Path) -> int | None:
    return try_lock(folder / ".lock")


def _bytes(arrays: Arrays) -> bytes:
    # safetensors writes the memory as it lies: a transposed view would come back garbled.
    return save({name: np.asarray(a, order="C") for name, a in arrays.items()})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
