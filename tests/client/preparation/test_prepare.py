"""`silotune site prepare`: all problems at once, rows changed by the owner's rules alone, and a
report in which no record stands."""

from __future__ import annotations

import html
import json
import logging
import re
import sqlite3
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.client.preparation import profile
from silotune.client.preparation import report as prepare_report
from silotune.client.preparation.cleaning import Prepared, prepare, write
from silotune.client.privacy import budget
from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.records.record_ids import of_table
from silotune.client.site import policy as policies
from silotune.client.site.folder import SiteFolder
from silotune.client.site.preparation_rules import Deidentify, Prepare
from silotune.common.cli.main import silotune
from silotune.common.contract.contract import Contract, parse
from silotune.common.data import records
from silotune.common.data.records import Table
from silotune.common.errors import DataError, UsageError
from tests.common.data.test_text_decoding import TOKENS

CHARGE: dict[str, Any] = {  # facts of a charge, whatever its records
    "contract": "0" * 64,
    "run": "r",
    "round": 1,
    "attempt": 1,
    "request": "0" * 64,
    "unit": "record",
    "noise_multiplier": 1.0,
    "sampling_rate": 0.5,
    "steps": 1,
    "order": 4.0,
}
CANARY = "Kanarienvogel77"
HEADER = ["age", "smoker", "outcome"]
CLEAN = Prepare(duplicates="drop", missing_target="drop", outside="missing")

GOOD = [["71", "yes", "1"], ["", "", "0"], ["20.5", "no", "1"]]


def table(*rows: list[str], header: list[str] = HEADER) -> Table:
    return Table("notes.csv", header, [(line, row) for line, row in enumerate(rows, start=2)])


def told(found: Prepared) -> dict[str, tuple[str, str]]:
    return {problem.sentence: (problem.done, problem.places) for problem in found.problems}


def changed(contract: Contract, **parts: Any) -> Contract:
    return Contract.model_validate(contract.model_dump(mode="json") | parts)


@pytest.fixture
def bounded(table_contract: Contract) -> Contract:
    """With a lowest plausible age."""
    dump = table_contract.model_dump(mode="json")
    dump["input"]["columns"][0]["lowest"] = 1
    return Contract.model_validate(dump)


# Cleaning -------------------------------------------------------------------------------------


def test_rows_that_fit_stay_as_they_are(table_contract: Contract) -> None:
    found = prepare(table(*GOOD), table_contract, Prepare(), ())
    assert [row for _, row in found.table.rows] == GOOD
    assert (found.read, found.problems, found.left_out, found.refused) == (3, [], {}, [])


def test_spaces_are_trimmed_unless_the_owner_says_no(table_contract: Contract) -> None:
    for trim, kept in ((True, ["71", "yes", "1"]), (False, [" 71", "yes ", "1\t"])):
        found = prepare(table([" 71", "yes ", "1\t"]), table_contract, Prepare(trim=trim), ())
        assert found.table.rows[0] == (2, kept)


BAD = [
    ["71", "yes", "1"],
    [CANARY, "often", "1"],
    ["71", "yes", "1"],
    ["20", "no", " "],
    ["20", "no", "7"],
    ["20", "no"],
    ["-3", "no", "0"],
    ["nan", "no", "0"],
]


def test_every_problem_is_told_at_once(bounded: Contract) -> None:
    found = prepare(table(*BAD), bounded, Prepare(), ())
    assert told(found) == {
        "3 fields are expected": ("refused", "row 7"),
        "column 'age' allows numbers or nothing": ("refused", "row 3"),
        "column 'age' is below 1: counts as missing": ("left as they are", "row 8"),
        "column 'smoker' allows yes, no or nothing": ("refused", "row 3"),
        "column 'outcome' is empty": ("refused", "row 5"),
        "column 'outcome' allows well, ill": ("refused", "row 6"),
        "rows repeat an earlier one": ("left as they are", "row 4"),
    }
    assert [line for line, _ in found.table.rows] == [2, 4, 8, 9]
    assert sum(found.left_out.values()) + len(found.table.rows) == found.read == 8


