"""`silotune contract tune`: learning rates from public rows, of which some have no part in it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract
from silotune.common.errors import UsageError
from silotune.server.rounds.run import RoundRecord
from silotune.simulations.datasets import catalog
from silotune.simulations.execution.roster_keys import with_secure_aggregation
from silotune.simulations.execution.variants import Job, JobResult, scale_learning_rates
from silotune.simulations.study import tuning
from silotune.simulations.study.tuned_contract import tuned_text
from silotune.simulations.study.tuning import Rows, Tuning, tune
from silotune.simulations.verdict.differences import Difference
from tests import tiny
from tests.conftest import TABLE_CONTRACT, Ran

# A regression, at rates with which it learns nothing.
CONTRACT = (
    re.sub(
        r"labels = .*",
        'kind = "regression"\nlowest = 0.0\nhighest = 100.0',
        TABLE_CONTRACT,
        count=1,
    )
    .replace("head_lr = 0.5", "# how fast\nhead_lr = 1e-3  # a guess")
    .replace("expected_units = 50", "expected_units = 400")
    .replace("rounds = 3", "rounds = 6")
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Durations are kept in a folder of the test."""
    monkeypatch.setattr(catalog, "home", lambda: tmp_path / "cache")


@pytest.fixture
def contract(tmp_path: Path) -> Path:
    file = tmp_path / "draft.toml"
    file.write_text(CONTRACT)
    return file


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return write(tmp_path / "public.csv", 200)


def write(file: Path, n: int) -> Path:
    """n rows, each with a number of its own; the older have higher outcomes."""
    rng = np.random.default_rng(3)
    lines = ["row,age,smoker,outcome"]
    for row in range(n):
        age = int(rng.integers(20, 90))
        outcome = 15 + 70 * (age >= 50) + rng.normal(0, 3)
        lines.append(f"{row},{age},{rng.choice(['yes', 'no'])},{outcome:.2f}")
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.usefixtures("in_process")
def test_better_rates_are_found_and_written(
    run: Callable[..., Ran], contract: Path, public: Path, tmp_path: Path
) -> None:
    words = ["contract", "tune", contract, "--public", public, "--processes", "1"]
    words += ["--factors", "1000", "--out", tmp_path / "tuned.toml"]
    code, said, meanwhile = run(*words)
    assert code == 0, meanwhile
    assert "200 public rows: 114 for training, 36 for validation, 50 held back\n" in said
    assert (
        "Each simulated site has the 400 rows that the contract expects, with the noise of its "
        "plan: 57 different ones, repeated.\n"
    ) in said
    assert re.search(
        r"^factor +R²  loss\n1 +-\d\.\d{3}  \d\.\d{3}\n1000 +-?\d\.\d{3}  ", said, re.M
    )
    assert "best    factor 1000; phase 1: head_lr 1\n" in said
    assert re.search(
        r"^held back: R² -?\d\.\d+; with the contract's own rates -\d\.\d+; \+\d\.\d+ "
        r"\(standard error \d\.\d+ over test examples, \d\.\d+ over seeds\)\n"
        r"✓ better than the contract's own rates by more than 2 standard errors\n",
        said,
        re.M,
    )
    first, second, *others = meanwhile.splitlines()
    assert first == "tuning small on the public rows of public.csv"
    assert second.startswith("8 runs, 1 at a time: the first search on this machine: its first")
    assert [re.match(r"  \d+/8  factor ", line) for line in others].count(None) <= 1
    assert re.match(
        r"  8/8  factor 10*, run \d: R² -?\d\.\d+ \(\d+ s\), about 0s left$", others[-1]
    )
    written = (tmp_path / "tuned.toml").read_text()
    assert "# how fast\nhead_lr = 1.0" in written
    assert "  # a guess" not in written
    assert (
        "# 1000 times 0.001, by `silotune contract tune` on public rows; other comments describe "
    ) in written
    assert contracts.parse(written) == scale_learning_rates(contracts.load(contract), 1000)
    code, _, wrong = run(*words)
    assert (code, "tuned.toml is there already; name a new file" in wrong) == (2, True)


