"""The result's table at every width: no figure is lost, none is broken, no line is too long."""

from __future__ import annotations

import io
import itertools
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from silotune.common.cli.main import next_step
from silotune.common.contract.contract import Contract
from silotune.common.tokenization.token_lengths import Lengths
from silotune.server.rounds.run import RoundRecord
from silotune.simulations.comparison import progress as progress_module
from silotune.simulations.comparison.duration import Duration
from silotune.simulations.comparison.progress import (
    Progress,
    folded_step,
    result_tables,
)
from silotune.simulations.execution.variants import Job, JobResult
from tests.conftest import Ran
from tests.tiny import recipe_config

LABELS = (
    "Always the majority class",
    "Federated DP-LoRA",
    "Alone, DP-LoRA, same plan",
    "Alone, DP-LoRA, own rates",
    "Federated DP head",
    "Federated DP one-hot",
    "Federated LoRA without DP",
    "Pooled LoRA without DP",
)
HOSPITALS = ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")
LETTERS = st.sampled_from("abcZ -_é中国")
NAMES = st.text(LETTERS, min_size=1, max_size=64).map(str.strip).filter(bool)


def result_of(sites: tuple[str, ...], variants: int, repeats: int, seed: int = 0) -> dict[str, Any]:
    """A result as simulations/comparison/summary.py makes it, each figure of it another."""
    order = 1 + np.random.default_rng(seed).permutation(999)  # 0.000 stands in a δ of 0.0001
    numbers = iter(order[: (2 + len(sites)) * variants].tolist())

    def figure() -> dict[str, float]:
        return {"mean": next(numbers) / 1000, "sd": 0.012}

    return {
        "metric": {"name": "auc", "label": "AUC"},
        "privacy": {"sites": [{"site": site} for site in sites]},
        "variants": [
            {
                "label": label,
                "repeats": repeats,
                "main": place == 1,
                "private": place % 2 == 0,
                "epsilon": 8.0 if place % 2 == 0 else None,
                "delta": 1e-4,
                "stopped": None,
                "metrics": {"auc": figure()},
                "sites_mean": figure(),
                "sites": {site: figure() for site in sites},
                "bytes_up": 1_536_000 + place,
                "bytes_down": 12_269_000,
                "seconds": 1021.0,
            }
            for place, label in enumerate(LABELS[:variants])
        ],
    }


def lines_of(result: dict[str, Any], width: int) -> list[str]:
    console = Console(
        width=width, file=io.StringIO(), force_terminal=False, soft_wrap=True, highlight=False
    )
    for table in result_tables(result, width):
        console.print(table, soft_wrap=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def figures_of(result: dict[str, Any]) -> list[str]:
    found = []
    for variant in result["variants"]:
        for figure in (
            variant["metrics"]["auc"],
            variant["sites_mean"],
            *variant["sites"].values(),
        ):
            found.append(f"{figure['mean']:.3f}" + " ±0.012" * (variant["repeats"] > 1))
    return found


def test_the_table_of_noise_from_a_known_seed_has_no_finite_epsilon() -> None:
    result = result_of(("north",), 3, 1)
    assert any("8 (0.0001)" in line for line in lines_of(result, 200))
    result["privacy"]["insecure"] = True
    assert not any("8 (0.0001)" in line for line in lines_of(result, 200))
    assert sum("∞" in line for line in lines_of(result, 200)) == 3


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(40, 220),
    variants=st.integers(1, len(LABELS)),
    repeats=st.sampled_from((1, 3)),
    sites=st.lists(NAMES, max_size=12, unique=True).map(tuple),
    seed=st.integers(0, 9),
)
@example(width=80, variants=8, repeats=3, sites=HOSPITALS, seed=0)
@example(width=100, variants=8, repeats=3, sites=HOSPITALS, seed=0)
@example(width=120, variants=8, repeats=3, sites=HOSPITALS, seed=0)
@example(width=40, variants=8, repeats=3, sites=("x" * 64, "seconds", "mean of sites"), seed=0)
def test_every_figure_stands_whole_on_a_line_that_fits(
    width: int, variants: int, repeats: int, sites: tuple[str, ...], seed: int
) -> None:
    result = result_of(sites, variants, repeats, seed)
    lines = lines_of(result, width)
    assert max(map(cell_len, lines)) <= width
    text = "\n".join(lines)
    for figure in figures_of(result):
        assert text.count(figure) == 1, figure
    for whole in ("8 (0.0001)", "1,536", "12,269", "1021"):
        assert text.count(whole) >= variants // 2, whole
    assert all(site.split()[0][:6] in text for site in sites)  # the rest may be on another line


