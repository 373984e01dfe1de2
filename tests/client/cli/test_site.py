"""`silotune site` and `silotune privacy`, from an empty folder to a verified ledger."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from silotune.client.privacy import accountant
from silotune.client.privacy.reply_store import ReplyStore
from silotune.client.relay import transport
from silotune.client.site.folder import SiteFolder
from silotune.client.training.local_state import LocalState
from silotune.client.worker.worker import Worker
from silotune.common.cli.main import silotune
from silotune.common.contract.contract import Contract
from silotune.common.errors import SilotuneError
from silotune.common.models.factory import build
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Message, Train, Update

Rows = Callable[..., Path]
Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path, code: int = 0) -> Result:
        result = CliRunner().invoke(silotune, [str(word) for word in words])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return call


@pytest.fixture
def site(run: Run, table_contract: Contract, write_rows: Rows, tmp_path: Path) -> SiteFolder:
    """A site in folder `north` that is ready for contract.json."""
    (tmp_path / "contract.json").write_text(table_contract.model_dump_json())
    run("site", "init", "--name", "north", "--folder", "north", "--data", "rows.csv")
    write_rows(tmp_path / "north" / "rows.csv", 120).chmod(0o600)
    found = SiteFolder(tmp_path / "north" / "site.toml")
    edit(found, "contracts = []", f'contracts = ["{table_contract.hash}"]')
    edit(found, 'duplicate_records = "refuse"', 'duplicate_records = "keep"')
    run("site", "sign", "--config", found.config)
    return found


def edit(site: SiteFolder, old: str, new: str) -> None:
    text = site.config.read_text()
    assert old in text
    site.config.write_text(text.replace(old, new))


def checks(run: Run, site: SiteFolder, code: int = 0) -> dict[str, dict[str, Any]]:
    result = run("site", "check", "contract.json", "--config", site.config, "--json", code=code)
    return {row["name"]: row for row in json.loads(result.output)["checks"]}


def train(site: SiteFolder, contract: Contract, rounds: int) -> None:
    policy, ledger, _ = site.open()
    worker = Worker(policy, contract, ledger)
    for number in range(1, rounds + 1):
        header = Train(contract=contract.hash, run="r", round=number)
        wire = worker.handle(messages.pack(Message(header, worker.model.initial_arrays())))
        assert isinstance(messages.unpack(wire).header, Update)


def test_what_init_makes_is_its_users_alone(site: SiteFolder) -> None:
    for path in (site.keys, site.state, site.relay, site.state / "replies"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        for file in path.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file
    assert stat.S_IMODE(site.folder.stat().st_mode) == 0o700


def test_init_does_not_touch_a_site_that_is_there(run: Run, site: SiteFolder) -> None:
    before = site.config.read_text()
    run("site", "init", "--name", "north", "--folder", "north", code=1)
    site.config.unlink()
    result = run("site", "init", "--name", "north", "--folder", "north", code=1)
    assert isinstance(result.exception, SilotuneError)
    assert result.exception.code == "E214"
    assert "hospital" not in before


@pytest.mark.parametrize("name", ["", "../x", "a\nb", "x" * 65, '"'])
def test_init_refuses_a_bad_name(run: Run, name: str) -> None:
    result = run("site", "init", "--name", name, code=1)
    assert isinstance(result.exception, SilotuneError)
    assert result.exception.exit_code == 2


def test_a_file_name_with_quotes_stays_one(run: Run, tmp_path: Path) -> None:
    run("site", "init", "--name", "x", "--folder", "x", "--data", 'a"b\\c.csv')
    from silotune.client.site import policy

    assert policy.load(tmp_path / "x" / "site.toml").data.file == tmp_path / "x" / 'a"b\\c.csv'


def test_what_is_read_otherwise_than_it_stands_is_a_warning_of_check(
    run: Run, site: SiteFolder
) -> None:
    file = site.folder / "rows.csv"
    lines = file.read_text().splitlines()
    file.write_text(
        "\n".join([lines[0] + ",note", *(f"{line},a" for line in lines[1:-1]), f"{lines[-1]},b\0"])
    )
    file.chmod(0o600)
    found = checks(run, site)
    assert found["columns"]["state"] == "ok"
    assert found["rows"]["state"] == "warning"
    assert f"control characters stand in row {len(lines)}" in found["rows"]["result"]


def test_a_ready_site_is_told_so_and_nothing_is_spent(run: Run, site: SiteFolder) -> None:
    result = run("site", "check", "contract.json", "--config", site.config)
    assert "Ready: 0 problems" in result.output
    assert "next:" in result.output
    assert {row["state"] for row in checks(run, site).values()} <= {"ok", "warning"}
    assert not site.open()[1].charges


BROKEN: dict[str, tuple[Callable[[SiteFolder], object], str, str]] = {
    "an unsigned change": (
        lambda s: edit(s, "epsilon = 8.0", "epsilon = 9.0"),
        "signature",
        "E213",
    ),
    "a contract not permitted": (
        lambda s: edit(s, "contracts = [", "models = [] #"),
        "permission",
        "E201",
    ),
    "a loose clip norm": (
        lambda s: edit(s, "max_clip_norm = 1.0", "max_clip_norm = 0.5"),
        "permission",
        "E205",
    ),
    "data open to others": (lambda s: (s.folder / "rows.csv").chmod(0o644), "data access", "E301"),
    "no data": (lambda s: (s.folder / "rows.csv").unlink(), "data", "E301"),
    "an unknown column": (lambda s: edit(s, "key = []", 'key = ["agee"]'), "record key", "E302"),
    "rows that repeat": (lambda s: edit(s, '"keep"', '"refuse"'), "records", "E307"),
    "too few rows": (
        lambda s: edit(s, "min_records = 100", "min_records = 121"),
        "records",
        "E304",
    ),
    "a small budget": (
        lambda s: edit(s, "epsilon = 8.0", "epsilon = 4.0"),
        "privacy budget",
        "E210",
    ),
    "an open key": (lambda s: (s.keys / "secret.key").chmod(0o640), "keys", "E214"),
    "no ledger": (lambda s: (s.state / "ledger.sqlite").unlink(), "ledger", "E212"),
    "a typing error": (lambda s: edit(s, "min_sites = 2", "min_sits = 2"), "policy", "E103"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_check_finds(run: Run, site: SiteFolder, what: str) -> None:
    harm, row, code = BROKEN[what]
    if what == "a contract not permitted":
        edit(site, "models = []", "")
    harm(site)
    found = checks(run, site, code=1)
    assert (found[row]["state"], found[row]["code"]) == ("problem", code)


def test_check_finds_everything_at_once(run: Run, site: SiteFolder) -> None:
    (site.folder / "rows.csv").chmod(0o644)
    edit(site, "max_clip_norm = 1.0", "max_clip_norm = 0.5")
    edit(site, '"keep"', '"refuse"')
    found = checks(run, site, code=1)
    assert {name for name, row in found.items() if row["state"] == "problem"} == {
        "signature",
        "permission",
        "data access",
        "records",
    }


def test_delta_is_held_against_the_sites_own_number_of_records(
    run: Run, site: SiteFolder, table_contract: Contract, write_rows: Rows
) -> None:
    """A budget of delta 5e-3 for 120 records is 0.6, for 240 records 1.2; a run of 1e-4 is small.
    The number of records is on the owner's screen only, never in JSON, and the remedy works."""
    edit(site, "delta = 1e-4\n\n", "delta = 5e-3\n\n")
    run("site", "sign", "--config", site.config)
    rows = checks(run, site)
    assert rows["delta of the run"]["state"] == "ok"
    row = rows["delta of the budget"]
    assert (row["state"], row["code"]) == ("warning", "")
    assert "120" not in row["result"] + row["fix"]
    assert {row["local"] for row in rows.values()} == {""}
    screen = run("site", "check", "contract.json", "--config", site.config).output
    assert "120 records times 0.005 is 0.6; delta should be 0.0001." in " ".join(screen.split())
    write_rows(site.folder / "rows.csv", 240).chmod(0o600)
    row = checks(run, site, code=1)["delta of the budget"]
    assert (row["state"], row["code"]) == ("problem", "E205")
    sign = f"then: silotune site sign --config {site.config}"
    assert row["fix"] == f"set delta in [budgets.record] of {site.config}, {sign}"
    edit(site, "delta = 5e-3\n\n", "delta = 1e-4\n\n")
    run("site", "sign", "--config", site.config)
    assert checks(run, site)["delta of the budget"]["state"] == "ok"


