"""Each `next:` line that a command prints is a command that works: every one is run here.

A line that is new fails `test_every_line_is_run` until it has a case.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from silotune.client.operations import supervisor
from silotune.common.contract.contract import Contract, parse
from silotune.common.errors import RunError
from silotune.common.models.factory import build
from silotune.server import cli as server_cli
from silotune.server.operations import service
from silotune.server.storage import events
from silotune.server.storage.run_store import RunStore
from silotune.simulations.comparison import run as simulation
from silotune.simulations.comparison.progress import Progress, adapter_step
from silotune.simulations.execution.variants import Job
from silotune.simulations.study import tuning
from silotune.simulations.study.tuning import Rows, Tuning
from silotune.simulations.verdict.differences import Difference
from tests import tiny
from tests.conftest import TABLE_CONTRACT, Ran
from tests.test_layout import PACKAGES, ROOT

Silotune = Callable[..., Ran]
LINE = re.compile(r"^next:   (?:.*then: )?silotune (.*?)(?:   \(.*\))?$", re.M)


def calls() -> set[str]:
    """Where a `next:` line is made: file and function. Text of its own that looks like one is
    found, too."""
    found = set()
    for path in sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        tree, name = ast.parse(path.read_text()), str(path.relative_to(ROOT))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        for function in functions:
            documented = ast.get_docstring(function, clean=False)
            for node in ast.walk(function):
                called = (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and (node.func.id == "next_step")
                )
                text = (
                    isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and ("next:" in node.value and node.value != documented)
                )
                if called or text:
                    found.add(f"{name}:{function.name}")
    return found - {"common/cli/main.py:next_step"}


class Scene:
    """An empty folder with a contract, and what a site and an operator make in it."""

    def __init__(self, folder: Path, silotune: Silotune, write_rows: Callable[..., Path]) -> None:
        self.folder, self._silotune = folder, silotune
        (folder / "draft.toml").write_text(TABLE_CONTRACT)
        self.write_rows = write_rows

    def says(self, *words: object, code: int = 0) -> str:
        found, out, err = self._silotune(*words)
        assert found == code, f"silotune {' '.join(map(str, words))}\n{out}{err}"
        return out

    def follow(self, said: str, **known: str) -> str:
        """Run the command of the last `next:` line; known: what its words in capitals stand for."""
        *_, line = LINE.findall(said)
        words = [known.get(word, word) for word in shlex.split(line)]
        assert not [word for word in words if re.fullmatch(r"[A-Z]{3,}|…", word)], line
        return self.says(*words)

    # a site

    def init(self) -> str:
        said = self.says(
            "site", "init", "--name", "north", "--folder", "a site", "--data", "rows.csv"
        )
        self.write_rows(self.folder / "a site" / "rows.csv", 120).chmod(0o600)
        return said

    def ready(self) -> str:
        """A site in the folder `a site` that can take part."""
        self.init()
        self.says("server", "init", "--host", "127.0.0.1", "--folder", "server")
        print_ = self.says("server", "fingerprint", "--folder", "server").strip()
        return self.says(
            "site",
            "join",
            "draft.toml",
            "--config",
            "a site/site.toml",
            "--server",
            "127.0.0.1:1",
            "--ca",
            "server/ca.crt",
            "--fingerprint",
            print_,
            "--set",
            "data.duplicate_records=keep",
        )

    # an operator

    def server(self) -> str:
        self.init()
        return self.says("server", "init", "--host", "127.0.0.1", "--folder", "server")

    def added(self) -> str:
        self.server()
        print_ = self.says("site", "fingerprint", "--config", "a site/site.toml").strip()
        return self.says(
            "server",
            "add",
            "a site/north.request.json",
            "--fingerprint",
            print_,
            "--folder",
            "server",
        )

    def add_south(self) -> None:
        made = json.loads(self.says("site", "init", "--name", "south", "--folder", "b", "--json"))
        self.says(
            "server",
            "add",
            made["request"],
            "--fingerprint",
            made["fingerprint"],
            "--folder",
            "server",
        )

    def federation(self) -> Path:
        """The contract of a server that has both of its sites."""
        self.added()
        self.add_south()
        made = self.says("server", "contract", "draft.toml", "--folder", "server", "--json")
        return Path(json.loads(made)["contract"])


@pytest.fixture
def scene(
    tmp_path: Path,
    run: Silotune,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Scene:
    """What would go on until it is stopped ends at once: both supervisors, a simulation."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(supervisor.Supervisor, "run", lambda _: 0)
    monkeypatch.setattr(service.Service, "run", lambda _: 0)
    monkeypatch.setattr(simulation, "run", lambda *_, **__: {"variants": []})
    return Scene(tmp_path, run, write_rows)


