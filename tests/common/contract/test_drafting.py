"""A contract from a header and answers: it is valid, and no value of the table has a part in it."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from silotune.common.contract import drafting
from silotune.common.contract.contract import Contract, parse
from silotune.common.contract.drafting import Answers, Column
from silotune.common.contract.inputs import NumberColumn, TableInput
from silotune.common.contract.model import EncoderModel
from silotune.common.contract.privacy import Entity
from silotune.common.data.text_decoding import Reading
from silotune.common.errors import UsageError
from silotune.common.planning import head_rule
from silotune.common.planning.adapter_rule import LEAST_RATIO, AdapterPlan
from silotune.common.planning.public_sentences import SENTENCES
from silotune.simulations.comparison.options import Options
from tests.common.data.test_text_decoding import (
    csv_text,
    json_text,
    write_parquet,
    write_text,
    write_xlsx,
)

FUZZ = settings(deadline=None, max_examples=60, derandomize=True, database=None)
SITES = {"sites": ("a", "b"), "records": 500}
TABLE = {
    "name": "loans",
    "task": "classification",
    "label": "status",
    "labels": ("good", "bad"),
    "columns": (
        Column.parse("age: 25, 40.5"),
        Column.parse("Home status: rent, own, with parents"),
    ),
    **SITES,
}


def test_a_table() -> None:
    found = parse(drafting.draft(Answers.model_validate(TABLE)))
    assert isinstance(found.input, TableInput)
    age, home = found.input.columns
    assert isinstance(age, NumberColumn)
    assert age.words == ("below 25", "25 to 40.5", "40.5 or more")
    assert (home.phrase, home.choices) == ("home status", ("rent", "own", "with parents"))
    assert [label.values for label in found.task.labels] == [("good",), ("bad",)]  # type: ignore[union-attr]
    assert (found.privacy.expected_units, found.quorum) == (500, 2)


TEXT = {"columns": (), "text": "message"}


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({**TEXT}, "classification"),
        ({**TEXT, "task": "multi-label"}, "multi-label"),
        ({**TEXT, "task": "tokens", "labels": ("Disease",)}, "tokens"),
        ({**TEXT, "task": "language", "labels": ()}, "language"),
        ({"task": "regression", "labels": (), "bounds": (0.0, 1e5), "log": True}, "regression"),
        (
            {
                "task": "ranking",
                "labels": ("4", "5"),
                "others": ("1",),
                "columns": (),
                "query": "who",
                "pair": ("user", "item"),
            },
            "ranking",
        ),
    ],
)
def test_each_task(more: dict[str, object], kind: str) -> None:
    found = parse(drafting.draft(Answers.model_validate(TABLE | more)))
    assert found.task.kind == kind


def test_an_entity() -> None:
    answers = Answers.model_validate(TABLE | {"entity": ("patient",), "max_records_per_entity": 4})
    found = parse(drafting.draft(answers)).privacy
    assert found.entity == Entity(key=("patient",), max_records_per_entity=4)


@FUZZ
@given(st.integers(1, 100_000_000))
@example(1_000)
@example(1_001)
@example(2_000_000)
def test_a_drafted_delta_is_the_largest_power_of_ten_for_the_records(records: int) -> None:
    found = parse(drafting.draft(Answers.model_validate(TABLE | {"records": records})))
    delta = Decimal(repr(found.privacy.delta))
    assert delta <= Decimal("1e-4")
    assert delta * 10 * records <= 1
    assert delta == Decimal("1e-4") or delta * 10 * 10 * records > 1
    assert delta.normalize().as_tuple().digits == (1,)
    assert found.delta_warnings == []


@FUZZ
@given(st.integers(1, 10_000_000), st.floats(-9, -2.01))
@example(1_000, -4.0)
@example(10_000, -4.0)
@example(10_000, -5.0)
@example(999, -3.0)
def test_a_delta_that_protects_nobody_is_refused(records: int, log_delta: float) -> None:
    """Drafted with a delta of the user's own: a warning above 0.1 / records, refused from 1 /
    records on; the delta that either sentence names is accepted without a word."""
    delta = float(f"{10**log_delta:.6g}")
    answers = TABLE | {"records": records, "delta": delta}
    product = Decimal(repr(delta)) * records
    if product < 1:
        warnings = parse(drafting.draft(Answers.model_validate(answers))).delta_warnings
        assert bool(warnings) == (product > Decimal("0.1"))
        if not warnings:
            return
        (sentence,) = warnings
    else:
        with pytest.raises(UsageError, match="allow_large_delta") as refused:
            drafting.draft(Answers.model_validate(answers))
        sentence = str(refused.value)
        text = drafting.draft(Answers.model_validate(TABLE | {"records": records})).replace(
            "clip_norm", "allow_large_delta = true\nclip_norm"
        )
        allowed = parse(text).changed(privacy={"delta": delta})
        assert len(allowed.delta_warnings) == 1
    named = float(re.findall(r"Set delta to ([0-9.e-]+[0-9])", sentence)[0])
    followed = parse(drafting.draft(Answers.model_validate(answers | {"delta": named})))
    assert followed.delta_warnings == []


def test_a_sites_own_delta_counts_too() -> None:
    found = parse(drafting.draft(Answers.model_validate(TABLE)))
    with pytest.raises(UsageError, match=r"delta = 0\.005 times expected_units = 500"):
        found.changed(sites=[{"name": "a"}, {"name": "b", "delta": 5e-3}])
    assert found.changed(sites=[{"name": "a"}, {"name": "b", "delta": 5e-4}]).delta_warnings


def test_a_contract_without_privacy_has_no_delta_to_compare() -> None:
    found = parse(drafting.draft(Answers.model_validate(TABLE)))
    plain = found.changed(privacy={"mode": "none", "expected_units": 1e6, "delta": 1e-4})
    assert plain.delta_warnings == []


names = (
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
    .map(str.strip)
    .filter(bool)
)


@FUZZ
@given(st.lists(names, min_size=2, max_size=4, unique=True), names)
def test_any_words_give_a_valid_contract(values: list[str], column: str) -> None:
    """Quotes, backslashes, braces and other scripts in names and values."""
    if len({value.strip() for value in values}) < len(values) or column == "status":
        return
    given_answers = TABLE | {"columns": (Column(name=column, values=tuple(values)),)}
    found = parse(drafting.draft(Answers.model_validate(given_answers)))
    assert found.columns == (column,)
    assert found.input.columns[0].choices == tuple(values)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("age", "says nothing"),
        ("age:", "says nothing"),
        ("age: 40, 30", "must increase"),
        ("sex: male", "two values"),
    ],
)
def test_a_column_that_says_too_little(answer: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Column.parse(answer)


Ran = tuple[int, str, str]
CANARY = "canary-7731"
WORDS = [
    "--task",
    "classification",
    "--label",
    "status",
    "--labels",
    "good,bad",
    "--column",
    "age: 30, 50",
    "--site",
    "a",
    "--site",
    "b",
    "--records",
    "100",
]


def table(folder: Path) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows([["age", "status"], [CANARY, "good"], ["41", CANARY]])
    path = folder / "loans.csv"
    path.write_text(text.getvalue())
    return path


def new(path: Path, out: Path, *more: str) -> list[str]:
    return ["contract", "new", "--from", str(path), "--out", str(out), *more]


def test_the_command_reads_the_header_alone(tmp_path: Path, run: Callable[..., Ran]) -> None:
    path, out, again = table(tmp_path), tmp_path / "loans.toml", tmp_path / "again.toml"
    code, said, wrong = run(*new(path, out, *WORDS))
    assert code == 0, wrong
    drafted = out.read_text()
    assert CANARY not in drafted + said + wrong
    assert "next:   silotune sim run" in said
    path.write_text("age,status\n1,2\n")  # other rows, the same header: the same contract
    assert run(*new(path, again, "--name", "loans", *WORDS))[0] == 0
    assert again.read_text() == drafted


def test_commands_warn_of_a_large_delta(tmp_path: Path, run: Callable[..., Ran]) -> None:
    out = tmp_path / "loans.toml"
    more = ("--records", "5000", "--delta", "1e-4")
    for command in (
        new(table(tmp_path), out, *WORDS, *more),
        ["contract", "show", str(out)],
        ["contract", "validate", str(out)],
    ):
        code, said, _ = run(*command)
        assert code == 0
        assert "! privacy.delta = 0.0001 times expected_units = 5000 is 0.5" in said
    code, said, _ = run("contract", "validate", str(out), "--json")
    assert len(json.loads(said)["warnings"]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--task", "sorting"], "task"),
        (["--records", "0"], "records"),
        (["--epsilon", "-1"], "epsilon"),
    ],
)
def test_wrong_answers(
    tmp_path: Path, run: Callable[..., Ran], change: list[str], words: str
) -> None:
    out = tmp_path / "loans.toml"
    code, said, wrong = run(*new(table(tmp_path), out, *WORDS, *change))
    assert code == 2, said
    assert words in wrong
    assert CANARY not in said + wrong
    assert not out.exists()


def test_a_first_line_that_is_a_record_is_shown_to_its_owner_alone(
    tmp_path: Path, run: Callable[..., Ran]
) -> None:
    path, out = tmp_path / "loans.csv", tmp_path / "loans.toml"
    path.write_text(f"63,{CANARY}\n")
    code, said, wrong = run(*new(path, out, *WORDS))
    assert code == 1
    sentence, local = wrong.splitlines()
    assert "Column 'age' is not in loans.csv." in sentence
    assert CANARY not in said + sentence
    assert local.strip().startswith("on your screen only:")
    assert not out.exists()


def test_what_is_missing_is_told_where_nobody_can_be_asked(
    tmp_path: Path, run: Callable[..., Ran]
) -> None:
    code, _, wrong = run(*new(table(tmp_path), tmp_path / "x.toml"))
    assert code == 2
    for word in (
        "--task",
        "--label",
        "--labels",
        "--records",
        "--site",
        "and one of --text, --column, --pair",
    ):
        assert word in wrong


def test_no_file_is_written_over(tmp_path: Path, run: Callable[..., Ran]) -> None:
    out = tmp_path / "loans.toml"
    out.write_text("mine")
    assert run(*new(table(tmp_path), out, *WORDS))[0] == 2
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("notes.csv", []),
        ("notes.csv", ["--encoding", "cp1252"]),
        ("notes.tsv", []),
        ("notes.csv.gz", ["--delimiter", ";"]),
        ("notes.xlsx", []),
        ("notes.jsonl", []),
        ("notes.parquet", []),
    ],
)
def test_a_header_is_read_from_every_kind_of_file(
    tmp_path: Path, run: Callable[..., Ran], name: str, more: list[str]
) -> None:
    rows = [["a;b – é", "outcome"], *[["x " * 120, "yes"], ["y", "no"]] * 3]
    path, out = tmp_path / name, tmp_path / "notes.toml"
    if name.endswith("xlsx"):
        write_xlsx(path, rows)
    elif name.endswith("jsonl"):
        path.write_text(json_text(rows))
    elif name.endswith("parquet"):
        write_parquet(path, rows)
    else:
        delimiter = "\t" if name.endswith("tsv") else ";" if name.endswith("gz") else ","
        text = csv_text(rows, delimiter, csv.QUOTE_ALL)
        write_text(path, text, "cp1252" if "cp1252" in more else "utf-8")
    answers = [
        "--task",
        "classification",
        "--label",
        "outcome",
        "--labels",
        "yes,no",
        "--text",
        "a;b – é",
        "--site",
        "a",
        "--site",
        "b",
        "--records",
        "100",
    ]
    code, said, wrong = run(*new(path, out, *answers, *more))
    assert code == 0, wrong
    assert "! 3 of 6 texts have more words than the model's 96 tokens: what is beyond" in said
    as_json = json.loads(run(*new(path, tmp_path / "b.toml", *answers, *more, "--json"))[1])
    assert set(as_json) == {
        "file",
        "sha256",
        "warnings",
        "unused_columns",
    }
    # What it advises next reads the file likewise.
    words = shlex.split(said.splitlines()[-1].removeprefix("next:"))
    assert words[4:] == [
        f"data={path}",
        *(f"{key[2:]}={value}" for key, value in zip(more[::2], more[1::2], strict=True)),
    ]
    assert Options.parse(tuple(words[4:])).reading == Reading.of(
        "cp1252" if "cp1252" in more else None, ";" if ";" in more else None, "{key}='{value}'"
    )


def test_rows_that_do_not_fit_yet_do_not_stop_the_draft(
    tmp_path: Path, run: Callable[..., Ran]
) -> None:
    path, out = tmp_path / "notes.csv", tmp_path / "notes.toml"
    path.write_text(f"note,outcome\n{CANARY},maybe\n")
    answers = [
        "--task",
        "classification",
        "--label",
        "outcome",
        "--labels",
        "yes,no",
        "--text",
        "note",
        "--site",
        "a",
        "--site",
        "b",
        "--records",
        "100",
    ]
    code, said, wrong = run(*new(path, out, *answers))
    assert code == 0, wrong
    assert "! texts not counted: notes.csv does not fit the contract 'notes'" in said
    assert CANARY not in said + wrong + out.read_text()
    code, said, _ = run(*new(path, tmp_path / "again.toml", *answers, "--encoding", "rot13"))
    assert code == 2


NOTES = TABLE | {"columns": (), "text": "note", "records": 700}


@pytest.mark.parametrize(
    "answers",
    [NOTES, NOTES | {"task": "tokens", "labels": ("disease",)}],
    ids=["classification", "tokens"],
)
def test_a_text_s_features_have_a_norm_by_public_sentences(answers: dict[str, Any]) -> None:
    contract = parse(drafting.draft(Answers.model_validate(answers)))
    assert isinstance(contract.model, EncoderModel)
    assert contract.model.standardise is not None
    assert contract.model.standardise.sentences == SENTENCES
    assert contract.phases[0].rule == head_rule.VERSION
    assert not contract.warnings


def test_an_adapter_is_planned_by_a_planner_where_there_is_room() -> None:
    seen = []

    def planner(contract: Contract) -> AdapterPlan:
        seen.append(contract)
        return AdapterPlan(adapter_lr=0.37, head_lr=5.5, cosine=0.5, signal_ratio=LEAST_RATIO)

    answers = Answers.model_validate(NOTES)
    text = drafting.draft(answers, planner)
    head, both = parse(text).phases
    assert (both.adapter_lr, both.head_lr) == (0.37, 5.5)
    assert "mean cosine of at least 0.5" in text
    assert [c.hash for c in seen] == [parse(drafting.draft(answers)).hash]
    assert head.rule == parse(drafting.draft(answers)).phases[0].rule


def test_without_room_the_head_alone_is_planned_with_the_whole_budget() -> None:
    answers = Answers.model_validate(NOTES)
    text = drafting.draft(answers, lambda _: AdapterPlan(0.37, 5.5, 0.5, 0.9 * LEAST_RATIO))
    found = parse(text)
    assert found.adapter is None
    assert [(p.trains, p.budget_share) for p in found.phases] == [("head", 1.0)]
    assert not found.warnings  # its numbers are those of the rule for heads
    assert "no room for LoRA" in text


def test_without_the_model_the_rates_are_defaults_and_the_text_says_so() -> None:
    answers = Answers.model_validate(NOTES)
    assert drafting.draft(answers, lambda _: None) == drafting.draft(answers)
    assert "the base model was not at hand" in drafting.draft(answers)