@pytest.mark.parametrize("width", [80, 100, 120])
def test_sites_are_rows_where_columns_do_not_fit(width: int) -> None:
    result = result_of(HOSPITALS, 8, 3)
    lines = lines_of(result, width)
    assert not any("Cleveland" in line and "Hungary" in line for line in lines)
    for site in HOSPITALS:
        figures = [f"{a['sites'][site]['mean']:.3f} ±0.012" for a in result["variants"]]
        of_site = [line for line in lines if line.startswith(site)]
        assert all(any(figure in line for line in of_site) for figure in figures)


def test_sites_are_columns_where_they_fit() -> None:
    lines = lines_of(result_of(HOSPITALS, 8, 3), 200)
    assert len(lines) == 9
    assert all(site in lines[0] for site in HOSPITALS)


def test_one_site_more_makes_rows_of_them() -> None:
    """There is one width, and not a range of them, at which the layout changes."""
    wide = [len(lines_of(result_of(HOSPITALS, 8, 3), width)) == 9 for width in range(60, 200, 5)]
    assert len(list(itertools.groupby(wide))) == 2


# The live line


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def round_of(number: int) -> RoundRecord:
    return RoundRecord(number, ("north",), {}, {}, 0, 0, 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress_module, "time", found)
    return found


def job_of(contract: Contract) -> Job:
    return Job(
        "federated-lora",
        0,
        contract,
        Path("variant"),
        None,
        Path("split"),
        federated=True,
        evaluate_every=1,
    )


def test_something_is_shown_at_once_and_no_time_left_without_a_time(
    table_contract: Contract, clock: Clock
) -> None:
    shown = Progress(recipe_config("x"), table_contract)
    jobs = [job_of(table_contract)] * 100
    shown.console = Console(file=io.StringIO(), force_terminal=True, width=100)
    shown.start([], jobs, 1)
    shown.stop()
    assert isinstance(shown.console.file, io.StringIO)
    assert "starting 100 runs, 0s" in shown.console.file.getvalue()
    assert "held-out" in shown.console.file.getvalue()  # no public table: the user's own file
    clock.now = 95.0
    assert shown._status().plain == "starting 100 runs, 1m35s"
    shown.round("alone", 0, jobs[0].cost / 3, round_of(1))
    assert shown._status().plain == "comparing: 0 of 100 runs done, 0 %, 1m35s so far"
    clock.now = 100.0
    assert "left" not in shown._status().plain
    shown.round("alone", 0, 10 * jobs[0].cost, round_of(2))
    assert re.search(r"10 %, 1m40s so far, \d+s left$", shown._status().plain)


def test_the_time_left_is_by_the_rounds_of_the_main_run(
    table_contract: Contract, clock: Clock
) -> None:
    main = job_of(table_contract)
    jobs = [main, *(replace(main, variant=f"other-{k}") for k in range(3))]
    shown = Progress(recipe_config("x"), table_contract, quiet=True)
    shown.start([], jobs, 2)  # four runs alike, two at a time
    clock.now = 20.0
    shown.round("other-0", 0, main.cost / 3, round_of(1))
    clock.now = 20.1
    shown.round("other-0", 0, main.cost / 3, round_of(2))  # cheap: 2/3 of a run in 0.1 s
    assert shown._left() == ""
    clock.now = 30.0
    shown.round("federated-lora", 0, main.cost / 3, round_of(1))
    assert shown._left() == ""
    clock.now = 40.0
    shown.round("federated-lora", 0, main.cost / 3, round_of(2))
    # A run takes 30 s; 4 - 4/3 of them are left.
    assert shown._left() == "40s"


def test_before_rounds_show_the_time_left_it_is_that_of_the_last_comparison(
    table_contract: Contract, clock: Clock
) -> None:
    main = job_of(table_contract)
    jobs = [main, replace(main, variant="other")]
    shown = Progress(recipe_config("x"), table_contract, quiet=True)
    shown.start([], jobs, 1, last_time=Duration.of(jobs, 1, 100.0, 1, "2026-11-30"))
    clock.now = 10.0
    shown.round("other", 0, main.cost / 3, round_of(1))
    assert shown._left() == "1m30s"
    for now in (11.0, 12.0):  # too short for a rate
        clock.now = now
        shown.round("federated-lora", 0, main.cost / 3, round_of(1))
    assert shown._left() == "1m28s"
    clock.now = 101.0
    assert shown._left() == ""


