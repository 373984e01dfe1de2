"""How a failure is told: every error in one form, as text or with --json as one JSON object."""

from __future__ import annotations

import errno
import json
import os
import pickle
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from silotune.common.cli.failure import Failure, wants_json
from silotune.common.errors import (
    CODES,
    ContractError,
    DataError,
    ErrorCode,
    RefusalError,
    RunError,
    SilotuneError,
)
from tests.conftest import TABLE_CONTRACT, Ran

Silotune = Callable[..., Ran]
USAGE_ERRORS = {
    "contrakt": ("E101", "There is no command 'contrakt'. Did you mean 'contract'? Known: adapter"),
    "contract shwo": ("E101", "There is no command 'contract shwo'. Did you mean 'show'? Known: "),
    "--nope": ("E101", "There is no option '--nope' of `silotune`. Known: --debug, --version, "),
    "contract show --jsn x": (
        "E101",
        "There is no option '--jsn' of `silotune contract show`. Did you mean '--json'?",
    ),
    "contract show": ("E106", "`silotune contract show` lacks FILE|RUN|RECIPE: "),
    "explain": ("E106", "`silotune explain` lacks CODE: "),
    "server init": ("E106", "`silotune server init` lacks --host: The name or address that "),
    "contract show a b": (
        "E106",
        "Got unexpected extra argument (b). Usage: `silotune contract show [OPTIONS] FILE|",
    ),
    "contract schema else": (
        "E106",
        "FILE of `silotune contract schema`: 'else' is not one of 'contract', 'site', 'server', "
        "'recipe', 'study'. `silotune contract schema --help` describes it.",
    ),
    "server init --host a --port x": (
        "E106",
        "--port of `silotune server init`: 'x' is not a valid integer. `silotune server init "
        "--help` describes it.",
    ),
    "server init --host": ("E106", "Option '--host' requires an argument. The command's --help "),
    "contract show x --json=1": ("E106", "Option '--json' does not take a value. The command's "),
}


@pytest.mark.parametrize("words", USAGE_ERRORS)
def test_an_error_of_the_command_line_is_one_sentence_with_a_code(
    run: Silotune, words: str
) -> None:
    code, sentence = USAGE_ERRORS[words]
    status, out, err = run(*words.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"✗ {code} {sentence}")


@pytest.mark.parametrize("words", ["contract show /none.toml", "contract show", "server init"])
def test_with_json_an_error_is_one_object(run: Silotune, words: str) -> None:
    _, _, text = run(*words.split())
    status, out, err = run(*words.split(), "--json")
    assert (status, out, err.count("\n")) == (2, "", 1)
    found = json.loads(err)["error"]
    assert found.keys() == {"code", "message", "exit_code"}
    assert text == f"✗ {found['code']} {found['message']}\n"
    assert found["exit_code"] == 2


def test_with_json_every_problem_of_a_contract_is_listed(run: Silotune, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(TABLE_CONTRACT.replace("8.0", "-8.0").replace("quorum", "quorumm"))
    status, out, err = run("contract", "show", path, "--json")
    found = json.loads(err)["error"]
    assert (status, out, found["code"], len(found["problems"])) == (2, "", "E103", 3)
    assert found["message"] == "\n".join(found["problems"])


def test_all_that_sites_would_refuse_stands_on_lines_of_its_own(
    run: Silotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [RefusalError("The first.", code="E208"), RefusalError("The second.")]
    monkeypatch.setattr(
        "silotune.client.operations.contract_check.problems", lambda *_: list(refusals)
    )
    path = tmp_path / "small.toml"
    path.write_text(TABLE_CONTRACT)
    assert run("contract", "validate", path) == (1, "", "✗ E208 The first.\nThe second.\n")
    found = json.loads(run("contract", "validate", path, "--json")[2])["error"]
    assert found["problems"] == ["The first.", "The second."]


def test_a_word_that_is_no_option_asks_for_no_json() -> None:
    assert wants_json(["contract", "show", "x", "--json"])
    assert not wants_json(["contract", "show", "--", "--json"])


def test_json_holds_no_value_that_is_for_the_owners_screen() -> None:
    failure = Failure.of(DataError("Row 2 does not fit.", code="E302", local="it has 'Maria'"))
    assert "Maria" in failure.text()
    assert json.loads(failure.json()) == {
        "error": {"code": "E302", "message": "Row 2 does not fit.", "exit_code": 1}
    }


@pytest.mark.parametrize(
    ("error", "code", "exit_code"),
    [
        (RunError("It stopped.", code="E402"), "E402", 1),
        (ContractError(["a", "b"]), "E103", 2),
        (OSError(errno.EACCES, "Permission denied", "run.json"), "E105", 1),
        (ValueError("'Maria K.'"), "E500", 1),
        (click.ClickException("It does not fit."), "E106", 2),
    ],
)
def test_every_error_has_a_code_and_an_exit_code(
    error: Exception, code: str, exit_code: int
) -> None:
    failure = Failure.of(error)
    assert (failure.code, failure.exit_code) == (code, exit_code)
    assert code in CODES
    assert failure.text().startswith(f"✗ {code} ")
    assert "Maria" not in failure.text() + failure.json()


def test_an_error_whose_words_were_changed_is_told_in_the_new_ones() -> None:
    error = DataError("performance.device is 'cuda'.", code="E309")
    error.args = ("device is 'cuda'.",)
    assert Failure.of(error).text() == "✗ E309 device is 'cuda'."


# Colours


def on_a_terminal(*words: str, **environment: str) -> str:
    """What `silotune words` writes to a terminal."""
    ours, its = pty.openpty()
    inherited = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    start = f"from silotune.common.cli.main import main; import sys; sys.argv = {words!r}; main()"
    done = subprocess.run(
        [sys.executable, "-c", start],
        stdin=subprocess.DEVNULL,
        stdout=its,
        stderr=its,
        env=inherited | environment,
        check=False,
    )
    os.close(its)
    said = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode in (0, 1, 2)
    return said.replace("\r\n", "\n")


def test_signs_have_colours_on_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(TABLE_CONTRACT.replace('"small"', '"small! ✗ x"'))
    assert on_a_terminal("silotune", "contrakt").startswith("\x1b[31m✗\x1b[0m E101 There is no ")
    said = on_a_terminal("silotune", "sim", "ls")
    assert said.count("\x1b[") == 2
    assert "\n\x1b[36mnext:\x1b[0m   silotune sim show " in said


def test_no_colour_where_nobody_wants_or_sees_it(run: Silotune) -> None:
    for environment in ({"NO_COLOR": "1"}, {"NO_COLOR": "0"}):
        assert on_a_terminal("silotune", "contrakt", **environment).startswith("✗ E101 There ")
    assert run("contrakt")[2].startswith("✗ E101 There ")


def test_a_colour_is_nothing_that_a_text_can_have() -> None:
    said = on_a_terminal("silotune", "contract", "show", "\x1b[31mred\x1b[0m")
    assert said.count("\x1b[") == 2
    assert "\\x1b[31mred" in said


@pytest.mark.parametrize(
    "error",
    [
        ContractError(["small.toml line 3: first.", "small.toml line 9: second."]),
        DataError("A row is wrong.", code=ErrorCode.SCHEMA_MISMATCH, local="line 7"),
        RefusalError("The budget is spent.", code=ErrorCode.BUDGET_EXCEEDED),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_pickling(error: SilotuneError) -> None:
    found = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)
