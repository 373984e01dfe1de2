"""`sim compare`: every cell of the grid once, kept where it was stopped, and told as it is."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.errors import ContractError, UsageError
from silotune.simulations.comparison.provenance import machine
from silotune.simulations.comparison.recipe import Recipe
from silotune.simulations.datasets.partition import Partition
from silotune.simulations.datasets.split import Split
from silotune.simulations.execution.variants import Job
from silotune.simulations.study import report
from silotune.simulations.study import study as studies
from silotune.simulations.study.config import Study, load_study, rates_of, study_file
from silotune.simulations.study.store import StudyStore
from silotune.simulations.study.study import cells_of, compare
from tests import tiny
from tests.conftest import Ran
from tests.simulations.datasets.test_partition import contract_of, split_of

TOML = """
title = "A small one"
recipe = "heart-diagnosis"
repeats = 2
evaluate_every = 1
epsilons = [inf, 8.0]
[partitions.natural]
[partitions.skewed]
kind = "labels"
alpha = 1.0
[variants.together]
about = "the contract as it is"
[variants.alone]
rows = "alone"
[variants.pooled]
rows = "pooled"
no_dp = { phases = [{ trains = "head", rounds = 2, sampling_rate = 1.0, head_lr = 2.0 }] }
"""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "small.toml").write_text(TOML)
    return load_study(tmp_path / "small.toml")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    source = split_of(tmp_path / "rows")
    return Recipe(
        "small",
        contract_of(),
        tiny.recipe_config("small", "accuracy"),
        {},
        lambda _: Split([], source),
    )


def test_cells_with_the_noise_of_another_account_are_asked_for_anew(
    study: Study, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those without noise are what they were."""
    cells = list(cells_of(study, recipe))
    now = [studies.request_digest(cell, study, "rows") for cell in cells]
    monkeypatch.setattr(studies, "EXACT", "RDP")
    before = [studies.request_digest(cell, study, "rows") for cell in cells]
    assert [a == b for a, b in zip(now, before, strict=True)] == [
        math.isinf(cell.epsilon) for cell in cells
    ]