def test_one_is_no_plural(table_contract: Contract, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(recipe_config("x"), table_contract)
    shown.start([], [job_of(table_contract)], 1)
    assert "1 run to compare 1 variant, 1 at a time" in capsys.readouterr().out


def test_no_figure_of_a_site_with_a_target_of_its_own_exceeds_what_is_said(
    table_contract: Contract, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head and the column of ε: "11.90 of 8" would contradict itself."""
    sites = [{"name": "north"}, {"name": "south", "epsilon": 12.0}]
    contract = table_contract.changed(sites=sites)
    assert contract.largest_target == (12.0, 1e-4)
    shown = Progress(recipe_config("x"), contract)
    shown.start([], [job_of(contract)], 1)
    said = " ".join(capsys.readouterr().out.split())
    assert "each site ε ≤ 8.00, δ = 0.0001 (exact composition)" in said
    assert "but south ε ≤ 12, δ = 0.0001 (exact composition)" in said
    assert "ε of 12.00" in said


def test_the_head_says_what_the_plan_can_learn(
    table_contract: Contract, capsys: pytest.CaptureFixture[str]
) -> None:
    phase = {"trains": "head", "rounds": 3, "sampling_rate": 1.0, "head_lr": 0.5}
    contract = table_contract.changed(privacy={"epsilon": 0.5}, phases=[phase])
    shown = Progress(recipe_config("x"), contract)
    shown.start([], [job_of(contract)], 1)
    said = " ".join(capsys.readouterr().out.split())
    assert " ! too few records for a medium signal at this ε (n = 50 records per site" in said
    assert "the noise alone moves a score by" in said


@pytest.mark.parametrize("quiet", [False, True])
def test_a_pipe_says_at_once_what_takes_time(
    table_contract: Contract, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    shown = Progress(recipe_config("x"), table_contract, quiet=quiet)
    with shown.busy("checking the plan"):
        assert capsys.readouterr().out == ("" if quiet else "checking the plan\n")
    assert capsys.readouterr().out == ""


def test_a_pipe_has_the_width_that_columns_says(
    table_contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = recipe_config("x")
    for columns, width in (("120", 120), ("", 80), ("wide", 80)):
        monkeypatch.setenv("COLUMNS", columns)
        assert Progress(facts, table_contract).console.width == width


@pytest.mark.parametrize("words", [["sim", "ls"], ["data", "ls"]])
def test_no_name_overruns_its_column(words: list[str], run: Callable[..., Ran]) -> None:
    lines = run(*words)[1].splitlines()
    rows = json.loads(run(*words, "--json")[1])
    key = "title" if words[0] == "sim" else "about"
    both = zip(lines, rows, strict=False)  # `sim ls` says what to do next, too
    assert len({line.index(row[key], len(row["name"])) for line, row in both}) == 1


# Lines of 80 columns


def test_all_that_a_run_prints_fits_on_80_columns(
    lora_contract: Contract, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    sites = [{"name": site} for site in HOSPITALS]
    contract = lora_contract.changed(sites=sites, quorum=4, privacy={"delta": 0.009})
    assert contract.delta_warnings  # a sentence of more than 80 characters
    shown = Progress(recipe_config("Heart disease, " * 9), contract)
    note = "Two rows of a site are left out, since what their columns say is not in the contract."
    jobs = [job_of(contract)]
    with shown.busy(f"fetching and checking data {shown.config.title}"):
        shown.start(
            [{"train": 1_000_000, "test": 1_000}], jobs, 2, (note,), Lengths((0, 0, 0, 5), 2)
        )
    failed = dict.fromkeys(HOSPITALS, "E401")
    metrics = {"loss": 0.5, "auc": 0.9}
    shown.round("federated-lora", 0, 1.0, RoundRecord(1, HOSPITALS, failed, {}, 0, 0, 0.0, metrics))
    shown.done(JobResult("federated-lora", 0, HOSPITALS, {}, (), 99.0, 1, 1))
    item = {"status": "yes", "label": "calibrated", "detail": note}
    verdict = {"headline": note, "checklist": [item], "lines": [note * 3], "warnings": [note]}
    result = result_of(HOSPITALS, 8, 3) | {"verdict": verdict, "seconds": 9.0}
    shown.finish(result | {"peak_memory_bytes": 2**31}, Path("runs") / "demo" / ("x" * 40))
    said = capsys.readouterr().out
    assert max(map(cell_len, said.splitlines())) <= 80
    assert note in " ".join(said.split())
    assert f"RESULT {note} ✓ calibrated: {note}" in " ".join(said.split())
    assert f"without {', '.join(HOSPITALS)}" in said
    step = re.search(r"^next:   (silotune contract show .*)\Z", said, re.M | re.S)
    assert step
    assert shlex.split(step[1].replace("\\\n", "")) == [
        "silotune",
        "contract",
        "show",
        f"runs/demo/{'x' * 40}",
    ]


def test_a_command_of_several_lines_is_the_same_command_for_a_shell() -> None:
    words = ("adapter", "watch", "a run/variants/federated-lora-0", "splits/heart/test/VA Long.csv")
    whole = next_step(*words, note="needs: a package")
    made = folded_step(whole, 60)
    assert max(map(cell_len, made.splitlines())) <= 60
    command, _, note = made.rpartition("\n")
    assert note.strip() == "(needs: a package)"
    assert shlex.split(command.removeprefix("next:").replace("\\\n", "")) == ["silotune", *words]
    assert folded_step(whole, 200) == whole