def test_delta_of_a_run_is_refused_where_it_protects_nobody_unless_the_contract_says_so(
    run: Run, site: SiteFolder, table_contract: Contract, write_rows: Rows
) -> None:
    write_rows(site.folder / "rows.csv", 240).chmod(0o600)
    edit(site, "delta = 1e-4\n\n", "delta = 5e-3\n\n")
    run("site", "sign", "--config", site.config)
    for allowed, state, code in ((None, "problem", 1), (True, "warning", 1)):
        loose = table_contract.changed(privacy={"delta": 5e-3, "allow_large_delta": allowed})
        Path("contract.json").write_text(loose.model_dump_json())
        rows = checks(run, site, code=code)  # also for its hash, which the policy does not permit
        assert rows["delta of the run"]["state"] == rows["delta of the budget"]["state"] == state
        assert rows["delta of the budget"]["fix"].startswith("first the contract's delta")


def test_what_would_fit_does_fit(run: Run, site: SiteFolder, table_contract: Contract) -> None:
    edit(site, "epsilon = 8.0", "epsilon = 6.0")
    fix = checks(run, site, code=1)["privacy budget"]["fix"]
    epsilon = float(fix.split("run.epsilon = ")[1].split()[0])
    smaller = table_contract.changed(privacy={"epsilon": epsilon})
    Path("contract.json").write_text(smaller.model_dump_json())
    assert checks(run, site, code=1)["privacy budget"]["state"] == "ok"
    larger = table_contract.changed(privacy={"epsilon": epsilon + 0.05})
    Path("contract.json").write_text(larger.model_dump_json())
    assert checks(run, site, code=1)["privacy budget"]["state"] == "problem"