def test_a_study_runs_each_cell_once_and_goes_on_where_it_was_stopped(
    study: Study,
    recipe: Recipe,
    tmp_path: Path,
    ran: list[Job],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = compare(study, tmp_path / "out", 1, recipe)
    assert len(found["cells"]) == 2 * 2 * 3 * 2  # repeats, partitions, variants, ε
    assert len(ran) == 2 * 2 * 2 * (1 + 2 + 1)  # two sites alone are two jobs
    alone = found["cells"]["alone | ε 8 | natural | 0"]
    assert alone["machine"] == machine("")
    assert set(alone["sites"]) == {"a", "b"}
    assert alone["epsilon"] == 8.0
    assert found["cells"]["alone | ε inf | natural | 0"]["epsilon"] is None
    assert [p["round"] for p in found["cells"]["pooled | ε inf | natural | 0"]["curve"]] == [1, 2]
    # Stopped after some: the rest runs, and nothing twice.
    file = tmp_path / "out" / "study.json"
    kept = json.loads(file.read_text())
    gone = ["alone | ε 8 | skewed | 1", "together | ε inf | natural | 0"]
    for key in gone:
        del kept["cells"][key]
    file.write_text(json.dumps(kept))
    ran.clear()
    otherwise = Performance(micro_batch=3, device="cpu")
    capsys.readouterr()
    again = compare(study, tmp_path / "out", 1, recipe, performance=otherwise, stderr=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1 + 3  # how many there are to run, and one for each
    assert [job.performance for job in ran] == [otherwise] * 3  # two sites alone, all together
    assert set(again["cells"]) == set(found["cells"])
    # Changed: what is new is run.
    ran.clear()
    changed = study.model_copy(
        update={
            "variants": study.variants
            | {
                "together": study.variants["together"].model_copy(
                    update={"contract": {"quorum": 2}}
                )
            }
        }
    )
    compare(changed, tmp_path / "out", 1, recipe)
    assert [job.contract.quorum for job in ran] == [2] * 8
    text = report.markdown(found)
    assert "cores.\n" in text
    two = dict(found["cells"])
    for key in list(two)[:5]:
        two[key] = two[key] | {"machine": "z, 16 cores, H100"}
    assert "cores (19 cells); z, 16 cores, H100 (5 cells).\n" in report.markdown(
        found | {"cells": two}
    )
    # Of before cells said where they were made: they were made where their file says.
    for cell in kept["cells"].values():
        del cell["machine"]
    file.write_text(json.dumps(kept | {"machine": "a, 3 cores"}))
    moved = compare(study, tmp_path / "out", 1, recipe)["cells"]
    assert sorted(cell["machine"] for cell in moved.values()) == sorted(
        ["a, 3 cores"] * 22 + [machine("")] * 2
    )
    assert machine("H100").endswith(" cores, H100")
    assert "| together | " in text
    assert "**skewed**" in text
    assert "**natural, each site's own rows, ε 8**\n\n| variant | a | b |" in text
    for cell in found["cells"].values():  # a way of two rounds
        cell["curve"] += [point | {"round": 2, "kilobytes": 2000} for point in cell["curve"]]
    files = report.draw(found, tmp_path / "out")
    assert [f.name for f in files] == ["epsilon.svg", "rounds.svg", "bytes.svg"]
    assert all(">together<" in f.read_text() for f in files)
    assert "at ε 8" in files[1].read_text()
    json.loads((tmp_path / "out" / "study.json").read_text(), parse_constant=pytest.fail)
    assert (tmp_path / "out" / "rows-skewed.svg").is_file()


def test_lines_have_a_point_for_each_round_that_is_known(
    study: Study, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where repeats were evaluated in different rounds."""
    found = compare(study, tmp_path / "out", 1, recipe)
    longer = found["cells"]["pooled | ε 8 | natural | 1"]["curve"]
    found["cells"]["pooled | ε 8 | natural | 0"]["curve"] = [longer[0] | {"round": 7}]
    drawn: list[tuple[str, list[float]]] = []
    original = report._band

    def seen(axes: Any, points: Any, label: str, *args: Any, **more: Any) -> None:
        drawn.append((label, [x for x, *_ in points]))
        original(axes, points, label, *args, **more)

    monkeypatch.setattr(report, "_band", seen)
    report.draw(found, tmp_path / "out")
    assert ("pooled", [1, 7]) in drawn
    assert ("together", [1]) in drawn
    assert ("alone", []) in drawn  # each goes its own way


def test_many_variants_have_a_row_each_and_a_few_lines_a_panel(
    study: Study, recipe: Recipe, tmp_path: Path
) -> None:
    many = study.model_copy(
        update={
            "repeats": 1,
            "epsilons": (8.0,),
            "partitions": {"natural": Partition()},
            "variants": {
                f"variant {k}": study.variants["together"] for k in range(report.MOST_LINES + 1)
            },
        }
    )
    found = compare(many, tmp_path / "out", 1, recipe)
    (file,) = report.draw(found, tmp_path / "out")  # of one round there is no way to draw
    assert file.name == "epsilon.svg"
    for cell in found["cells"].values():
        cell["curve"].append(cell["curve"][0] | {"round": 2, "kilobytes": 2000})
    files = report.draw(found, tmp_path / "out")
    assert [f.name for f in files] == ["epsilon.svg", "rounds.svg", "bytes.svg"]
    # Of a study that is not whole the variants that are there are drawn; without any ways none is.
    (tmp_path / "part").mkdir()
    part = {key: cell for key, cell in found["cells"].items() if cell["variant"] == "variant 12"}
    report.draw(found | {"cells": part}, tmp_path / "part")
    text = (tmp_path / "part" / "rounds.svg").read_text()
    assert ">variant 12<" in text
    assert ">variant 1<" not in text
    assert len(report.draw(found | {"cells": {}}, tmp_path / "part")) == 1
    assert not (tmp_path / "part" / "rounds.svg").exists()
    for file in files:
        text = file.read_text()
        assert all(f">variant {k}<" in text for k in range(report.MOST_LINES + 1))
        assert text.count(">natural<") == (1 if file.stem == "epsilon" else 2)


def test_other_rows_or_rounds_of_evaluation_are_run_anew(
    study: Study, recipe: Recipe, tmp_path: Path, ran: list[Job]
) -> None:
    small = study.model_copy(update={"repeats": 1, "partitions": {"natural": Partition()}})
    compare(small, tmp_path / "out", 1, recipe)
    compare(small, tmp_path / "out", 1, recipe)
    assert len(ran) == 8
    compare(small.model_copy(update={"evaluate_every": 2}), tmp_path / "out", 1, recipe)
    assert len(ran) == 16
    file = tmp_path / "rows" / "train" / "a.csv"
    file.write_text(file.read_text().replace("yes", "no"))
    compare(small, tmp_path / "out", 1, recipe)
    assert len(ran) == 24
    (tmp_path / "out" / "study.json").write_text('{"cells": ')
    with pytest.raises(UsageError, match="is no result of a study"):
        compare(small, tmp_path / "out", 1, recipe)


def test_variants_differ_as_they_say(study: Study, recipe: Recipe) -> None:
    cells = {cell.key: cell for cell in cells_of(study, recipe)}
    (whole,) = cells["together | ε 8 | natural | 0"].contracts
    assert (whole.privacy.epsilon, whole.privacy.mode) == (8.0, "dp")
    (plain,) = cells["together | ε inf | natural | 0"].contracts
    assert plain.privacy.mode == "none"
    assert plain.phases == whole.phases
    (pooled,) = cells["pooled | ε inf | natural | 0"].contracts
    assert pooled.rounds == 2
    assert pooled.privacy.expected_units == 2 * whole.privacy.expected_units
    assert cells["pooled | ε 8 | natural | 0"].contracts[0].rounds == 1
    assert [c.sites[0].name for c in cells["alone | ε 8 | natural | 1"].contracts] == ["a", "b"]


def test_rates_are_chosen_without_the_public_rows(
    study: Study, recipe: Recipe, tmp_path: Path, ran: list[Job]
) -> None:
    """Each variant once at each rate, where there is no public row left to look at."""
    shutil.rmtree(tmp_path / "rows" / "test")
    faster = study.variants["together"].model_copy(update={"lr_scale": {8.0: 3.0}})
    small = study.model_copy(
        update={
            "partitions": {"natural": Partition()},
            "variants": study.variants | {"together": faster},
        }
    )
    asked = rates_of(small, [0.5, 2.0])
    found = compare(asked, tmp_path / "out", 1, recipe)
    assert {cell["repeat"] for cell in found["cells"].values()} == {0}
    assert len(ran) == 2 * 2 * (1 + 2 + 1)  # rates, ε, variants
    rates = {
        (cell.variant, cell.epsilon): cell.contracts[0].phases[0].head_lr
        for cell in cells_of(asked, recipe)
    }
    assert rates["together x0.5", math.inf] == 0.5
    assert rates["together x2", 8.0] == 6.0
    assert rates["pooled x2", math.inf] == 4.0  # of `no_dp`
    text = report.markdown(found)
    assert "on a quarter of the training rows of `heart-diagnosis`; one run each; δ" in text
    assert "| pooled x0.5 | " in text


@pytest.mark.usefixtures("in_process")
def test_rates_of_a_contract_of_ones_own_are_compared_and_one_may_diverge(
    tmp_path: Path, run: Callable[..., Ran]
) -> None:
    sites = [{"name": "north"}, {"name": "south"}]
    contract = tiny.contract_of(
        "regression",
        "one-hot",
        sites=sites,
        quorum=2,
        privacy={"expected_units": 30.0, "clip_norm": 1e3},
    )
    contract = contract.changed(
        phases=[contract.phases[0].model_dump(mode="json") | {"rounds": 8, "head_lr": 1e-4}]
    )
    (tmp_path / "own.json").write_text(contract.model_dump_json(exclude_none=True))
    table = tiny.write(tmp_path / "rows.csv", tiny.rows_of("regression", 80))
    words = ["sim", "compare", tmp_path / "own.json", f"data={table}", "--processes", "1"]
    code, said, wrong = run(*words, "--rates", "1", "--rates", "1e8", "--out", tmp_path / "out")
    assert code == 0, wrong
    assert "R² on a quarter of the training rows of `tiny`" in said
    (kept,) = [line for line in said.splitlines() if line.startswith("| tiny x1 |")]
    assert re.fullmatch(r"\| tiny x1 \| -?\d+\.\d{3} \|", kept)
    assert "| tiny x1e+08 | diverged |" in said
    cells = json.loads((tmp_path / "out" / "study.json").read_text())["cells"].values()
    (stopped,) = [cell for cell in cells if cell["stopped"]]
    assert "training diverged" in stopped["stopped"]
    assert stopped["scores"] == {}
    code, again, wrong = run(*words, "--rates", "1", "--rates", "1e8", "--out", tmp_path / "out")
    assert "2 cells, 0 to run" in again, wrong
    code, _, wrong = run(*words)
    assert (code, "goes with a contract and --rates" in wrong) == (2, True)
    (tmp_path / "own.toml").write_text("[task]\n[privacy]\n")
    code, _, wrong = run("sim", "compare", tmp_path / "own.toml", "--rates", "2")
    assert (code, "own.toml is a contract: name its table, data=FILE.csv" in wrong) == (2, True)
    code, _, wrong = run("sim", "compare", "heart-methods", "epsilon=3")
    assert (code, "'epsilon=3' is not a setting" in wrong) == (2, True)


def test_only_what_was_asked_for_is_run_and_the_rest_is_kept(
    study: Study, recipe: Recipe, tmp_path: Path, ran: list[Job]
) -> None:
    small = study.model_copy(update={"partitions": {"natural": Partition()}})
    first = compare(small, tmp_path / "out", 1, recipe, only=["pooled *", "* | ε inf | *| 1"])
    assert set(first["cells"]) == {
        "pooled | ε inf | natural | 0",
        "pooled | ε inf | natural | 1",
        "pooled | ε 8 | natural | 0",
        "pooled | ε 8 | natural | 1",
        "alone | ε inf | natural | 1",
        "together | ε inf | natural | 1",
    }
    ran.clear()
    second = compare(small, tmp_path / "out", 1, recipe, only=["together | ε 8 | * | 0"])
    assert len(ran) == 1
    assert set(second["cells"]) == set(first["cells"]) | {"together | ε 8 | natural | 0"}
    assert "\n7 of 12 cells are there.\n" in report.markdown(second)
    assert "exact composition, per record.\n0 of 12 cells are there.\n" in report.markdown(
        second | {"cells": {}}
    )
    with pytest.raises(UsageError, match="--only 'together' is like no cell"):
        compare(small, tmp_path / "out", 1, recipe, only=["* | ε 8 | *", "together"])
    # Of another grid in the same folder: both are kept, and each tells its own.
    other = small.model_copy(
        update={"variants": {"pooled": study.variants["pooled"]}, "repeats": 1}
    )
    third = compare(other, tmp_path / "out", 1, recipe)
    assert set(third["cells"]) == {"pooled | ε inf | natural | 0", "pooled | ε 8 | natural | 0"}
    assert compare(small, tmp_path / "out", 1, recipe, only=["pooled *"]) == second


def test_no_cell_is_lost_where_several_write(tmp_path: Path) -> None:
    kept = [StudyStore(tmp_path, {"title": "one"}) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for n in range(20):
            threads.submit(kept[n % 4].put, f"cell {n}", {"asked": str(n)})
    assert set(kept[0].cells()) == {f"cell {n}" for n in range(20)}
    assert json.loads(kept[0].file.read_text())["title"] == "one"


def test_repeats_come_one_after_the_other(study: Study, recipe: Recipe) -> None:
    """So that a study that is stopped has all variants, with fewer repeats."""
    repeats = [cell.repeat for cell in cells_of(study, recipe)]
    assert repeats == sorted(repeats)


def test_an_interval_is_students(tmp_path: Path) -> None:
    mean, half = report.interval([0.7, 0.72, 0.74, 0.76, 0.78])
    assert mean == pytest.approx(0.74)
    assert half == pytest.approx(2.776 * 0.0316228 / math.sqrt(5), rel=1e-2)
    assert report.interval([0.5]) == (0.5, 0.0)
    assert report._formatted([0.5]) == "0.500"  # one value has no interval


def test_a_wrong_study_is_told_with_its_place(tmp_path: Path, recipe: Recipe) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(TOML.replace("repeats = 2", "repeats = 0"))
    with pytest.raises(ContractError, match="repeats"):
        load_study(file)
    file.write_text(TOML.replace('rows = "alone"', 'rows = "alone"\npoison = { kind = "sign" }'))
    with pytest.raises(ContractError, match="poison is of one among others"):
        load_study(file)
    file.write_text(TOML.replace('rows = "alone"', "contract = { quorum = 9 }"))
    with pytest.raises(ContractError, match="the study's variant 'alone'"):
        list(cells_of(load_study(file), recipe))
    file.write_text(TOML.replace('rows = "alone"', 'rows = "alone"\nlr_scale = { 2 = 0.5 }'))
    with pytest.raises(
        ContractError, match="variant 'alone' has lr_scale for ε 2, at which it is not"
    ):
        load_study(file)
    with pytest.raises(UsageError, match="There is no study 'nothing'"):
        study_file("nothing")


def test_the_shipped_studies_are_valid() -> None:
    from silotune.simulations.comparison.recipe import load_recipe

    names = [p.stem for p in (Path(report.__file__).parents[1] / "studies").glob("*.toml")]
    assert names
    for name in names:
        found = load_study(study_file(name))
        assert found.repeats >= 5
        for cell in cells_of(found, load_recipe(found.recipe)):
            assert all(isinstance(c, Contract) for c in cell.contracts)


def test_a_model_of_each_sites_own_and_what_it_gains(recipe: Recipe, tmp_path: Path) -> None:
    """By site stands the site's own model, beside it what was released; overall the mean over the
    sites' models. A variant may have its own ε."""
    (tmp_path / "own.toml").write_text("""
title = "Own"
recipe = "heart-diagnosis"
repeats = 2
by_site = true
epsilons = [inf, 8.0]
[variants.together]
epsilons = [3.0]
[variants.copies.contract]
aggregation = { server_momentum = 0.0 }
phases = [{ trains = "head", rounds = 3, sampling_rate = 1.0, head_lr = 2.0, personal = "mean-regularised", proximal_mu = 0.1 }]
""")  # noqa: E501 - a table stands on one line
    study = load_study(tmp_path / "own.toml")
    assert [(c.variant, c.epsilon) for c in cells_of(study, recipe) if c.repeat == 0] == [
        ("together", 3.0),
        ("copies", math.inf),
        ("copies", 8.0),
    ]
    found = compare(study, tmp_path / "out", 1, recipe)
    for cell in found["cells"].values():
        assert set(cell["sites"]) == {"a", "b"}
        assert set(cell["released"]) == ({"a", "b"} if cell["variant"] == "copies" else set())
    plain = found["cells"]["copies | ε inf | natural | 0"]
    assert any(plain["sites"][site]["loss"] != plain["released"][site]["loss"] for site in "ab")
    text = report.markdown(found)
    gain = [
        sum(c["sites"][s]["accuracy"] - c["released"][s]["accuracy"] for s in "ab") / 2
        for c in found["cells"].values()
        if (c["variant"], c["epsilon"]) == ("copies", 8.0)
    ]
    shown = next(line for line in text.splitlines() if line.startswith("| copies, natural, ε 8"))
    assert shown.split("|")[-2].strip().startswith(f"{sum(gain) / 2:.3f} ±")
    assert "| together, natural" not in text