def test_what_the_owner_rules(bounded: Contract) -> None:
    rows = [row for row in BAD if row[-1] not in ("7", "no")]
    found = prepare(table(*rows), bounded, CLEAN, ())
    assert not found.refused
    assert [row for _, row in found.table.rows] == [
        ["71", "yes", "1"],
        ["", "", "1"],
        ["-3", "no", "0"],
        ["nan", "no", "0"],
    ]
    assert found.left_out == {"column 'outcome' is empty": 1, "rows repeat an earlier one": 1}
    records.parse(found.table, bounded)  # what is prepared is what the worker accepts


@pytest.mark.parametrize(
    "rules",
    [Prepare(outside="missing"), Prepare(missing_target="drop"), Prepare(duplicates="drop")],
)
def test_a_rule_does_nothing_else(bounded: Contract, rules: Prepare) -> None:
    found = told(prepare(table(*BAD), bounded, rules, ()))
    done = {what: done for what, (done, _) in found.items()}
    assert done["3 fields are expected"] == "refused"
    assert done["column 'outcome' allows well, ill"] == "refused"
    outside = done["column 'age' allows numbers or nothing"]
    assert outside == ("set to missing" if rules.outside == "missing" else "refused")
    empty = done["column 'outcome' is empty"]
    assert empty == ("dropped" if rules.missing_target == "drop" else "refused")
    copies = done["rows repeat an earlier one"]
    assert copies == ("dropped" if rules.duplicates == "drop" else "left as they are")


def test_copies_differ_in_their_numbers_only(table_contract: Contract) -> None:
    rows = table(
        ["1", "71", "yes", "1"],
        ["2", "71.0", " yes", "1"],
        ["3", "71", "yes", "0"],
        header=["n", *HEADER],
    )
    found = prepare(rows, table_contract, Prepare(duplicates="drop"), ())
    assert [line for line, _ in found.table.rows] == [2, 4]
    # With the number as the key these are two people.
    found = prepare(rows, table_contract, Prepare(duplicates="drop"), ("n",))
    assert [line for line, _ in found.table.rows] == [2, 3, 4]


def test_what_is_prepared_has_no_copies_left(table_contract: Contract) -> None:
    """A row twice with its number makes the number no number; without the copy it is one again."""
    rows = table(
        ["1", "71", "yes", "1"],
        ["1", "71", "yes", "1"],
        ["2", "71", "yes", "1"],
        header=["n", *HEADER],
    )
    found = prepare(rows, table_contract, Prepare(duplicates="drop"), ())
    assert [line for line, _ in found.table.rows] == [2]
    assert told(found)["rows repeat an earlier one"][1] == "rows 3, 4"


cells_of = st.sampled_from(["71", "", " 20 ", "x", "nan", "-3", "inf", "yes", "no", "1", "0", "7"])


def test_what_is_prepared_is_accepted_and_stays(tmp_path_factory: Any, bounded: Contract) -> None:
    path = tmp_path_factory.mktemp("out") / "a.parquet"

    @settings(deadline=None, max_examples=60, derandomize=True, database=None)
    @given(st.lists(st.lists(cells_of, min_size=2, max_size=4), min_size=1, max_size=12))
    def check(rows: list[list[str]]) -> None:
        found = prepare(table(*rows), bounded, CLEAN, ())
        if not len(found.table.rows):
            return
        records.parse(found.table, bounded)
        write(found.table, path)
        again = records.table(path)
        assert [row for _, row in again.rows] == [row for _, row in found.table.rows]
        assert of_table(again, (), bytes(32)).id == of_table(found.table, (), bytes(32)).id
        twice = prepare(again, bounded, CLEAN, ())
        assert (twice.left_out, len(twice.table.rows)) == ({}, len(again.rows))

    check()


