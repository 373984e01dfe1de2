"""`silotune contract new` on a terminal: wrong answers are asked for again, none is lost."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from silotune.common.contract import contract as contracts
from silotune.common.contract.inputs import TableInput
from tests.conftest import Ran

Answering = Callable[..., Ran]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "loans.csv"
    path.write_text("age,home,note,status\n31,rent,late,bad\n52,own,,good\n")
    return path


@pytest.fixture
def answering(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> Answering:
    """answering(answers, *words): what `silotune words` says to somebody who types the answers and
    then stops."""

    def call(answers: list[str], *words: object) -> Ran:
        typed = io.StringIO("".join(f"{answer}\n" for answer in answers))
        monkeypatch.setattr(sys, "stdin", typed)
        return run(*words)

    return call


GOOD = [
    "classification", "status", "good, bad", "-", "age: 25, 40", "home: rent, own", "-",
    "a, b", "500", "3",
]  # fmt: skip


def test_without_arguments_everything_is_asked_for(table: Path, answering: Answering) -> None:
    asked = ["none.csv", "loans.csv", "loans.csv", "loans.json", "loans.toml", *GOOD]
    code, said, wrong = answering(asked, "contract", "new", "--interactive")
    assert code == 0, wrong
    assert "✗ none.csv is no file." in wrong
    assert "✗ loans.csv is there already; name a new file." in wrong
    assert "name a file that ends in .toml, not loans.json" in wrong
    assert "Columns: age, home, note, status" in wrong
    assert said.startswith("✓ loans.toml  2 columns, 2 sites")  # questions are on standard error
    assert "! columns that the contract does not use: note\n" in said
    found = contracts.load(Path("loans.toml"))
    assert isinstance(found.input, TableInput)
    assert [column.name for column in found.input.columns] == ["age", "home"]
    assert found.privacy.epsilon == 3.0
    assert found.privacy.expected_units == 500
    assert not Path("loans.answers.json").exists()


WORDS = "contract", "new", "--interactive", "--from", "loans.csv", "--out", "loans.toml"


@pytest.mark.parametrize(
    ("place", "answer", "says"),
    [
        (0, "clasification", "Did you mean 'classification'"),
        (1, "statsu", "'statsu' is no column. Did you mean 'status'"),
        (2, "good", "Name two values at least."),
        (3, "notes", "'notes' is no column. Did you mean 'note'"),
        (4, "-", "A table needs one column at least."),
        (4, "age", "'age' says nothing of a column"),
        (4, "age: 40, 25", "The edges of column 'age' must increase"),
        (4, "agee: 25, 40", "'agee' is no column. Did you mean 'age'"),
        (5, "age: 30", "Column 'age' is named already"),
        (7, "a, a", "Each site needs a name of its own."),
        (7, "a/b", "'sites.1' must be a plain name"),
        (8, "many", "'many' is not a whole number"),
        (8, "0", "'records' must be greater than or equal to 1"),
        (9, "x", "'x' is not a number"),
        (9, "-1", "'epsilon' must be greater than 0"),
    ],
)
def test_a_wrong_answer_is_asked_for_again(
    table: Path, answering: Answering, place: int, answer: str, says: str
) -> None:
    code, _, wrong = answering([*GOOD[:place], answer, *GOOD[place:]], *WORDS)
    assert code == 0, wrong
    told = [line for line in wrong.splitlines() if "✗" in line]
    assert len(told) == 1
    assert says in told[0]
    assert contracts.load(Path("loans.toml")).privacy.epsilon == 3.0


@pytest.mark.parametrize("stop", range(1, len(GOOD)))
def test_who_stops_goes_on_with_the_same_answers(
    table: Path, answering: Answering, stop: int
) -> None:
    code, said, wrong = answering(GOOD[:stop], *WORDS)
    assert (code, said) == (130, "")
    assert not Path("loans.toml").exists()
    last = wrong.strip().splitlines()[-1]
    advice = "The answers are kept in loans.answers.json; to resume: silotune "
    assert advice in last
    again = shlex.split(last.split(advice)[1])
    code, _, wrong = answering([""] * stop + GOOD[stop:], *again, "--interactive")
    assert code == 0, wrong
    assert "The answers of before are offered in brackets" in wrong
    assert "✗" not in wrong
    found = contracts.load(Path("loans.toml"))
    assert isinstance(found.input, TableInput)
    assert [column.name for column in found.input.columns] == ["age", "home"]
    assert found.privacy.epsilon == 3.0


def test_answers_that_make_no_contract_are_kept(table: Path, answering: Answering) -> None:
    answers = [*GOOD[:2], "good, good", *GOOD[3:]]
    code, said, wrong = answering(answers, *WORDS)
    assert (code, said) == (2, "")
    assert "stands twice" in wrong
    advice = "The answers are kept in loans.answers.json; to resume: silotune contract new"
    assert advice in wrong
    assert Path("loans.answers.json").exists()
    assert not Path("loans.toml").exists()


def test_masks_are_not_drafted_and_a_contract_is_toml(table: Path, run: Callable[..., Ran]) -> None:
    words = "contract", "new", "--from", "loans.csv", "--out"
    code, _, wrong = run(*words, "loans.json", "--interactive")
    assert code == 2
    assert "name a file that ends in .toml, not loans.json" in wrong
    assert run(*words, "loans.toml", "--masked")[0] == 2
    assert "`silotune server contract` adds it" in run("contract", "new", "--help")[1]


def test_a_contract_of_one_site_is_drafted_with_a_warning(
    table: Path, answering: Answering
) -> None:
    code, said, _ = answering([*GOOD[:7], "a", *GOOD[8:]], *WORDS)
    assert code == 0
    assert "! there is one site: it refuses this contract unless its site.toml has" in said


def test_who_stops_at_once_leaves_no_file(table: Path, answering: Answering) -> None:
    code, _, wrong = answering([], *WORDS)
    assert code == 130
    assert "Stopped before the first answer: nothing was written." in wrong
    assert [path.name for path in table.parent.iterdir()] == ["loans.csv"]


def test_what_was_given_is_not_asked_for(table: Path, answering: Answering) -> None:
    options = ["--task", "regression", "--label", "age", "--text", "note", "--site", "a"]
    code, _, wrong = answering(["90, 18", "18, 90", "300", ""], *WORDS, *options)
    assert code == 0, wrong
    assert "The lowest number must be below the highest, got 90, 18." in wrong
    assert "Task" not in wrong
    assert contracts.load(Path("loans.toml")).privacy.epsilon == 8.0


def test_a_terminal_asks_and_anything_else_says_what_is_missing(
    table: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    words = "contract", "new", "--from", "loans.csv", "--out", "loans.toml"
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code, _, wrong = run(*words)
    assert code == 2
    assert "Not given: --task, --label, --labels, --records, --site, and one of" in wrong
    code, _, wrong = run("contract", "new")
    assert code == 2
    assert "Not given: --from, --out." in wrong
    monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{answer}\n" for answer in GOOD)))
    code, _, wrong = run(*words)
    assert code == 0, wrong
    monkeypatch.setattr(sys, "stdin", Terminal())
    complete = [
        "--task", "classification", "--label", "status", "--labels", "good,bad",
        "--column", "age: 25, 40", "--site", "a", "--site", "b", "--records", "500",
    ]  # fmt: skip
    code, _, wrong = run(*words[:-1], "other.toml", *complete)
    assert code == 0, wrong
    assert wrong == ""


def test_a_ranking_is_asked_for_all_it_needs(table: Path, answering: Answering) -> None:
    answers = [
        "ranking", "status", "good", "bad", "age", "note", "note, home", "a, b", "500", ""
    ]  # fmt: skip
    code, _, wrong = answering(answers, *WORDS)
    assert code == 0, wrong
    assert "A pair is two columns, got 1." in wrong
    assert contracts.load(Path("loans.toml")).task.kind == "ranking"


def test_a_file_of_somebody_elses_is_neither_deleted_nor_overwritten(
    table: Path, answering: Answering
) -> None:
    other = Path("loans.answers.json")
    other.write_text('{"quiz": ["a", "b"]}')
    code, _, wrong = answering(GOOD, *WORDS)
    assert code == 2
    assert "loans.answers.json is there and holds no answers of before" in wrong
    complete = [
        "--task", "classification", "--label", "status", "--labels", "good,bad",
        "--column", "age: 25, 40", "--site", "a", "--site", "b", "--records", "500",
    ]  # fmt: skip
    code, _, wrong = answering([], *WORDS, *complete)
    assert code == 0, wrong
    assert other.read_text() == '{"quiz": ["a", "b"]}'
