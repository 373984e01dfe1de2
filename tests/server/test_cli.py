"""`silotune server`: what each command says where it cannot do its work."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silotune.common.contract.contract import Contract
from silotune.server import cli
from silotune.server.operations.server_folder import ServerFolder, ServerSettings
from silotune.server.storage.events import Events, append
from tests import tiny
from tests.conftest import TABLE_CONTRACT, Ran
from tests.server.operations.test_server_folder import admitted

Silotune = Callable[..., Ran]
WORDS = {  # what each command needs beside --folder
    "add": ["REQUEST", "--fingerprint", "AA"],
    "fingerprint": [],
    "contract": ["draft.toml"],
    "start": [],
    "run": ["draft.toml"],
    "resume": ["r"],
    "stop": ["r"],
    "status": [],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerFolder:
    """A server in the folder `fed`, and a draft."""
    monkeypatch.chdir(tmp_path)
    Path("draft.toml").write_text(TABLE_CONTRACT)
    return ServerFolder.create(Path("fed"), ServerSettings(host="fl.example.org"))


@pytest.fixture
def agreed(place: ServerFolder, run: Silotune) -> Path:
    """The contract of a server that has both sites."""
    admitted(place, "north", "south")
    _, out, _ = run("server", "contract", "draft.toml", "--folder", "fed", "--json")
    return Path(json.loads(out)["contract"])


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What Flower is told, by a server that answers."""
    told: list[tuple[Any, ...]] = []

    def flwr(*words: Any) -> str:
        told.append(words)
        return '{"run-id": "1"}'

    monkeypatch.setattr("silotune.server.operations.telemetry.answers", lambda *_: True)
    monkeypatch.setattr("silotune.server.operations.service.flwr", flwr)
    monkeypatch.setattr(cli, "_follow", lambda where, *_: where / "adapter.safetensors")
    return told


def test_every_command_of_a_server_is_tried_without_one() -> None:
    assert WORDS.keys() == cli.server.commands.keys() - {"init"}


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("folder", ["empty", "nowhere"])
def test_a_folder_without_a_server_is_said_to_hold_none(
    name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Silotune
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "draft.toml").write_text(TABLE_CONTRACT)
    code, out, err = run("server", name, *WORDS[name], "--folder", folder)
    assert (code, out) == (2, "")
    assert err.startswith(f"✗ E102 {folder} holds no server")
    assert not list((tmp_path / "empty").iterdir())
    assert not (tmp_path / "nowhere").exists()
    *_, remedy = err.partition("in a new one: silotune ")
    known = {"HOST": "fl.example.org", "FOLDER": "new"}
    assert run(*(known.get(word, word) for word in remedy.split()))[0] == 0
    assert run("server", "status", "--folder", "new") == (0, "no run yet\n", "")


