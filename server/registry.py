"""A run on disk. A round exists when its folder has its final name: one atomic rename commits it.

runs/<run>/contract.json  events.jsonl  rounds/0001/{adapter,state}.safetensors, round.json
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

from silotune.common.contract import Contract
from silotune.common.errors import RunError
from silotune.common.messages import Arrays, Receipt


class Registry:
    """The folder of one run; `create` refuses a folder that already holds one.

    receipts: where the sites' last receipts are kept; one folder for all runs of an operator lets
    a later run see that a site's ledger went back.
    """

    def __init__(self, folder: Path, receipts: Path | None = None) -> None:
        self.folder, self._receipts = folder, receipts or folder / "receipts"

    @classmethod
    def create(
        cls, folder: Path, contract: Contract, receipts: Path | None = None
    ) -> Registry:
        if (folder / "contract.json").exists():
            raise RunError(f"{folder} already holds a run. Name another folder, or remove it.")
        (folder / "rounds").mkdir(parents=True, exist_ok=True)
        (folder / "contract.json").write_text(
            json.dumps(contract.model_dump(mode="json"), indent=1, ensure_ascii=False),
            encoding="utf-8",
        )
        return cls(folder, receipts)

    def event(self, what: str, **facts: Any) -> None:
        """Append one event. Facts hold names, numbers and codes; no site has sent anything else."""
        line = json.dumps({"at": round(time.time(), 3), "event": what, **facts}, ensure_ascii=False)
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def commit(self, number: int, adapter: Arrays, state: Arrays, facts: dict[str, Any]) -> None:
        """Write a round and rename it into place; a half-written one is never seen."""
        rounds = self.folder / "rounds"
        half = rounds / f".{number:04d}.tmp"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        _save(adapter, half / "adapter.safetensors")
        _save(state, half / "state.safetensors")
        (half / "round.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        for path in (*half.iterdir(), half):
            _sync(path)
        half.rename(rounds / f"{number:04d}")
        _sync(rounds)

    def release(self, adapter: Arrays) -> Path:
        """Write the run's final adapter."""
        path = self.folder / "adapter.safetensors"
        half = path.with_suffix(".tmp")
        _save(adapter, half)
        _sync(half)
        half.rename(path)
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
        half = self._receipts / f".{public}.tmp"
        half.write_text(receipt.model_dump_json(), encoding="utf-8")
        _sync(half)
        half.rename(self._receipts / f"{public}.json")

    def rounds(self) -> list[dict[str, Any]]:
        """The facts of each committed round, in order."""
        return [
            json.loads((folder / "round.json").read_text(encoding="utf-8"))
            for folder in sorted((self.folder / "rounds").glob("[0-9]*"), key=lambda f: int(f.name))
        ]


def _save(arrays: Arrays, path: Path) -> None:
    # safetensors writes the memory as it lies: a transposed view would come back garbled.
    save_file({name: np.asarray(a, order="C") for name, a in arrays.items()}, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