def site_init(scene: Scene) -> None:
    assert "✓" in scene.follow(scene.init())


def site_sign(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silotune.client.operations.preflight.shake", lambda _: "reached")
    monkeypatch.setattr("silotune.client.operations.node_admission.check", lambda *_: "admitted")
    assert "Ready: 0 problems" in scene.follow(scene.ready())
    said = scene.says("site", "sign", "--config", "a site/site.toml")
    assert "Ready: 0 problems" in scene.follow(said, CONTRACT="draft.toml")


def site_check(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silotune.client.operations.preflight.shake", lambda _: "reached")
    monkeypatch.setattr("silotune.client.operations.node_admission.check", lambda *_: "admitted")
    scene.ready()
    said = scene.says("site", "check", "draft.toml", "--config", "a site/site.toml")
    scene.follow(said, USER="61001", OTHER="61002")
    # Without a server the site has to join first.
    config = scene.folder / "a site" / "site.toml"
    text = config.read_text()
    config.write_text(re.sub(r"\[server\]\naddress.*\nca.*\n", "", text))
    assert config.read_text() != text
    scene.says("site", "sign", "--config", "a site/site.toml")
    said = scene.says("site", "check", "draft.toml", "--config", "a site/site.toml")
    print_ = scene.says("server", "fingerprint", "--folder", "server").strip()
    said = scene.follow(
        said,
        **{
            "HOST:PORT": "127.0.0.1:1",
            "CA": "server/ca.crt",
            "FINGERPRINT": print_,
        },
    )
    assert "--worker-user USER" in scene.follow(said)


def site_prepare(scene: Scene) -> None:
    scene.ready()
    config = scene.folder / "a site" / "site.toml"
    text = config.read_text()
    config.write_text(text.replace("min_records = 100", "min_records = 121"))
    said = scene.says("site", "prepare", "draft.toml", "--config", "a site/site.toml")
    assert "! `silotune site check` would refuse these rows." in said
    config.write_text(text)  # what that line says
    said = scene.follow(said)
    (setting,) = re.findall(r"next:   set (file = \".*?\") in \[data\]", said)
    assert 'file = "rows.csv"' in text
    config.write_text(text.replace('file = "rows.csv"', setting))
    assert "policy number 2" in scene.follow(said)
    checked = json.loads(
        scene.says("site", "check", "draft.toml", "--config", config, "--json", code=1)
    )  # no server is there
    assert {row["name"] for row in checked["checks"] if row["state"] == "problem"} == {"handshake"}


def privacy_export(scene: Scene) -> None:
    scene.ready()
    said = scene.says("privacy", "export", "a ledger.jsonl", "--config", "a site/site.toml")
    assert "verified" in scene.follow(said) or "✓" in scene.follow(said)


def contract_new(scene: Scene) -> None:
    scene.write_rows(scene.folder / "my rows.csv", 30)
    scene.follow(
        scene.says(
            "contract",
            "new",
            "--from",
            "my rows.csv",
            "--out",
            "my contract.toml",
            "--task",
            "classification",
            "--label",
            "outcome",
            "--labels",
            "0,1",
            "--column",
            "age: 40, 60",
            "--site",
            "a",
            "--site",
            "b",
            "--records",
            "200",
        )
    )


def contract_tune(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that are better and written, better and not written, and not better."""
    scene.write_rows(scene.folder / "public rows.csv", 200)
    draft = parse(TABLE_CONTRACT)
    figure = {"examples_error": 0.01, "examples_interval": (0.0, 0.2), "seeds_error": None}
    lead = Difference(0.9, 0.8, 0.1, seeds_interval=None, **figure)  # type: ignore[arg-type]
    found = Tuning(draft, "auc", Rows(1, 1, 1, 1, 1), (), 2.0, (0.9, 0.8), lead)
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: found)
    words = ["contract", "tune", "draft.toml", "--public", "public rows.csv"]
    said = scene.says(*words, "--out", "tuned rates.toml")
    assert "tuned rates.toml is valid" in scene.follow(said)
    said = scene.says(*words)
    rate = re.search(r"^best    factor 2; phase 1: (head_lr) (1)$", said, re.M)
    assert rate is not None
    text = TABLE_CONTRACT.replace("head_lr = 0.5", " = ".join(rate.groups()) + ".0")
    (scene.folder / "draft.toml").write_text(text)
    assert "next:   set these rates in draft.toml, then: silotune contract validate" in said
    assert draft.changed(phases=[draft.phases[0].model_dump() | found.rates[0]]).hash in (
        scene.follow(said)
    )
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: replace(found, difference=None))
    said = scene.says(*words)
    ran: list[Any] = []
    monkeypatch.setattr(
        simulation, "run", lambda *given, **_: ran.append(given) or {"variants": []}
    )
    scene.follow(said)
    assert ran[0][1].data == Path("public rows.csv")


def server_init(scene: Scene) -> None:
    said = scene.server()
    print_ = scene.says("site", "fingerprint", "--config", "a site/site.toml").strip()
    assert "is in the roster" in scene.follow(
        said, REQUEST="a site/north.request.json", FINGERPRINT=print_
    )


def server_add(scene: Scene) -> None:
    scene.follow(scene.added())


def server_contract(scene: Scene) -> None:
    scene.added()
    said = scene.says("server", "contract", "draft.toml", "--folder", "server")
    scene.follow(said)
    add = "\n".join(line for line in said.splitlines() if " server add " in line)
    made = json.loads(scene.says("site", "init", "--name", "south", "--folder", "b", "--json"))
    assert "south is in the roster" in scene.follow(
        add, REQUEST=made["request"], FINGERPRINT=made["fingerprint"]
    )
    scene.says("server", "contract", "draft.toml", "--folder", "server", code=2)
    again = scene.says("server", "contract", "draft.toml", "--folder", "server", "--replace")
    assert "small for north, south" in again


def no_server(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = scene.federation()
    monkeypatch.setattr(server_cli, "START_SECONDS", 0.0)
    monkeypatch.setattr("silotune.server.operations.telemetry.answers", lambda *_: False)
    scene.follow(scene.says("server", "run", contract, "--folder", "server", code=1))


def server_stop(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the run that was stopped, the resumed one ends."""
    contract = scene.federation()
    told = started(monkeypatch)
    monkeypatch.setattr(server_cli, "_follow", lambda where, *_: where / "adapter.safetensors")
    scene.says("server", "run", contract, "--folder", "server", "--run", "r")
    where = scene.folder / "server" / "runs" / "r"
    where.mkdir()
    (where / "contract.json").write_text(contract.read_text())
    said = scene.says("server", "stop", "r", "--folder", "server")
    assert told[-1] == ("stop", "17", "silotune")
    assert "adapter" in scene.follow(said)


def started(monkeypatch: pytest.MonkeyPatch, status: str = "running") -> list[tuple[str, ...]]:
    """A server that takes every run, as Flower's number 17; what it was told."""
    told: list[tuple[str, ...]] = []

    def flwr(_: Any, *words: str | Path) -> str:
        told.append(tuple(map(str, words)))
        return json.dumps({"run-id": "17", "runs": [{"status": status}]})

    monkeypatch.setattr("silotune.server.operations.telemetry.answers", lambda *_: True)
    monkeypatch.setattr(service, "flwr", flwr)
    return told


def stopped_run(scene: Scene, monkeypatch: pytest.MonkeyPatch, table_contract: Contract) -> None:
    """`server run` that stopped; the resumed one does not."""
    contract = scene.federation()
    ends: list[RunError | None] = []
    started(monkeypatch)

    def follow(where: Path, *_: Any) -> Path:
        where.mkdir(parents=True, exist_ok=True)
        (where / "contract.json").write_text(table_contract.model_dump_json())
        if (end := ends.pop(0)) is not None:
            raise end
        return where / "adapter.safetensors"

    monkeypatch.setattr(server_cli, "_follow", follow)
    scene.write_rows(scene.folder / "public rows.csv", 20)
    for sentence in ("below the quorum", f"a sum {server_cli.CLOSED_SUM}"):
        ends[:] = [RunError(sentence, code="E402"), None, None]
        said = scene.says(
            "server",
            "run",
            contract,
            "--folder",
            "server",
            "--test",
            "public rows.csv",
            "--run",
            f"r{len(sentence)}",
            code=1,
        )
        assert ("--skip-round" in said) == (server_cli.CLOSED_SUM in sentence)
        for line in re.findall(r"^next:.*$", said, re.M):
            assert "adapter" in scene.follow(line)


def recipes(scene: Scene) -> None:
    assert "four hospitals" in scene.follow(
        scene.says("sim", "ls").replace("card-fraud", "heart-diagnosis")
    )


def recipe_shown(scene: Scene) -> None:
    said = scene.says("sim", "show", "card-fraud")
    assert "card-fraud" in scene.follow(said)
    assert "next:   silotune sim run card-fraud --quick" in said


def simulated(scene: Scene, table_contract: Contract, capsys: pytest.CaptureFixture[str]) -> None:
    """A run writes its contract into its folder (tests/simulations/comparison/test_recipes.py)."""
    folder = scene.folder / "a run"
    folder.mkdir()
    (folder / "contract.json").write_text(table_contract.model_dump_json())
    progress = Progress(tiny.recipe_config("x"), table_contract)
    main = main_job(scene, table_contract, None)
    progress.start([], [main], 1)
    progress.finish(
        {
            "verdict": {"headline": "learns", "checklist": [], "lines": [], "warnings": []},
            "variants": [],
            "seconds": 1.0,
            "metric": {"name": "auc", "label": "AUC"},
            "privacy": {"sites": []},
            "recipe": "x",
            "peak_memory_bytes": 0,
        },
        folder,
    )
    said = capsys.readouterr().out.replace("\\\n" + " " * 8, "")  # as a shell reads it
    assert table_contract.hash in scene.follow(said)
    used, shown = re.findall(r"^next:.*$", said, re.M)
    assert " contract show " in shown
    assert "40 rows of north.csv" in scene.follow(used)


def main_job(scene: Scene, contract: Contract, model: Path | None, rows: str = "") -> Job:
    """A job that was carried out, on rows of the kind of task `rows`."""
    variant, split = (
        scene.folder / "a run" / "variants" / "federated-lora-0",
        scene.folder / "a split",
    )
    initial = build(contract, model).initial_arrays()
    RunStore.create(variant, contract).release(initial)
    (split / "test").mkdir(parents=True)
    if rows:
        tiny.write(split / "test" / "north.csv", tiny.rows_of(rows, 40))
    else:
        scene.write_rows(split / "test" / "north.csv", 40)
    return Job(
        "federated-lora", 0, contract, variant, model, split, federated=True, evaluate_every=1
    )


def used_adapter(scene: Scene) -> None:
    """Of a ranking, by a model that is not in the cache; of a table in `simulated`."""
    folder = tiny.folder_of("bert")
    line = adapter_step(main_job(scene, tiny.contract_of("bi", "bert", folder), folder, "bi"))
    assert "--model" in line
    assert len(scene.follow(line, QUERY="chest pain").splitlines()) == 10


def test_no_command_uses_the_adapter_of_tokens(scene: Scene) -> None:
    folder = tiny.folder_of("bert")
    job = main_job(scene, tiny.contract_of("tokens", "bert", folder), folder, "tokens")
    assert adapter_step(job) == ""


def interrupted(
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
    run: Silotune,
    *said: dict[str, Any],
    status: str = "running",
) -> str:
    """What Ctrl-C on `server run` says, when the run's process has said this before: `own` stands
    for its token. status: what Flower says of it."""
    contract = scene.federation()
    started(monkeypatch, status)

    def follow(where: Path, _: Any, __: Any, token: str) -> Path:
        for facts in said:
            own = {"token": token} if facts.get("own") else {}
            more = {k: v for k, v in facts.items() if k not in ("own", "event")}
            if facts["event"] == "taken":
                (where / "contract.json").write_text(contract.read_text())
            events.append(where, facts["event"], **more, **own)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(server_cli, "_follow", follow)
        code, _, err = run("server", "run", contract, "--folder", "server", "--run", "r")
    assert code == 130
    return err


BEGUN: tuple[dict[str, Any], ...] = (
    {"event": "starting", "own": True},
    {"event": "taken", "own": True},
    {"event": "run", "rounds": 3},
)


def test_ctrl_c_on_a_run_says_that_it_goes_on_and_how_to_stop_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, run: Silotune
) -> None:
    """With a real run, whose commands are pasted: `interrupted` in tests/system/faults.py."""
    monkeypatch.setattr("silotune.server.storage.run_store.is_running", lambda _: True)
    err = interrupted(scene, monkeypatch, run, *BEGUN)
    assert err.splitlines()[0] == (
        "Detached. The run r continues: its sites train, and each round spends ε."
    )
    said = dict(re.findall(r"^(watch|stop|resume): +(.*?)(?:   \(.*)?$", err, re.M))
    assert "r   0/3   running" in scene.says(*shlex.split(said["watch"])[1:])
    told = started(monkeypatch)
    scene.says(*shlex.split(said["stop"])[1:])
    assert told == [("stop", "17", "silotune")]
    monkeypatch.setattr(server_cli, "_follow", lambda where, *_: where / "adapter.safetensors")
    assert "adapter" in scene.says(*shlex.split(said["resume"])[1:])


def test_ctrl_c_on_a_run_that_waits_for_sites_says_so(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, run: Silotune
) -> None:
    monkeypatch.setattr("silotune.server.storage.run_store.is_running", lambda _: True)
    err = interrupted(
        scene,
        monkeypatch,
        run,
        *BEGUN,
        {
            "event": "waiting",
            "sites": ["south"],
            "refused": {},
            "nodes": {},
            "seconds": 15,
            "of": 600,
        },
    )
    assert err.startswith(
        "Detached. The run r continues: it is waiting for south, 15 s of 600, then "
        "sites train, and each round spends ε."
    )


def detached(scene: Scene, monkeypatch: pytest.MonkeyPatch, run: Silotune) -> None:
    """A run that had stopped already."""
    err = interrupted(
        scene,
        monkeypatch,
        run,
        *BEGUN,
        {"event": "stopped", "code": "E402", "why": "Too few sites."},
    )
    assert err.startswith("The run r has ended: E402 Too few sites.")
    monkeypatch.setattr(server_cli, "_follow", lambda where, *_: where / "adapter.safetensors")
    assert "adapter" in scene.follow(err)


def test_ctrl_c_on_a_run_whose_process_died_says_so(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, run: Silotune
) -> None:
    err = interrupted(scene, monkeypatch, run, *BEGUN)
    assert err.startswith("The run r has ended: E603 ")


def test_ctrl_c_on_a_run_that_was_done_names_its_adapter(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, run: Silotune
) -> None:
    err = interrupted(scene, monkeypatch, run, *BEGUN, {"event": "released"})
    assert err == "The run r is done: server/runs/r/adapter.safetensors\n"


def test_ctrl_c_on_a_run_that_failed_before_its_first_round_says_so_and_status_shows_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, run: Silotune
) -> None:
    err = interrupted(
        scene,
        monkeypatch,
        run,
        {"event": "refused", "own": True, "code": "E314", "why": "No model."},
    )
    assert err == "The run r has ended: E314 No model.\n"
    assert scene.says("server", "status", "--folder", "server") == (
        "r   0/–   failed before its first round: E314 No model.\n"
    )
    code, _, wrong = run("server", "resume", "r", "--folder", "server")
    assert code == 2
    assert "E314 No model." in wrong
    assert "server run CONTRACT --run r" in wrong


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ("pending", "Detached. The run r has not begun; Flower has it."),
        ("finished:failed", "The run r has ended: E605 Flower ended it before its first round"),
    ],
)
def test_ctrl_c_on_a_run_that_said_nothing_asks_flower_what_became_of_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, run: Silotune, status: str, says: str
) -> None:
    err = interrupted(scene, monkeypatch, run, status=status)
    assert err.startswith(says)
    assert "resume:" not in err
    listed = scene.says("server", "status", "--folder", "server")
    assert ("r   0/–   failed before its first round: E605" in listed) == ("E605" in says)