def test_spent_shows_what_the_ledger_holds(
    run: Run, site: SiteFolder, table_contract: Contract
) -> None:
    train(site, table_contract, 1)
    found = json.loads(run("privacy", "spent", "--config", site.config, "--json").output)
    (row,), limit = found["record_sets"], found["limits"]["record"]["epsilon"]
    assert (row["rounds"], row["runs"], row["rows"], row["not_released"]) == (1, 1, 120, 0)
    begun = [m._replace(steps=1) for m in accountant.plan(table_contract)]
    assert row["epsilon"] == accountant.plan_epsilon(begun, table_contract.privacy.delta)
    assert row["accountant"] == "exact composition"
    assert 0 < row["remaining_epsilon"] < limit
    text = run("privacy", "spent", "--config", site.config).output
    assert "rows.csv" in text
    assert "exact composition" in text


def test_the_room_is_what_still_fits(run: Run, site: SiteFolder, table_contract: Contract) -> None:
    train(site, table_contract, 1)
    spent = json.loads(run("privacy", "spent", "--config", site.config, "--json").output)
    room = spent["record_sets"][0]["remaining_epsilon"]
    for epsilon, state in ((room * 0.97, "ok"), (room * 1.03, "problem")):
        other = table_contract.changed(
            name="other",
            privacy={"epsilon": epsilon},
            phases=[{"trains": "head", "rounds": 3, "sampling_rate": 1.0, "head_lr": 0.5}],
        )
        Path("contract.json").write_text(other.model_dump_json())
        assert checks(run, site, code=1)["privacy budget"]["state"] == state


def test_a_run_that_has_begun_can_go_on_and_a_further_one_ends_early(
    run: Run, site: SiteFolder, table_contract: Contract
) -> None:
    """The limit is the contract's ε: the plan fits once, whichever runs take its steps."""
    train(site, table_contract, 1)
    row = checks(run, site)["privacy budget"]
    assert row["state"] == "warning"
    assert "together 8.00 (exact composition" in row["result"]
    assert "a further one has only the rounds that it leaves" in row["result"]
    assert "silotune server resume RUN" in row["fix"]
    edit(site, "epsilon = 8.0", "epsilon = 60.0")
    run("site", "sign", "--config", site.config)
    assert checks(run, site)["privacy budget"]["state"] == "ok"