@pytest.mark.usefixtures("in_process")
def test_rates_that_are_no_better_are_told_and_the_next_search_says_how_long_it_takes(
    run: Callable[..., Ran], contract: Path, public: Path, tmp_path: Path
) -> None:
    contract.write_text(CONTRACT.replace("head_lr = 1e-3", "head_lr = 1.0"))
    words = ["contract", "tune", contract, "--public", public, "--processes", "1"]
    words += ["--repeats", "1", "--factors", "1e-6"]
    code, said, meanwhile = run(*words)
    assert code == 0, meanwhile
    assert "best    factor 1; " in said
    assert "The contract's own rates are the best of these.\nnext:   silotune sim run " in said
    assert "\n  3/3  factor 1, run 1: " in meanwhile
    code, said, meanwhile = run(*words, "--out", tmp_path / "tuned.toml", "--json")
    assert code == 0, meanwhile
    assert re.search(r"^4 runs, 1 at a time: about \d+s, measured on this", meanwhile, re.M)
    found = json.loads(said)
    assert (found["best"], found["better"], found["file"]) == (1.0, False, None)
    assert found["rates"] == [{"head_lr": 1.0}]
    assert [c["factor"] for c in found["factors"]] == [1e-6, 1.0]
    assert found["held_back"]["difference"] is None
    assert not (tmp_path / "tuned.toml").exists()


@pytest.mark.usefixtures("in_process")
def test_no_row_that_is_held_back_has_a_part_in_the_choice(
    contract: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a site has as many records as the plan expects, with the plan's own noise."""
    seen: list[dict[str, set[str]]] = []
    original, plan = tuning.run_jobs, contracts.load(contract)
    names = "north", "south", "east"
    plan, _ = with_secure_aggregation(
        plan.changed(
            sites=[{"name": name} for name in names],
            aggregation={
                "early_stop": {"metric": "r2"},
                "gate": {"metric": "r2", "max_degradation": 0.1},
            },
        ),
        1,
    )

    def looked_at(jobs: list[Job], *words: Any, **more: Any) -> Any:
        for job in jobs:
            assert job.contract.privacy == plan.privacy
            own = job.contract.aggregation
            assert (own.early_stop, own.gate, job.contract.secure_aggregation) == (None,) * 3
            trains = [rows(job.data / "train" / f"{site}.csv") for site in plan.weights()]
            assert [len(own) for own in trains] == [400] * 3
            times = [Counter(own).values() for own in trains]
            assert all(max(own) - min(own) <= 1 for own in times)
            tests = [row for file in job.public_files("test").values() for row in rows(file)]
            seen.append({"train": {row for own in trains for row in own}, "test": set(tests)})
        return original(jobs, *words, **more)

    monkeypatch.setattr(tuning, "run_jobs", looked_at)
    found = tune(plan, public, [1000.0], repeats=1, processes=1, insecure_seed=1)
    search, final = seen[0], seen[-1]
    assert len(seen) == 4
    assert seen[1] == search
    assert seen[2] == final
    assert len(final["test"]) == found.rows.held_back
    assert not final["test"] & (search["train"] | search["test"])
    assert not search["test"] & search["train"]
    assert final["train"] == search["train"] | search["test"]
    again = tune(plan, public, [1000.0], repeats=1, processes=1, insecure_seed=1)
    assert again == found


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("kind", "model", "unit"),
    [
        ("classification", "bert", "entity"),
        ("language", "llama", "record"),
    ],
)
def test_rates_of_layers_are_searched_too(kind: str, model: str, unit: str, tmp_path: Path) -> None:
    """Of entities, a repeated one is another one."""
    folder = tiny.folder_of(model)
    sites = [{"name": "north"}, {"name": "south"}]
    contract = tiny.contract_of(kind, model, folder, unit, sites=sites, quorum=2)
    contract = contract.changed(privacy={"expected_units": 60.0})
    of_people = [
        row | {"person": f"p{number // 2}", "query": f"q{number // 4}"}
        for number, row in enumerate(tiny.rows_of(kind, 320))
    ]
    public = tiny.write(tmp_path / "public.csv", of_people)
    found = tune(contract, public, [0.5], repeats=1, processes=1, model=folder, insecure_seed=1)
    assert found.rows.count == (160 if unit == "entity" else 320)
    assert all(c.metric is not None and c.loss is not None for c in found.candidates)
    assert None not in found.held_back
    assert (found.difference is None) == (found.best == 1.0)


