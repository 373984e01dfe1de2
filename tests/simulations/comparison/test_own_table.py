"""A table that nobody has seen, in three commands, to a federated adapter."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from silotune.common.contract import contract as contracts
from silotune.common.data.text_decoding import Reading
from silotune.common.errors import DataError, UsageError
from silotune.simulations.comparison import run as run_module
from silotune.simulations.comparison.recipe import own_recipe
from silotune.simulations.comparison.run import lengths_of
from silotune.simulations.comparison.run_result import RunResult
from silotune.simulations.datasets.split import of_file
from silotune.simulations.execution import worker_pool
from silotune.simulations.execution.variants import variants_of
from tests import tiny
from tests.common.data.test_text_decoding import (
    csv_text,
    json_text,
    write_parquet,
    write_text,
    write_xlsx,
)

Ran = tuple[int, str, str]
SILOTUNE = Path(sys.executable).parent / "silotune"
ANSWERS = [
    "--task",
    "classification",
    "--label",
    "status",
    "--labels",
    "good,bad",
    "--column",
    "age: 25, 30, 40",
    "--column",
    "home: rent, own",
    "--site",
    "bank-a",
    "--site",
    "bank-b",
    "--site",
    "bank-c",
    "--records",
    "100",
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Loans of three branches, whose owners' numbers stand twice; and columns that a simulation
    has names of its own for."""
    rng = np.random.default_rng(5)
    rows = []
    for number in range(240):
        age, home = int(rng.integers(18, 61)), ("rent", "own")[rng.integers(2)]
        bad = rng.random() < 0.1 + 0.5 * (age < 30) + 0.3 * (home == "rent")
        branch = f"bank-{'abc'[rng.integers(3)]}"
        rows.append([number // 2, age, home, branch, "x", "train", "bad" if bad else "good"])
    path = tmp_path / "loans.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        header = ["owner", "age", "home", "branch", "site", "split", "status"]
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def contract_of(run: Callable[..., Ran]) -> Callable[..., Path]:
    """contract_of(table, *answers): the contract's file, beside the table."""

    def draft(table: Path, *more: str) -> Path:
        out = table.with_suffix(".toml")
        code, _, wrong = run("contract", "new", "--from", table, "--out", out, *ANSWERS, *more)
        assert code == 0, wrong
        return out

    return draft


def test_three_commands(table: Path) -> None:
    for words in (
        ["contract", "new", "--from", "loans.csv", "--out", "loans.toml", *ANSWERS],
        ["contract", "validate", "loans.toml"],
        [
            "sim",
            "run",
            "loans.toml",
            "data=loans.csv",
            "site_column=branch",
            "repeats=1",
            "baseline_repeats=1",
            "variants=federated-lora,pooled-no-dp",
            "--out",
            "run",
            "--json",
        ],
    ):
        done = subprocess.run(
            [SILOTUNE, *words],
            cwd=table.parent,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert "RESULT" in done.stderr  # progress leaves standard output to the JSON
    assert {s["site"] for s in result["data"]["sites"]} == {"bank-a", "bank-b", "bank-c"}
    federated = next(variant for variant in result["variants"] if variant["main"])
    assert federated["metrics"]["auc"]["mean"] > 0.6
    assert max(s["epsilon"] for s in result["privacy"]["sites"]) <= 8.0
    adapter = load_file(table.parent / "run/variants/federated-lora-0/adapter.safetensors")
    assert adapter["head.weight"].shape == (2, 8)
    assert adapter["head.weight"].any()


@pytest.mark.parametrize("column", ["branch", None])
def test_rows_are_split_by_entity(
    table: Path, tmp_path: Path, contract_of: Callable[..., Path], column: str | None
) -> None:
    """An owner's rows are all public or none; drawn sites also keep an owner together."""
    contract = contracts.load(
        contract_of(table, "--entity", "owner", "--max-records-per-entity", "2")
    )
    counts = of_file(table, contract, column, tmp_path / "split").counts
    assert sum(int(c["train"]) + int(c["test"]) for c in counts) == 240
    owners: dict[str, set[str]] = {}
    for part in ("train", "test"):
        for file in (tmp_path / "split" / part).glob("*.csv"):
            with file.open(newline="", encoding="utf-8") as lines:
                found = list(csv.DictReader(lines))
            assert {row["site"] for row in found} == {"x"}  # a column of the table's own
            owners.setdefault(f"{part}/{file.stem}", set()).update(row["owner"] for row in found)
    for site in contract.weights():
        assert not owners[f"train/{site}"] & owners[f"test/{site}"]
    if column is None:
        drawn = [owners[f"train/{s}"] | owners[f"test/{s}"] for s in contract.weights()]
        assert sum(map(len, drawn)) == len(set().union(*drawn))


@pytest.mark.parametrize(("labels", "metric"), [("good,bad", "auc"), ("good,bad,odd", "accuracy")])
def test_the_figure_is_one_that_the_task_has(
    table: Path, contract_of: Callable[..., Path], labels: str, metric: str
) -> None:
    found = own_recipe(contract_of(table, "--labels", labels), table, None)
    assert found.config.metric == metric


def test_what_does_not_fit(
    table: Path, tmp_path: Path, contract_of: Callable[..., Path], run: Callable[..., Ran]
) -> None:
    contract = contracts.load(contract_of(table))
    with pytest.raises(DataError, match="Column 'brunch' is not in") as error:
        of_file(table, contract, "brunch", tmp_path / "split")
    assert "Did you mean 'branch'?" in error.value.local
    with pytest.raises(DataError, match="of a site of the contract: bank-a, bank-b, bank-c"):
        of_file(table, contract, "home", tmp_path / "split")
    with pytest.raises(UsageError, match="is no file"):
        own_recipe(table.with_suffix(".toml"), tmp_path / "none.csv", None)
    code, _, wrong = run("sim", "run", table.with_suffix(".toml"))
    assert code == 2
    assert "name its table" in wrong


# How the table is written ---------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.csv"))}


@pytest.mark.parametrize(
    "name",
    [
        "a.csv",
        "a.tsv",
        "a.csv.gz",
        "a.xlsx",
        "a.jsonl",
        "a.parquet",
        "utf16.csv",
        "cp1252.csv",
    ],
)
def test_every_kind_of_file_is_split_like_the_plain_one(
    table: Path, tmp_path: Path, contract_of: Callable[..., Path], name: str
) -> None:
    """All but the first ended in E500 or in one column named 'owner;age;home;…'."""
    contract = contracts.load(contract_of(table))
    rows = [line.split(",") for line in table.read_text(encoding="utf-8").splitlines()]
    rows = [[cell.replace("x", "é–€") for cell in row] for row in rows]
    plain, other, how = tmp_path / "plain.csv", tmp_path / name, Reading()
    plain.write_text(csv_text(rows), encoding="utf-8")
    if name == "a.xlsx":
        write_xlsx(other, rows)
    elif name == "a.jsonl":
        other.write_text(json_text(rows), encoding="utf-8")
    elif name == "a.parquet":
        write_parquet(other, rows)
    else:
        encoding = {"utf16.csv": "utf-16", "cp1252.csv": "cp1252"}.get(name, "utf-8")
        write_text(other, csv_text(rows, "\t" if name == "a.tsv" else ";"), encoding)
        how = Reading(encoding)
    expected = of_file(plain, contract, "branch", tmp_path / "expected")
    found = of_file(other, contract, "branch", tmp_path / "found", how)
    assert found.counts == expected.counts
    assert files_of(tmp_path / "found") == files_of(tmp_path / "expected")


WRONG = {
    "empty.csv": (b"", "E304 Data file empty.csv is empty"),
    "ragged.csv": (
        b"age,home,branch,status\n" + b"30,rent,bank-a,good\n30,rent\n" * 9,
        "4 fields are expected: rows 3, 5",
    ),
    "twice.csv": (
        b"age,home,branch,status,age\n" + b"30,rent,bank-a,good,3\n" * 9,
        "Column 'age' stands twice in the header of twice.csv",
    ),
    "latin1.csv": (
        "age,home,branch,status\n30,rent,bank-a,goodé\n".encode("latin-1"),
        "set encoding='latin-1'",
    ),
    "lines.jsonl": (b'{"age": 1\n', "a line is no JSON object: row 1"),
    "open.csv": (b'age,home,branch,status\n30,"rent,bank-a,good\n', "starts on line 2"),
    "a.zip": (b"PK", ".zip files are not read. Unpack it first"),
    "one.csv": (
        b"age,home,branch,status\n"
        + b"".join(b"%d,rent,bank-%c,good\n" % (20 + i, b"abc"[i % 3]) for i in range(60)),
        "do not define AUC: column 'status' is the same in all of them",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_file_is_one_sentence(
    table: Path,
    contract_of: Callable[..., Path],
    run: Callable[..., Ran],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contract = contract_of(table)
    monkeypatch.chdir(table.parent)
    Path(name).write_bytes(WRONG[name][0])
    code, said, wrong = run("sim", "run", contract, f"data={name}", "site_column=branch")
    assert code == 1, wrong
    assert WRONG[name][1] in wrong
    assert "E500" not in said + wrong


def test_all_sites_problems_are_told_at_once_by_the_rows_of_the_file_before_a_model_is_loaded(
    table: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = table.with_suffix(".toml")
    text = [*ANSWERS[:6], "--text", "home", *ANSWERS[10:]]
    assert run("contract", "new", "--from", table, "--out", out, *text)[0] == 0
    lines = table.read_text(encoding="utf-8").splitlines()
    rows = [next(i for i, line in enumerate(lines) if f"bank-{site}" in line) for site in "abc"]
    for row in rows:
        lines[row] = ",".join([*lines[row].split(",")[:-1], f"odd{row}"])
    table.write_text("\n".join(lines), encoding="utf-8")
    loaded: list[str] = []
    monkeypatch.setattr("silotune.simulations.datasets.catalog.fetch", loaded.append)
    monkeypatch.chdir(table.parent)
    code, _, wrong = run("sim", "run", out, f"data={table}", "site_column=branch")
    assert code == 1
    assert not loaded
    where = ", ".join(str(row + 1) for row in sorted(rows))
    assert "loans.csv does not fit the contract 'loans': column 'status' allows one of" in wrong
    assert f"rows {where}. " in wrong


def test_rows_that_are_left_out_are_counted_and_said(
    table: Path, tmp_path: Path, contract_of: Callable[..., Path]
) -> None:
    contract = contracts.load(contract_of(table))
    lines = table.read_text(encoding="utf-8").splitlines()
    lines[3] = lines[3].replace("bank-", "Bank ")
    lines[5] = ",".join(["1", "30", "rent", " ", "x", "train", "good"])
    table.write_text("\n".join(lines), encoding="utf-8")
    found = of_file(table, contract, "branch", tmp_path / "split")
    assert found.notes == (
        "left out, column 'branch' is of no site of the contract: row 4",
        "left out, column 'branch' names no site: row 6",
    )
    assert sum(int(c["train"]) + int(c["test"]) for c in found.counts) == 238
    table.write_text("\n".join(line.replace("bank-a", "Bank A") for line in lines))
    with pytest.raises(DataError, match=r"fewer than 8 rows for: bank-a\. .* Left out") as error:
        of_file(table, contract, "branch", tmp_path / "split")
    assert "'Bank A'" in error.value.local


def test_texts_that_are_cut_are_said_and_named_as_the_cause(
    tmp_path: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """tags-behind-the-cut.csv: entities behind the cut were blamed on the noise."""
    monkeypatch.chdir(tmp_path)
    Path("notes.conll").write_text(
        "\n\n".join("word O\n" * (100 if i % 2 else 2) + "gout B-Sickness" for i in range(62))
    )
    code, said, wrong = run(
        "contract",
        "new",
        "--from",
        "notes.conll",
        "--out",
        "ner.toml",
        "--task",
        "tokens",
        "--label",
        "tags",
        "--labels",
        "Sickness",
        "--text",
        "words",
        "--site",
        "a",
        "--site",
        "b",
        "--records",
        "30",
    )
    assert code == 0, wrong
    counts = (
        "31 of 62 texts have more words than the model's 96 tokens: what is beyond is not "
        "read, with 31 of 62 entities, in 31 texts. Raise model.max_tokens"
    )
    assert counts in said
    assert "62" not in Path("ner.toml").read_text()
    contract = contracts.load(Path("ner.toml"))
    split = own_recipe(Path("ner.toml"), Path("notes.conll"), None).rows(tmp_path / "run")
    measured = lengths_of(contract, None, split.folder)
    assert counts in measured.sentence


# What a site would refuse is said before anything is computed


def few(table: Path, out: str, *settings: str) -> list[str | Path]:
    return [
        "sim",
        "run",
        table.with_suffix(".toml"),
        f"data={table}",
        "site_column=branch",
        "repeats=1",
        "baseline_repeats=1",
        "variants=federated-lora,pooled-no-dp",
        "processes=1",
        *settings,
        "--out",
        table.parent / out,
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.usefixtures("in_process")
def test_a_device_that_is_not_there_stops_a_simulation_before_it_computes(
    table: Path, contract_of: Callable[..., Path], run: Callable[..., Ran]
) -> None:
    contract_of(table)
    code, said, wrong = run(*few(table, "run", "device=cuda"))
    assert code == 1
    assert "E309 device is 'cuda'" in wrong
    assert said == ""  # not even the data was looked at
    assert not (table.parent / "run").exists()


@pytest.mark.usefixtures("in_process")
def test_a_simulation_that_is_stopped_says_how_many_of_its_runs_are_lost(
    table: Path,
    contract_of: Callable[..., Path],
    run: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, left = contract_of(table), [True]

    def work(job: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return pool_work(job)

    pool_work = worker_pool.work
    monkeypatch.setattr(worker_pool, "work", work)
    monkeypatch.setattr(run_module, "wait", one_at_a_time)
    code, _, wrong = run(*few(table, "run"))
    assert code == 130
    assert re.fullmatch(
        r"Stopped: 1 of \d+ runs were done, and their comparison is lost: a new `silotune sim run` "
        rf"begins again\. What they wrote is in {table.parent / 'run' / 'variants'}\.",
        wrong.strip(),
    )
    code, _, wrong = run("contract", "show", table.parent / "run")
    assert code == 2
    assert "has not ended, or was stopped: it has no contract.json and no result" in wrong
    assert file.exists()


def one_at_a_time(pending: set[Future[Any]], **_: object) -> tuple[Any, Any]:
    """What has a result comes before what was interrupted."""
    first = min(pending, key=lambda future: future.exception() is not None)
    return {first}, pending - {first}


@pytest.mark.usefixtures("in_process")
def test_masks_that_do_not_fit_stop_a_simulation_and_the_advice_works(
    table: Path, contract_of: Callable[..., Path], run: Callable[..., Ran]
) -> None:
    """The masks are the simulation's own: `contract validate` has none to refuse. Their bound fits
    the plan's rates, but not noise that is many times as large as a clipped gradient's sum."""
    file = contract_of(table, "--epsilon", "0.05")
    rate = re.compile(r"^head_lr = .*$", re.MULTILINE)
    file.write_text(rate.sub("head_lr = 9000.0", file.read_text()))
    assert run("contract", "validate", file)[0] == 0
    code, _, wrong = run(*few(table, "run"))
    assert code == 1
    assert "E205 secure_aggregation.bound = 8192 does not fit" in wrong
    assert "masked=false runs without" in wrong
    assert not (table.parent / "run" / "variants").exists()
    file.write_text(re.sub(r"(?m)^rounds = .*$", "rounds = 1", file.read_text()))
    assert run(*few(table, "second", "masked=false"))[0] == 0


def test_a_target_that_no_layer_is_called_stops_a_simulation_before_it_computes(
    tmp_path: Path, run: Callable[..., Ran]
) -> None:
    """The first variants have no adapter: they would be trained, and the adapter's variants then
    fail."""
    folder = tiny.folder_of("bert")
    made = tiny.contract_of("classification", "bert", folder)
    contract = made.changed(adapter={"targets": ["value", "qeury"]})
    file = tmp_path / "typo.json"
    file.write_text(contract.model_dump_json(exclude_none=True))
    table = tiny.write(tmp_path / "rows.csv", tiny.rows_of("classification", 60))
    code, _, wrong = run(
        "sim",
        "run",
        file,
        f"data={table}",
        f"model={folder}",
        "processes=1",
        "repeats=1",
        "baseline_repeats=1",
        "--out",
        tmp_path / "run",
    )
    assert code == 1
    assert "E310 adapter.targets names 'qeury'" in wrong
    assert not (tmp_path / "run" / "variants").exists()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("asked", "main", "rounds"),
    [("pooled-no-dp,federated-no-dp", "federated-no-dp", True), ("alone", "alone", False)],
)
def test_the_variants_that_are_named_are_run_and_no_other(
    table: Path,
    contract_of: Callable[..., Path],
    run: Callable[..., Ran],
    asked: str,
    main: str,
    rounds: bool,
) -> None:
    contract_of(table)
    code, said, wrong = run(*few(table, "run", f"variants={asked}"))
    assert code == 0, wrong
    assert {folder.name.split("-0")[0] for folder in (table.parent / "run/variants").iterdir()} == (
        set(asked.split(","))
    )
    result = json.loads((table.parent / "run" / "result.json").read_text())
    own = next(variant for variant in result["variants"] if variant["main"])
    assert own["name"] == main
    assert bool(result["curve"]) == rounds
    shown = " ".join(said.split())
    assert f"These are of: {own['label']}. The contract's own variant was not run." in shown
    assert "Utility loss" not in shown
    spent = [site["epsilon"] for site in result["privacy"]["sites"]]
    assert all(value is not None and 0 < value <= 8.0 for value in spent) == own["private"]
    assert ("no differential privacy" in shown) != own["private"]


@pytest.mark.usefixtures("in_process")
def test_the_plain_baseline_by_itself_is_a_result_without_an_adapter(
    table: Path, contract_of: Callable[..., Path], run: Callable[..., Ran]
) -> None:
    contract_of(table)
    code, said, wrong = run(*few(table, "run", "variants=plain"), "repeats=3")
    assert code == 0, wrong
    found = RunResult.load(table.parent / "run")
    (row,) = [variant for variant in found.content["variants"] if variant["main"]]
    assert (row["name"], row["label"]) == ("plain", "Gradient boosting, pooled, no DP")
    assert (row["repeats"], row["private"], row["bytes_up"]) == (1, False, 0)
    assert set(row["sites"]) == {"bank-a", "bank-b", "bank-c"}
    assert found.metrics["auc"] == row["metrics"]["auc"]["mean"] > 0.6
    assert found.content["curve"] == []
    assert "adapter watch" not in said
    with pytest.raises(UsageError, match="has no adapter"):
        _ = found.adapter


def test_ones_own_contract_has_the_baselines_of_a_recipe(
    table: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    out = table.with_suffix(".toml")
    # So many that there is room for LoRA.
    text = [*ANSWERS[:6], "--text", "home", *ANSWERS[10:], "--records", "20000"]
    assert run("contract", "new", "--from", table, "--out", out, *text)[0] == 0
    found = own_recipe(out, table, None)
    names = [variant.name for variant in variants_of(found.contract, found.config.variants)]
    assert names == [
        "federated-lora",
        "alone",
        "federated-head",
        "federated-no-dp",
        "pooled-no-dp",
        "plain",
    ]


@pytest.mark.usefixtures("in_process")
def test_the_quick_form_says_so_and_the_second_run_how_long_the_first_took(
    table: Path,
    contract_of: Callable[..., Path],
    run: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("SILOTUNE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("silotune.simulations.comparison.progress.LEAST_SECONDS", 0.0)
    file = contract_of(table)
    file.write_text(re.sub(r"(?m)^rounds = .*$", "rounds = 21", file.read_text()))
    contract = contracts.load(file)
    words = "sim", "run", file, f"data={table}", "processes=1", "--quick", "--out", tmp_path / "run"
    code, said, wrong = run(*words)
    assert code == 0, wrong
    shown = " ".join(said.split())
    assert "first run on this machine: its first rounds show how long it takes" in shown
    assert "left, measured by the first rounds" in shown
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    sentence = (
        "Quick form, with fewer variants and runs, and 20 of 21 rounds: the figures are not those "
        "of the contract, and the hash is of another one."
    )
    assert result["verdict"]["warnings"][0] == sentence
    assert shown.count(sentence) == 2  # before the rounds and with the result
    assert result["quick"] is True
    loaded = RunResult.load(tmp_path / "run")
    assert loaded.table().attrs["quick"] is True
    assert repr(loaded).endswith(", quick=True)")
    assert result["contract_sha256"] != contract.hash
    assert [(v["name"], v["repeats"]) for v in result["variants"]] == [
        ("majority", 1),
        ("federated-lora", 1),
        ("pooled-no-dp", 1),
    ]
    code, said, wrong = run(*words, "repeats=2", "variants=federated-no-dp")
    assert code == 0, wrong
    assert re.search(
        r"about \d+s and \d+\.\d GB of memory, measured on this machine on \d{4}-\d\d-\d\d",
        " ".join(said.split()),
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [(v["name"], v["repeats"]) for v in result["variants"][1:]] == [("federated-no-dp", 2)]