def test_check_says_what_the_plan_can_learn(
    run: Run, site: SiteFolder, table_contract: Contract
) -> None:
    def row(epsilon: float) -> dict[str, str]:
        phase = {"trains": "head", "rounds": 3, "sampling_rate": 1.0, "head_lr": 0.5}
        other = table_contract.changed(privacy={"epsilon": epsilon}, phases=[phase])
        Path("contract.json").write_text(other.model_dump_json())
        return checks(run, site, code=1)["forecast"]

    few = row(0.5)
    assert few["state"] == "warning"
    assert "too few records for a medium signal at this ε" in few["result"]
    assert "more records at each site" in few["fix"]
    assert row(8.0)["state"] == "ok"


def test_a_second_plan_is_told_by_one_account(
    run: Run, site: SiteFolder, table_contract: Contract
) -> None:
    train(site, table_contract, 1)
    other = table_contract.changed(name="other", privacy={"epsilon": 6.0})
    Path("contract.json").write_text(other.model_dump_json())
    row = checks(run, site, code=1)["privacy budget"]
    assert row["state"] == "problem"
    assert row["result"].count("(RDP") == 1
    assert "exact composition, " not in row["result"]
    assert "what goes beyond one plan is counted by RDP" in row["result"]


def test_an_export_verifies_without_the_site(
    run: Run, site: SiteFolder, table_contract: Contract, tmp_path: Path
) -> None:
    train(site, table_contract, 1)
    file = tmp_path / "ledger.jsonl"
    result = run("privacy", "export", file, "--config", site.config)
    key = result.output.split("--public-key ")[1].strip()
    for words in ((), ("--public-key", key)):
        found = json.loads(run("privacy", "verify", file, *words, "--json").output)
        assert (found["valid"], found["charges"], found["released"]) == (True, 1, 1)
    assert b"smoker" not in file.read_bytes()
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-2], lines[-1]]))
    result = run("privacy", "verify", file, code=1)
    assert isinstance(result.exception, SilotuneError)
    assert result.exception.code == "E212"


def test_verify_walks_the_sites_own_ledger(
    run: Run, site: SiteFolder, table_contract: Contract
) -> None:
    train(site, table_contract, 1)
    found = json.loads(run("privacy", "verify", "--config", site.config, "--json").output)
    assert (found["charges"], found["released"]) == (1, 1)


def test_plan_and_its_reverse_agree(run: Run) -> None:
    words = ("--delta", "1e-5", "--sampling-rate", "0.1", "--steps", "50", "--json")
    found = json.loads(run("privacy", "plan", "--epsilon", "3", *words).output)
    sigma = found["mechanisms"][0]["noise_multiplier"]
    back = json.loads(run("privacy", "plan", "--noise-multiplier", str(sigma), *words).output)
    assert back["epsilon"] == pytest.approx(3, rel=1e-5)
    assert back["accountant"] == "exact composition"


def test_plan_of_a_contract(run: Run, site: SiteFolder, table_contract: Contract) -> None:
    found = json.loads(run("privacy", "plan", "--contract", "contract.json", "--json").output)
    assert found["epsilon"] == pytest.approx(table_contract.privacy.epsilon, rel=1e-5)
    for option in ("--epsilon", "--noise-multiplier", "--steps", "--sampling-rate", "--delta"):
        given = (option, "1" if option == "--steps" else "0.001")
        refused = run("privacy", "plan", "--contract", "contract.json", *given, code=1)
        assert f"leave out {option}, or --contract" in str(refused.exception)


@pytest.mark.parametrize(
    "words",
    [
        ("--epsilon", "nan"),
        ("--epsilon", "-1"),
        ("--epsilon", "8", "--delta", "0"),
        ("--epsilon", "8", "--sampling-rate", "2"),
        ("--epsilon", "8", "--steps", "0"),
        (),
        ("--epsilon", "1", "--noise-multiplier", "1"),
        ("--noise-multiplier", "inf"),
        ("--contract", "contract.json", "--epsilon", "3"),
    ],
)
def test_plan_refuses_what_is_no_plan(run: Run, words: tuple[str, ...]) -> None:
    result = run("privacy", "plan", *words, code=1)
    assert isinstance(result.exception, SilotuneError)
    assert result.exception.exit_code == 2