def test_a_server_of_another_user_is_no_missing_server(
    place: ServerFolder, run: Silotune, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    code, _, err = run("server", "status", "--folder", "fed")
    assert (code, err) == (
        2,
        "✗ E102 fed/server.toml cannot be read: Permission denied. Run this as the server's "
        "user.\n",
    )


def test_init_names_the_option_that_is_wrong(
    run: Silotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run("server", "init", "--host", "bad host", "--folder", "new")
    assert code == 2
    assert "'host' must be a host name or an IP address" in err
    assert 'got "bad host" (--host).' in err
    code, _, err = run("server", "init", "--host", "h", "--port", "8000", "--folder", "new")
    assert code == 2
    assert "must differ (--host, --port, --link-port, --metrics-port)." in err
    assert not Path("new").exists()


def test_a_certificate_that_is_gone_or_none_is_named(place: ServerFolder, run: Silotune) -> None:
    (place.folder / "ca.crt").write_text("nothing")
    assert "E102 fed/ca.crt holds no PEM" in run("server", "fingerprint", "--folder", "fed")[2]
    (place.folder / "ca.crt").unlink()
    assert "E102 Certificate fed/ca.crt" in run("server", "fingerprint", "--folder", "fed")[2]


@pytest.mark.parametrize("command", ["run", "resume"])
def test_a_server_that_is_not_started_is_waited_for_visibly_and_not_for_long(
    command: str, place: ServerFolder, agreed: Path, run: Silotune, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.runs / "r").mkdir()
    (place.runs / "r" / "contract.json").write_text(agreed.read_text())
    looked: list[float] = []
    monkeypatch.setattr("silotune.server.operations.telemetry.answers", lambda *_: False)
    monkeypatch.setattr(cli.time, "monotonic", lambda: float(sum(looked)))
    monkeypatch.setattr(cli.time, "sleep", looked.append)
    code, out, err = run("server", command, agreed if command == "run" else "r", "--folder", "fed")
    assert code == 1
    start = "silotune server start --folder fed"
    assert err.splitlines()[0] == f"waiting for the server ({start})"
    assert err.count("waiting") == 1
    assert "✗ E406 No server answers at 127.0.0.1:8000." in err
    assert out.startswith(f"next:   {start}")
    assert sum(looked) <= 11


def test_sites_that_are_not_in_the_roster_stop_a_run_before_it_is_submitted(
    place: ServerFolder, run: Silotune, submitted: list[Any]
) -> None:
    admitted(place, "north")
    code, _, err = run("server", "run", "draft.toml", "--folder", "fed")
    assert code == 2
    assert "The contract has no key of 'north'" in err
    assert "'south' is not in the roster: add its request with `silotune server add`" in err
    assert submitted == []


# The folder of the base model


@pytest.fixture
def of_model(place: ServerFolder, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A contract of a model, and the model's folder, which is not in the cache."""
    monkeypatch.setenv("SILOTUNE_HOME", str(Path("cache").resolve()))
    folder = tiny.folder_of("bert")
    made = tiny.contract_of("classification", "bert", folder)
    admitted(place, "north")
    file = Path("text.json")
    made = place.with_roster(made, masked=False)
    file.write_text(made.model_dump_json(exclude_none=True))
    return file, folder


@pytest.mark.usefixtures("place")
def test_a_model_that_is_nowhere_stops_a_run_before_it_is_submitted(
    of_model: tuple[Path, Path], run: Silotune, submitted: list[Any]
) -> None:
    code, _, err = run("server", "run", of_model[0], "--folder", "fed")
    assert code == 1
    assert "✗ E314 The folder of model 'tiny' is not known" in err
    assert "Name it with --model FOLDER." in err
    code, _, err = run("server", "run", of_model[0], "--folder", "fed", "--model", "fed")
    assert code == 1
    assert "✗ E310 Model folder fed has no model.safetensors" in err
    assert submitted == []


@pytest.mark.usefixtures("place", "submitted")
def test_a_packaged_model_is_found_in_the_cache(
    of_model: tuple[Path, Path], run: Silotune, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = of_model
    monkeypatch.setattr("silotune.simulations.datasets.catalog.present", {"tiny": folder}.get)
    code, _, err = run("server", "run", file, "--folder", "fed", "--run", "r")
    assert code == 0, err
    written = Path("fed/flwr/apps/r/pyproject.toml").read_text()
    assert re.search(r'^model = "(.*)"$', written, re.M)[1] == str(folder)  # type: ignore[index]


# The contract for fewer sites than its draft has


def test_a_lowered_quorum_and_missing_masks_are_said(place: ServerFolder, run: Silotune) -> None:
    text = TABLE_CONTRACT + '[[sites]]\nname = "east"\n'
    Path("draft.toml").write_text(text.replace('name = "small"', 'name = "three"'))
    admitted(place, "north")
    code, out, _ = run("server", "contract", "draft.toml", "--folder", "fed")
    assert code == 0
    assert "! quorum: 1, not 2 as in the draft" in out
    assert "! masks: none: the server sees each site's update by itself" in out
    assert "next:   silotune server add REQUEST" in out
    assert "for south, east" in out
    admitted(place, "south", "east")
    code, _, err = run("server", "contract", "draft.toml", "--folder", "fed")
    assert code == 2
    assert "the key `name` in draft.toml" in err
    code, out, _ = run("server", "contract", "draft.toml", "--folder", "fed", "--replace")
    assert code == 0
    assert "  masks: the server sees sums of at least 3 of 3 sites" in out
    assert "server add" not in out
    unmasked = run("server", "contract", "draft.toml", "--folder", "fed", "--replace", "--unmasked")
    assert "! masks" not in unmasked[1]


# Runs that ended before their first round


def test_status_shows_a_run_that_has_no_round(place: ServerFolder, run: Silotune) -> None:
    append(place.runs / "r1", "starting", token="x")
    append(place.runs / "r2", "refused", token="x", code="E314", why="No model.")
    code, out, _ = run("server", "status", "--folder", "fed")
    assert (code, out.splitlines()) == (
        0,
        ["r1   0/–   not begun", "r2   0/–   failed before its first round: E314 No model."],
    )
    rows = json.loads(run("server", "status", "--folder", "fed", "--json")[1])["runs"]
    assert [row["code"] for row in rows] == ["", "E314"]


def test_a_second_process_that_is_refused_leaves_the_run_as_it_was(
    place: ServerFolder, table_contract: Contract
) -> None:
    where = place.runs / "r"
    append(where, "run", rounds=3)
    append(where, "refused", token="x", code="E602", why="Another server carries it out.")
    (where / "contract.json").write_text(table_contract.model_dump_json())
    assert "Another server" not in cli._standing(where)["state"]


def test_a_run_that_flower_does_not_begin_is_kept(
    place: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "FIRST_SECONDS", -1.0)
    where = place.runs / "r"
    with pytest.raises(cli.RunError) as caught:
        cli._follow(where, Events(where), 3, "token")
    assert caught.value.code == "E605"
    assert cli._standing(where)["state"].startswith("failed before its first round: E605")


def test_a_run_that_is_not_there_cannot_be_stopped(place: ServerFolder, run: Silotune) -> None:
    append(place.runs / "r1", "starting", token="x")
    code, _, err = run("server", "stop", "r2", "--folder", "fed")
    assert code == 2
    assert "There is no run 'r2'. Runs: r1." in err