def test_rows_are_found_in_every_block(
    table_contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("silotune.client.preparation.cleaning.BLOCK_ROWS", 4)
    rows = [[CANARY if i % 5 == 0 else str(i), "yes", "1"] for i in range(30)]
    found = prepare(table(*rows), table_contract, Prepare(), ())
    (problem,) = found.problems
    assert (problem.count, problem.rows) == (6, [2, 7, 12, 17, 22, 27])


def test_a_header_that_does_not_fit_stops_at_once(table_contract: Contract) -> None:
    with pytest.raises(DataError, match="Column 'smoker' is not in"):
        prepare(table(["1", "1"], header=["age", "outcome"]), table_contract, Prepare(), ())


def test_a_regressions_target_beyond_its_bounds(table_contract: Contract) -> None:
    task = {"kind": "regression", "label_column": "outcome", "lowest": 0, "highest": 100}
    contract = changed(table_contract, task=task)
    found = prepare(
        table(["71", "yes", "250"], ["71", "no", "x"], ["71", "no", "50"]), contract, Prepare(), ()
    )
    assert told(found) == {
        "column 'outcome' is not within 0 to 100: counts as the bound": (
            "left as they are",
            "row 2",
        ),
        "column 'outcome' allows 0 to 100": ("refused", "row 3"),
    }
    targets = profile.count(found.table, contract, None).targets
    assert (next(iter(targets)), len(targets)) == ("0 to 10", 10)
    assert {word: n for word, n in targets.items() if n} == {"50 to 60": 1, "90 to 100": 1}


def test_tags_and_words(table_contract: Contract) -> None:
    encoder = {"kind": "encoder", "name": "m", "sha256": "0" * 64, "max_tokens": 32}
    contract = changed(
        table_contract,
        input={"kind": "text", "column": "note"},
        model=encoder,
        task={"kind": "tokens", "label_column": "tags", "entities": ["drug"]},
    )
    rows = table(
        ["takes aspirin", "O B-drug"],
        [f"takes {CANARY} now", "O B-drug"],
        ["a", "X"],
        header=["note", "tags"],
    )
    found = prepare(rows, contract, Prepare(), ())
    assert told(found) == {
        "column 'tags' allows O, B-drug, I-drug": ("refused", "row 4"),
        "column 'tags' needs as many tags as 'note' has words": ("refused", "row 3"),
    }
    assert profile.count(found.table, contract, None).targets == {"O": 1, "B-drug": 1, "I-drug": 0}


# Counting -------------------------------------------------------------------------------------


def test_counts(bounded: Contract) -> None:
    rows = [["71", "yes", "1"], ["20", "", "0"], ["-3", "no", "1"], ["", "no", "1"]]
    found = profile.count(table(*rows), bounded, None)
    assert found.choices == {
        "age": {"young": 1, "old": 1, "": 2},
        "smoker": {"yes": 1, "no": 2, "": 1},
    }
    assert (found.missing, found.targets) == ({"age": 2, "smoker": 1}, {"well": 1, "ill": 3})
    assert (found.rows, found.lengths.texts, found.lengths.cut) == (4, 0, 0)


TEXT = {
    "task": {
        "kind": "classification",
        "label_column": "outcome",
        "labels": [
            {"name": "well", "values": ["0"]},
            {"name": "ill", "values": ["1"]},
        ],
    },
    "input": {"kind": "text", "column": "note"},
    "model": {"kind": "encoder", "name": "m", "sha256": "0" * 64, "max_tokens": 32},
}
NOTES = [
    ["Dr. Mary Smith saw him, call 415-555-0132", "1"],
    ["no complaints", "0"],
    ["paid by card 4111 1111 1111 1111", "0"],
]


def notes() -> Table:
    return table(*[list(row) for row in NOTES], header=["note", "outcome"])


def test_personal_details_are_taken_out_of_the_text(table_contract: Contract) -> None:
    rules = Prepare(deidentify=Deidentify(actions={"card": "block"}, language="en"))
    found = prepare(notes(), changed(table_contract, **TEXT), rules, ())
    texts = [cells[0] for _, cells in found.table.rows]
    assert texts == ["Dr. <PERSON> saw him, call <PHONE>", "no complaints"]
    assert told(found) == {
        "column 'note' holds what looks like a personal detail (person)": ("replaced", "row 2"),
        "column 'note' holds what looks like a personal detail (phone)": ("replaced", "row 2"),
        "column 'note' holds what looks like a personal detail (card)": ("dropped", "row 4"),
    }
    assert sum(found.left_out.values()) == 1
    without = prepare(notes(), changed(table_contract, **TEXT), Prepare(), ())
    assert [cells for _, cells in without.table.rows] == NOTES


def test_pseudonyms_need_the_sites_key(table_contract: Contract) -> None:
    rules = Prepare(deidentify=Deidentify(action="pseudonymise"))
    contract = changed(table_contract, **TEXT)
    with pytest.raises(UsageError, match="site init"):
        prepare(notes(), contract, rules, ())
    one, same, other = (
        [cells[0] for _, cells in prepare(notes(), contract, rules, (), key).table.rows]
        for key in (bytes(32), bytes(32), bytes([1] * 32))
    )
    assert one == same != other
    assert "Smith" not in " ".join(one)


def test_a_word_for_each_tag_stays_one(table_contract: Contract) -> None:
    contract = changed(
        table_contract,
        **TEXT
        | {
            "task": {"kind": "tokens", "label_column": "outcome", "entities": ["X"]},
        },
    )
    row = ["Dr. Mary Smith saw him", "O B-X I-X O O"]
    given = table(row, header=["note", "outcome"])
    with pytest.raises(UsageError, match='action = "mask"'):
        prepare(given, contract, Prepare(deidentify=Deidentify()), ())
    found = prepare(given, contract, Prepare(deidentify=Deidentify(action="mask")), ())
    assert found.table.rows[0][1] == ["Dr. **** ***** saw him", row[1]]


@pytest.mark.download
def test_lengths_are_the_tokenizers(lora_contract: Contract, encoder_folder: Path) -> None:
    encoder = lora_contract.model_dump(mode="json")["model"] | {"max_tokens": 8}
    contract = changed(lora_contract, input={"kind": "text", "column": "note"}, model=encoder)
    rows = table(
        ["one two three", "1"],
        ["one two three", "0"],
        ["word " * 40, "1"],
        header=["note", "outcome"],
    )
    found = profile.count(rows, contract, encoder_folder)
    lengths = found.lengths
    assert {n: k for n, k in enumerate(lengths.tokens) if k} == {5: 2, 42: 1}  # with [CLS], [SEP]
    assert (lengths.texts, lengths.cut, lengths.limit) == (3, 1, 8)
    plot = prepare_report.draw(Prepared(rows, rows, [], {}, rows, range(3)), found)[-1]
    assert "1 of 3 texts are longer than the model's 8 tokens" in plot.alt


# The command ----------------------------------------------------------------------------------

Run = Callable[..., Result]


@pytest.fixture
def site(tmp_path: Path, bounded: Contract, monkeypatch: pytest.MonkeyPatch) -> SiteFolder:
    """A site as `site init` makes it, in the folder where commands run, with records.csv."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "contract.json").write_text(
        json.dumps(bounded.model_dump(mode="json", exclude_none=True))
    )
    done = CliRunner().invoke(silotune, ["site", "init", "--name", "north", "--folder", "."])
    assert done.exit_code == 0
    records_file(tmp_path / "records.csv", *GOOD)
    text = (tmp_path / "site.toml").read_text()
    (tmp_path / "site.toml").write_text(text.replace("min_records = 100", "min_records = 1"))
    return SiteFolder(tmp_path / "site.toml")


def records_file(path: Path, *rows: list[str]) -> None:
    path.write_text("\n".join(",".join(row) for row in [HEADER, *rows]) + "\n", encoding="utf-8")
    path.chmod(0o600)


def rule(site: SiteFolder, text: str) -> None:
    site.config.write_text(site.config.read_text().replace("[model]", f"{text}\n[model]"))


def run(*words: str) -> Result:
    return CliRunner().invoke(silotune, ["site", "prepare", "contract.json", *words])


def test_prepared_records_are_written_for_the_owner_alone(site: SiteFolder) -> None:
    done = run()
    assert done.exit_code == 0, done.output
    folder = site.folder / "prepared"
    file, report = folder / "records.parquet", folder / "report.html"
    for path, mode in ((folder, 0o700), (file, 0o600), (report, 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert sorted(p.name for p in folder.iterdir()) == ["records.parquet", "report.html"]
    assert "✓ 3 of 3 rows kept · 3 records, 0 charged before" in done.output
    assert 'next:   set file = "prepared/records.parquet" in [data]' in done.output
    assert [row for _, row in records.table(file).rows] == GOOD


def test_what_next_says_works(site: SiteFolder) -> None:
    assert run("--config", "site.toml", "--out", "out/put").exit_code == 0
    text = site.config.read_text().replace('"records.csv"', '"out/put/records.parquet"')
    site.config.write_text(text)
    for words in (["site", "sign"], ["site", "check", "contract.json"]):
        done = CliRunner().invoke(silotune, words)
    assert re.search(r"✓ data access +mode 600", done.output)
    assert re.search(r"✓ data +records.parquet, 3 rows", done.output)
    assert re.search(r"✓ columns +2 columns and the label fit", done.output)


def test_no_file_where_the_owner_has_to_decide_first(
    site: SiteFolder, caplog: pytest.LogCaptureFixture
) -> None:
    records_file(site.folder / "records.csv", *BAD)
    with caplog.at_level(logging.DEBUG):
        done = run()
    assert done.exit_code == 1
    assert isinstance(done.exception, DataError)
    assert done.exception.code == "E313"
    assert "5 kinds of problem: nothing was prepared" in str(done.exception)
    assert [p.name for p in (site.folder / "prepared").iterdir()] == ["report.html"]
    page = (site.folder / "prepared" / "report.html").read_text()
    for shown in (done.output, page):
        assert "column &#39;age&#39; allows" in shown or "column 'age' allows" in shown
        assert "next:" not in shown
    for shown in (done.output, page, caplog.text, str(done.exception)):
        assert CANARY not in shown
        assert "often" not in shown
    assert done.exception.local == ""


def test_a_process_says_no_value_either(site: SiteFolder) -> None:
    """The command as it is started, with its own way of telling errors."""
    records_file(site.folder / "records.csv", *BAD)
    done = subprocess.run(
        [Path(sys.executable).with_name("silotune"), "site", "prepare", "contract.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "✗ E313 records.csv has 5 kinds of problem" in done.stderr
    assert CANARY not in done.stdout + done.stderr


def test_the_owners_rules_from_site_toml(site: SiteFolder) -> None:
    rule(site, '[prepare]\nduplicates = "drop"\nmissing_target = "drop"\noutside = "missing"\n')
    records_file(site.folder / "records.csv", *(r for r in BAD if r[-1] not in ("7", "no")))
    done = run("--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert (found["prepared"], found["read"], found["kept"]) == (True, 6, 4)
    assert CANARY not in done.output
    rule(site, '[prepare]\noutside = "guess"\n')
    assert run().exit_code == 1


def test_nothing_left(site: SiteFolder) -> None:
    rule(site, '[prepare]\nmissing_target = "drop"\n')
    records_file(site.folder / "records.csv", ["71", "yes", ""])
    done = run()
    assert isinstance(done.exception, DataError)
    assert done.exception.code == "E304"
    assert not (site.folder / "prepared" / "records.parquet").exists()


def test_another_encoding_is_converted(site: SiteFolder) -> None:
    path = site.folder / "records.csv"
    path.write_bytes("age,smoker,outcome,name\n71,yes,1,Ärger\n".encode("latin-1"))
    done = run()
    assert isinstance(done.exception, DataError)
    assert "[data] of site.toml" in str(done.exception)
    text = site.config.read_text().replace("[data]", '[data]\nencoding = "latin-1"')
    site.config.write_text(text)
    assert run().exit_code == 0
    found = records.table(site.folder / "prepared" / "records.parquet")
    assert found.rows[0][1][-1] == "Ärger"


def test_records_that_were_charged_are_counted(site: SiteFolder) -> None:
    keys = Keys.load(site.keys)
    ledger = PrivacyLedger.open(site.state, keys)
    before = of_table(table(GOOD[0], GOOD[2]), (), ledger.identity.fingerprint_key)
    with ledger.writing():
        ledger.charge(
            before,
            source="a.csv",
            **CHARGE,
        )
    done = run()
    assert "3 records, 2 charged before" in done.output
    assert (
        ">2<small>of them, in this site" in (site.folder / "prepared" / "report.html").read_text()
    )


def test_before_there_are_keys(site: SiteFolder, tmp_path: Path) -> None:
    site.keys.rename(tmp_path / "elsewhere")
    done = run()
    assert "3 records, no ledger yet" in done.output
    assert "not known" in (site.folder / "prepared" / "report.html").read_text()


# The report -----------------------------------------------------------------------------------


def test_the_report_says_first_that_it_stays(site: SiteFolder) -> None:
    run()
    page = (site.folder / "prepared" / "report.html").read_text()
    body = page[page.index("<body>") :]
    assert body.index("This file must not leave north.") < 120
    assert "counts of private records" in body
    for loaded in ("<script", "<link", "<img", "@import", "src="):
        assert loaded not in page
    assert not re.search(r"url\((?!#)", page)
    assert not re.search(r"#0101\d\d", page)  # every colour is the page's
    assert page.count("<svg") >= 4


def test_the_report_shows_no_record(site: SiteFolder, tmp_path: Path) -> None:
    """Two files with the same counts and other values give the same page: it is a function of
    counts. The texts in it are drawn from the contract."""
    pages = []
    for age in ("71", "72.25"):
        records_file(site.folder / "records.csv", [age, "yes", "1"], ["20", "no", "0"])
        done = run("--out", "here")
        assert done.exit_code == 0
        page = (tmp_path / "here" / "report.html").read_text()
        pages.append(re.sub(r"<code>[0-9a-f]{64}</code>|· \d{4}-\d\d-\d\d \d\d:\d\d", "", page))
    assert pages[0] == pages[1]
    assert "72.25" not in pages[1]


def test_what_is_written_in_a_contract_stays_text(bounded: Contract) -> None:
    dump = bounded.model_dump(mode="json")
    bad = "</svg><script>alert(1)</script>$x_2$"
    dump["task"]["labels"][0]["name"] = dump["task"]["labels"][0]["name"]
    dump["input"]["columns"][0]["words"] = [bad, "old"]
    contract = Contract.model_validate(dump)
    found = prepare(table(*GOOD), contract, Prepare(), ())
    for plot in prepare_report.draw(found, profile.count(found.table, contract, None)):
        assert "<script" not in plot.svg


def test_contracts_of_texts_have_no_choices_to_draw(table_contract: Contract) -> None:
    encoder = {"kind": "encoder", "name": "m", "sha256": "0" * 64, "max_tokens": 32}
    for spec, rows in (
        ({"kind": "text", "column": "note"}, table(["x", "1"], header=["note", "outcome"])),
        (
            {"kind": "pair", "first": "a", "second": "b"},
            table(["x", "", "1"], header=["a", "b", "outcome"]),
        ),
    ):
        contract = changed(table_contract, input=spec, model=encoder)
        found = prepare(rows, contract, Prepare(), ())
        plots = prepare_report.draw(found, profile.count(found.table, contract, None))
        assert "no choices" in plots[-2].alt
        assert "no tokenizer.json" in plots[-1].alt
        assert profile.made_up(contract)[0].startswith("⟨the text in")


# Tags and long texts --------------------------------------------------------------------------


def test_tags_of_another_scheme_are_counted_and_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records in IOB1, as a CoNLL file, with texts that the model does not read to their end. The
    prepared rows are linked to those they were made of, and say nothing more about their tags."""
    monkeypatch.chdir(tmp_path)
    Path("contract.toml").write_text(TOKENS)
    done = CliRunner().invoke(silotune, ["site", "init", "--name", "north", "--folder", "."])
    assert done.exit_code == 0
    sentences = ["gout I-Disease", "a O\n" * 9 + "asthma I-Disease", "b S-Drug", "c O"]
    Path("records.conll").write_text("\n\n".join(sentences) + "\n")
    Path("records.conll").chmod(0o600)
    config = Path("site.toml")
    config.write_text(config.read_text().replace("records.csv", "records.conll"))
    done = CliRunner().invoke(silotune, ["site", "prepare", "contract.toml"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    for what in ("column 'marks' is in IOB1: read as IOB2", "column 'marks' is in BIOES: read as"):
        assert any(what in line and "rewritten" in line for line in lines), done.output
    assert any("rows 1, 3" in line for line in lines)
    assert (
        "! 1 of 4 texts have more words than the model's 8 tokens: what is beyond is not read, "
        "with 1 of 3 entities, in 1 text."
    ) in done.output
    found = records.table(tmp_path / "prepared" / "records.parquet")
    assert found.header == ["sentence", "marks"]
    assert [cells[1] for _, cells in found.rows] == [
        "B-Disease",
        "O " * 9 + "B-Disease",
        "B-Drug",
        "O",
    ]
    parsed = records.parse(found, parse(TOKENS))
    assert (parsed.labels, parsed.notes) == ([[1], [0] * 9 + [1], [3], [0]], ())
    state = SiteFolder(config).state
    raw = of_table(
        records.named_by(parse(TOKENS), records.table(Path("records.conll"))),
        (),
        (ledger := PrivacyLedger.open(state, Keys.load(Path("keys")))).identity.fingerprint_key,
    )
    with ledger.writing():
        ledger.charge(
            raw,
            source="records.conll",
            **CHARGE,
        )
    prepared = of_table(found, (), ledger.identity.fingerprint_key)
    (overlap,) = budget.overlaps(ledger, prepared).values()
    assert overlap.all()


def test_control_characters_are_reported_by_the_command(site: SiteFolder) -> None:
    path = site.folder / "records.csv"
    path.write_text("age,smoker,outcome,name\n71,yes,1,a\0b\n71,yes,1,ab\n")
    done = run()
    assert "! control characters stand in row 2; they are kept as they are" in done.output
    assert (
        "control characters stand in row 2"
        in (site.folder / "prepared" / "report.html").read_text()
    )


# What the owner is told to do -----------------------------------------------------------------


def test_what_check_would_refuse_of_prepared_rows_is_said_and_mended(site: SiteFolder) -> None:
    text = site.config.read_text()
    site.config.write_text(text.replace("min_records = 1", "min_records = 4"))
    records_file(site.folder / "records.csv", *GOOD, GOOD[0])
    done = run()
    assert done.exit_code == 0, done.output
    refusal = "! `silotune site check` would refuse these rows. "
    assert f"{refusal}Rows of records.parquet are the same record more than once" in done.output
    assert 'duplicates = "drop" in [prepare]' in done.output
    again = "next:   correct what has a !, then: silotune site prepare contract.json --config "
    assert again in done.output
    sign = "site.toml needs its owner's signature again: silotune site sign --config site.toml)"
    assert sign in done.output
    rule(site, '[prepare]\nduplicates = "drop"\n')
    done = run()
    assert f"{refusal}records.parquet has fewer rows than permits.min_records = 4." in done.output
    assert again in done.output
    site.config.write_text(site.config.read_text().replace("min_records = 4", "min_records = 3"))
    done = run("--json")
    assert json.loads(done.output)["refused_by_check"] == []
    assert "then: silotune site sign --config site.toml" in run().output


def test_each_refused_problem_names_its_own_remedy(site: SiteFolder) -> None:
    records_file(site.folder / "records.csv", *BAD)
    told = str(run().exception)
    for sentence in (
        "3 fields are expected: correct the rows;",
        "column 'age' allows numbers or nothing: correct the cells, or set outside = \"missing\"",
        "column 'outcome' is empty: fill in the column, or set missing_target = \"drop\" in",
        "column 'outcome' allows well, ill: correct the cells, or ask the operator for a contract",
    ):
        assert sentence in told
    records_file(site.folder / "records.csv", ["71", "yes", "7"])
    told = str(run().exception)
    assert "missing_target" not in told
    assert "outside" not in told


def test_digit_separators_are_named_as_what_is_not_read(
    site: SiteFolder, bounded: Contract
) -> None:
    rows = [[text, "yes", "1"] for text in ("1_030", "1,5", "1 030", "x", "2")]
    found = prepare(table(*rows), bounded, Prepare(), ())
    sentences = {
        sentence: places for sentence, (done, places) in told(found).items() if done == "refused"
    }
    assert sentences == {
        "column 'age' allows numbers or nothing": "row 5",
        "column 'age' allows numbers or nothing; digit separators and decimal commas, as in 1_000 "
        "and 0,5, are not read": "rows 2, 3, 4",
    }


def test_rules_that_empty_a_column_or_leave_most_rows_out_are_warned_of(site: SiteFolder) -> None:
    rule(site, '[prepare]\noutside = "missing"\nduplicates = "drop"\n')
    records_file(site.folder / "records.csv", *([f'"1,{n:03}"', "yes", "1"] for n in range(9)))
    done = run()
    assert "! each cell of column 'age' is empty now" in done.output
    assert (
        "! more than half of the rows are left out, 8 of 9 (rows repeat an earlier one: 8)"
        in done.output
    )
    page = (site.folder / "prepared" / "report.html").read_text()
    assert "more than half of the rows are left out" in page
    records_file(site.folder / "records.csv", *GOOD)
    done = run()
    assert "each cell" not in done.output
    assert "more than half" not in done.output


def test_the_raw_records_are_never_replaced(site: SiteFolder) -> None:
    """Neither by preparing what was prepared, nor by --out; nor is another's file."""
    assert run().exit_code == 0
    prepared = site.folder / "prepared" / "records.parquet"
    report = site.folder / "prepared" / "report.html"
    raw = site.folder / "records.parquet"
    raw.write_bytes(prepared.read_bytes())
    raw.chmod(0o600)
    text = site.config.read_text()
    for source, words in (
        ("records.parquet", ["--out", "."]),
        ("prepared/records.parquet", []),
        ("records.csv", ["--out", "."]),
    ):
        site.config.write_text(text.replace('"records.csv"', f'"{source}"'))
        before = {file: file.read_bytes() for file in (raw, prepared, report)}
        done = run(*words)
        assert isinstance(done.exception, UsageError), source
        assert str(done.exception).count("--out FOLDER") == 1
        assert {file: file.read_bytes() for file in before} == before
        assert not (site.folder / "report.html").exists()
    site.config.write_text(text)
    other = site.folder / "other"
    other.mkdir()
    (other / "records.parquet").write_bytes(b"somebody's")
    done = run("--out", "other")
    assert isinstance(done.exception, UsageError)
    assert (other / "records.parquet").read_bytes() == b"somebody's"
    assert run("--out", "third").exit_code == 0
    assert run("--out", "third").exit_code == 0  # its own


def test_the_report_shows_settings_as_they_stand_in_site_toml(site: SiteFolder) -> None:
    rule(
        site,
        '[prepare]\nduplicates = "drop"\n[prepare.deidentify]\nkinds = ["card"]\n'
        'actions = { card = "block" }\n',
    )
    Path("contract.json").write_text(
        changed(parse(Path("contract.json").read_text(), "c.json"), **TEXT).model_dump_json()
    )
    (site.folder / "records.csv").write_text("note,outcome\nno complaints,0\n")
    assert run().exit_code == 0
    page = html.unescape((site.folder / "prepared" / "report.html").read_text())
    (rules,) = re.findall(r"<dt>Rules</dt><dd>(.*?)</dd>", page)
    settings_ = tomllib.loads("\n".join(re.split(r", (?=[a-z_.]+ = )", rules)))
    assert Prepare.model_validate(settings_) == policies.load(site.config).prepare


def test_the_template_shows_every_setting_of_prepare_with_its_values(site: SiteFolder) -> None:
    text = site.config.read_text()
    lines = text[text.index("# [prepare]") : text.index("\n[model]")]
    for model in (Prepare, Deidentify):
        for name, field in model.model_fields.items():
            if name == "deidentify":
                continue
            assert f"# {name} = " in lines, name
            for value in get_args(field.annotation):
                if isinstance(value, str):
                    assert f'"{value}"' in lines, (name, value)


def test_a_database_is_replaced_as_a_whole_by_the_prepared_file(site: SiteFolder) -> None:
    database = sqlite3.connect(site.folder / "records.db")
    with database:
        database.execute("CREATE TABLE visits (age, smoker, outcome)")
        database.executemany("INSERT INTO visits VALUES (?, ?, ?)", GOOD)
    database.close()
    text = site.config.read_text()
    source = 'url = "sqlite:///records.db"\nquery = "SELECT * FROM visits ORDER BY age"'
    site.config.write_text(text.replace('file = "records.csv"', source))
    done = run()
    assert done.exit_code == 0, done.output
    assert 'set file = "prepared/north.parquet" instead of url and query in [data]' in done.output