@pytest.mark.parametrize("words", [("start", "c.toml"), ("worker", "c.toml")])
def test_a_site_does_not_start_half(run: Run, site: SiteFolder, words: tuple[str, ...]) -> None:
    result = run("site", *words, "--config", site.config, code=1)
    assert isinstance(result.exception, SilotuneError)
    assert result.exception.code in ("E207", "E101")


def test_a_worker_says_its_answers_as_json_and_keeps_its_metrics(
    site: SiteFolder, table_contract: Contract, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "worker.sock"
    worker = subprocess.Popen(
        [
            Path(sys.executable).with_name("silotune"),
            "site",
            "worker",
            "contract.json",
            "--config",
            site.config,
            "--socket",
            path,
            "--log-json",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert worker.stdout is not None
        events = []
        while not events or events[-1]["event"] != "ready":
            events.append(json.loads(worker.stdout.readline()))
        assert any("privacy budget" in event["text"] for event in events)
        header = Train(contract=table_contract.hash, run="r", round=1)
        arrays = build(table_contract, None).initial_arrays()
        reply = messages.unpack(transport.ask(path, messages.pack(Message(header, arrays)), 60))
        assert isinstance(reply.header, Update)
        answered = json.loads(worker.stdout.readline())
    finally:
        worker.terminate()
        _, said = worker.communicate(timeout=60)
    assert said == ""
    assert {event["from"] for event in (*events, answered)} == {"worker"}
    assert set(answered) == {
        "at",
        "from",
        "event",
        "text",
        "kind",
        "code",
        "run",
        "round",
        "attempt",
        "seconds",
    }
    text = (site.state / "metrics" / "metrics.prom").read_text()
    assert 'silotune_site_requests_total{code="ok",kind="train"} 1.0' in text
    assert f'silotune_site_run_epsilon{{run="r"}} {reply.header.epsilon}' in text


def test_metrics_need_a_worker_that_has_run(run: Run, site: SiteFolder) -> None:
    result = run("site", "metrics", "--config", site.config, "--port", "9464", code=1)
    assert isinstance(result.exception, SilotuneError)
    assert "the site's worker makes it" in str(result.exception)
    for port in ("0", "65536", "x"):
        run("site", "metrics", "--config", site.config, "--port", port, code=2)


def test_a_sites_own_model(
    run: Run, site: SiteFolder, table_contract: Contract, tmp_path: Path
) -> None:
    """What the run left here, in the place of what was released, for `silotune adapter` to use."""
    last = table_contract.model_dump(mode="json")["phases"][-1]
    contract = table_contract.changed(
        phases=[last | {"personal": "mean-regularised", "proximal_mu": 0.1, "budget_share": 1.0}],
        aggregation={"server_momentum": 0.0},
    )
    edit(site, table_contract.hash, contract.hash)
    run("site", "sign", "--config", site.config)
    released = tmp_path / "released"
    released.mkdir()
    (released / "contract.json").write_text(contract.model_dump_json())
    words = ("site", "own", "released", "--config", site.config)
    assert "none" in str(run(*words, code=1).exception)
    train(site, contract, 2)
    assert "adapter.safetensors" in str(run(*words, code=1).exception)
    zeros = build(contract, None).initial_arrays()
    save_file(zeros | {"other": np.zeros(1, np.float32)}, released / "adapter.safetensors")
    assert "r's" not in run(*words, "--run", "s", code=1).output
    assert "own model of r: 2 of 3 tensors" in run(*words).output
    found = load_file(tmp_path / "own" / "adapter.safetensors")
    charges = site.open()[1].charges.values()
    kept = LocalState.read(ReplyStore(site.open()[1]).local_state(charges))
    assert kept.averaged
    for name in zeros:
        assert np.array_equal(found[name], kept.mean[name])
        assert found[name].any()
    assert not found["other"].any()
    for path in (tmp_path / "own", *(tmp_path / "own").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert "exists" in str(run(*words, code=1).exception)