def test_ctrl_c_before_flower_has_begun_a_run_says_that_it_may_have_begun(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, run: Silotune
) -> None:
    def flwr(*_: object) -> str:
        raise KeyboardInterrupt

    contract = scene.federation()
    started(monkeypatch)
    monkeypatch.setattr(service, "flwr", flwr)
    code, _, err = run("server", "run", contract, "--folder", "server", "--run", "r")
    assert code == 130
    assert "it may have begun: silotune server status --folder server" in err


CASES: dict[str, Callable[..., None]] = {
    "client/cli/site.py:init": site_init,
    "client/cli/site.py:_sign": site_sign,
    "client/cli/site.py:check": site_check,
    "client/cli/prepare.py:_prepare": site_prepare,
    "client/cli/privacy.py:export": privacy_export,
    "common/cli/contract.py:new": contract_new,
    "common/cli/contract.py:tune": contract_tune,
    "server/cli.py:init": server_init,
    "server/cli.py:add": server_add,
    "server/cli.py:contract_": server_contract,
    "server/cli.py:_carry_out": stopped_run,
    "server/cli.py:_detached": detached,
    "server/cli.py:_reach": no_server,
    "server/cli.py:stop": server_stop,
    "simulations/cli.py:sim_ls": recipes,
    "simulations/cli.py:sim_show": recipe_shown,
    "simulations/comparison/progress.py:adapter_step": used_adapter,
    "simulations/comparison/progress.py:finish": simulated,
}


def test_every_line_is_run() -> None:
    assert calls() == set(CASES)


@pytest.mark.parametrize("where", CASES)
def test_the_next_step_works(where: str, scene: Scene, request: pytest.FixtureRequest) -> None:
    case = CASES[where]
    names = [n for n in case.__code__.co_varnames[: case.__code__.co_argcount] if n != "scene"]
    case(scene, **{name: request.getfixturevalue(name) for name in names})