def rows(file: Path) -> list[str]:
    return list(pd.read_csv(file, dtype=str)["row"])


def test_too_few_rows_are_refused_with_the_number_that_is_needed(
    run: Callable[..., Ran], contract: Path, tmp_path: Path
) -> None:
    few = write(tmp_path / "few.csv", 159)
    code, said, wrong = run("contract", "tune", contract, "--public", few)
    assert (code, said) == (1, "")
    assert wrong.splitlines()[-1] == (
        "✗ E304 few.csv has 159 labelled rows, and a search of learning rates for 2 sites needs "
        "160: label more public rows."
    )
    entity = '[privacy.entity]\nkey = ["smoker"]\nmax_records_per_entity = 2\n\n[[phases]]'
    contract.write_text(
        CONTRACT.replace("[[phases]]", entity).replace("[privacy]", '[privacy]\nunit = "entity"')
    )
    few = write(tmp_path / "few.csv", 400)
    code, _, wrong = run("contract", "tune", contract, "--public", few)
    assert (code, "few.csv has 2 entities, and a search" in wrong) == (1, True), wrong


def test_the_first_rounds_say_how_long_a_search_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without what passed before them, while models were loaded."""
    now = 0.0
    monkeypatch.setattr(tuning.time, "monotonic", lambda: now)
    progress = tuning._Progress("auc", [0.5, 1.0], of_run=4.0, runs=3)
    progress.start(2, None, 2)
    for now in (50.0, 51.0, 53.0):  # noqa: B007 - the clock; there are 12 in all
        progress.round("0", 0, 1.0, RoundRecord.__new__(RoundRecord))
    assert capsys.readouterr().err.splitlines()[1:] == ["  about 14s left, by the first rounds"]
    result = JobResult("0", 0, (), {"": {"auc": 0.75}}, (), 3.0, 0, 0)
    progress.done(result)
    assert capsys.readouterr().err == ("  1/3  factor 0.5, run 1: AUC 0.750 (3 s), about 8s left\n")


@pytest.mark.usefixtures("in_process")
def test_rates_that_diverge_are_marked_and_smaller_ones_named_where_all_do(
    run: Callable[..., Ran], contract: Path, public: Path
) -> None:
    far = CONTRACT.replace("clip_norm = 1.0", "clip_norm = 1e5")
    contract.write_text(far.replace("head_lr = 1e-3", "head_lr = 1e-6"))
    words = ["contract", "tune", contract, "--public", public, "--processes", "1"]
    words += ["--repeats", "1"]
    code, said, wrong = run(*words, "--factors", "1e10")
    assert code == 0, wrong
    assert re.search(r"^1e\+10 +diverged$", said, re.M)
    assert "factor 1e+10, run 1: diverged (" in wrong
    assert "best    factor 1; " in said
    contract.write_text(far.replace("head_lr = 1e-3", "head_lr = 1e4"))
    code, _, wrong = run(*words, "--factors", "0.9")
    assert code == 1
    assert "also with 0.9: name smaller ones, such as --factors 0.009,0.09." in wrong


def test_a_file_of_private_records_is_refused(
    run: Callable[..., Ran], contract: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    (site / "data").mkdir(parents=True)
    private = write(site / "data" / "rows.csv", 200)
    (site / "site.toml").write_text('[data]\nfile = "data/../data/rows.csv"\n')
    code, _, wrong = run("contract", "tune", contract, "--public", private)
    assert (code, "is the file of private records in" in wrong) == (2, True)
    assert "name a file of labelled public rows" in wrong
    (site / "site.toml").write_text("no TOML")
    tuning.refuse_private(private, contract)
    (site / "site.toml").write_text('[data]\nfile = "other.csv"\n')
    tuning.refuse_private(private, contract)
    (site / "site.toml").write_text('[data]\nfile = "../rows.csv"\n')  # of the folder around it
    with pytest.raises(UsageError, match="is the file of private records in"):
        tuning.refuse_private(tmp_path / "rows.csv", contract)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--factors", "0.5,x"], "--factors must be numbers above 0 with commas between them"),
        (["--factors", "0,1"], "got '0,1'. For instance: --factors 0.25,0.5,1,2,4."),
        (["--factors", "1e9"], "--factors 1e+09 makes a rate that no contract can have: 'phases.1"),
        (["--public", "none.csv"], "--public none.csv is no file"),
        (["--out", "tuned.json"], "name a file that ends in .toml"),
    ],
)
def test_what_cannot_be_is_refused(
    run: Callable[..., Ran], contract: Path, public: Path, words: list[str], sentence: str
) -> None:
    code, _, wrong = run("contract", "tune", contract, "--public", public, *words)
    assert (code, sentence in wrong) == (2, True), wrong


def test_a_part_that_stays_at_the_sites_is_not_searched(table_contract: Contract) -> None:
    phase = table_contract.phases[0].model_dump(mode="json")
    phase |= {"personal": "mean-regularised", "proximal_mu": 0.1}
    personal = table_contract.changed(phases=[phase], aggregation={"server_momentum": 0.0})
    with pytest.raises(UsageError, match="small leaves a part of the model at each site"):
        tune(personal, Path("none.csv"), [2.0], repeats=1)


@pytest.mark.parametrize(
    ("lead", "held_back", "better"),
    [
        (0.021, (0.9, 0.879), True),
        (0.019, (0.9, 0.881), False),
        (None, (0.9, None), True),  # only the contract's own rates diverge
        (None, (None, 0.9), False),
    ],
)
def test_better_is_more_than_two_standard_errors(
    table_contract: Contract,
    lead: float | None,
    held_back: tuple[float | None, float | None],
    better: bool,
) -> None:
    difference = None
    if lead is not None:
        difference = Difference(0.9, 0.9 - lead, lead, 0.008, (0, 0), 0.006, (0, 0))
    found = Tuning(table_contract, "auc", Rows(1, 1, 1, 1, 1), (), 2.0, held_back, difference)
    assert found.better is better
    assert any(line.startswith("✓ better") for line in found.lines) is better
    assert any(line.startswith("! not better") for line in found.lines) is not better


def test_a_contracts_text_keeps_its_comments_and_loses_its_rule() -> None:
    text = CONTRACT.replace('trains = "head"', 'trains = "head"\nrule = 1')
    own = contracts.parse(text)
    made = tuned_text(text, 0.5)
    assert made.count("\n") == text.count("\n") - 1
    assert "# how fast\n" in made
    phase = own.phases[0].model_dump(mode="json") | {"rule": None}
    assert contracts.parse(made) == scale_learning_rates(own.changed(phases=[phase]), 0.5)


def test_a_contract_of_a_run_becomes_toml(table_contract: Contract) -> None:
    made = tuned_text(table_contract.model_dump_json(), 4.0, is_json=True)
    assert contracts.parse(made) == scale_learning_rates(table_contract, 4.0)


def test_phases_on_one_line_have_no_comments() -> None:
    made = tuned_text('phases = [{ trains = "head", head_lr = 1.0 }]\n', 2.0)
    assert made == 'phases = [{ trains = "head", head_lr = 2.0 }]\n'
