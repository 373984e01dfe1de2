"""What the sites should know of a contract is said by every command that shows or runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from silotune.common.contract import contract as contracts
from silotune.server import cli as server_cli
from silotune.server.operations import service
from silotune.simulations.comparison.progress import Progress
from silotune.simulations.execution.variants import Job
from tests.conftest import TABLE_CONTRACT, Ran
from tests.tiny import recipe_config

LARGE_DELTA = "more than 0.1: that many whole records of a site"


@pytest.fixture
def draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "draft.toml"
    path.write_text(TABLE_CONTRACT)
    warned = contracts.load(path).changed(privacy={"delta": 4e-3})
    assert len(warned.delta_warnings) == 1
    out = tmp_path / "large.json"
    out.write_text(warned.model_dump_json(exclude_none=True))
    return out


def test_the_contracts_own_commands(draft: Path, run: Callable[..., Ran]) -> None:
    for command in ("show", "validate"):
        code, out, _ = run("contract", command, draft)
        assert code == 0
        assert LARGE_DELTA in out


def test_the_operators_commands(
    draft: Path,
    run: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
    write_rows: Callable[..., Path],
) -> None:
    assert run("site", "init", "--name", "north", "--folder", "site", "--data", "rows.csv")[0] == 0
    assert run("server", "init", "--host", "127.0.0.1", "--folder", "server")[0] == 0
    _, fingerprint, _ = run("site", "fingerprint", "--config", "site/site.toml")
    code, _, err = run(
        "server",
        "add",
        "site/north.request.json",
        "--fingerprint",
        fingerprint.strip(),
        "--folder",
        "server",
    )
    assert code == 0, err
    code, out, err = run("server", "contract", draft, "--folder", "server", "--unmasked")
    assert code == 0, err
    assert LARGE_DELTA in out
    monkeypatch.setattr("silotune.server.operations.telemetry.answers", lambda *_: True)
    monkeypatch.setattr(service, "flwr", lambda *_: '{"run-id": "1"}')
    monkeypatch.setattr(server_cli, "_follow", lambda *_: Path("adapter.safetensors"))
    (made,) = Path("server/contracts").iterdir()
    code, out, err = run("server", "run", made, "--folder", "server")
    assert code == 0, err
    assert LARGE_DELTA in err


def test_a_simulation(draft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for contract in (contracts.load(draft), contracts.parse(TABLE_CONTRACT)):
        progress = Progress(recipe_config("x"), contract)
        progress.start([], [job(contract)], 1)
        progress.stop()
        shown = " ".join(capsys.readouterr().out.split())
        assert (LARGE_DELTA in shown) == bool(contract.delta_warnings)


def job(contract: contracts.Contract) -> Job:
    return Job(
        variant="a",
        repeat=0,
        contract=contract,
        folder=Path("variant"),
        model_folder=None,
        data=Path("rows"),
        federated=True,
        evaluate_every=1,
    )
