"""`silotune.simulate`: the target call at the top level of a script, and what it refuses."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import silotune as st
from silotune.common.errors import ContractError, DataError, SilotuneError, UsageError
from silotune.server.report.report import guarantee
from silotune.simulations.comparison import simulate as module
from silotune.simulations.comparison.recipe import load_recipe, recipe_of, with_baselines
from silotune.simulations.comparison.simulate import _joined, _variants
from tests import tiny
from tests.test_layout import ROOT

SCRIPT = """
import numpy as np
import pandas as pd
import silotune as st

rng = np.random.default_rng(0)
df = pd.DataFrame({"age": rng.integers(20, 90, 160), "smoker": rng.choice(["yes", "no"], 160)})
df["outcome"] = ((df.age > 50) ^ (rng.random(160) < 0.1)).astype(int)
df["hospital"] = rng.choice(["north", "south"], 160)
print("this script runs")

contract = st.Contract.load("small.toml")
plan = st.privacy.plan(contract)
run = st.simulate(contract, data=df, site="hospital", epsilon=8, baselines=[], repeats=1,
                  processes=1)
table = run.table()
assert list(table.index) == ["majority", "federated-lora"], table
assert table.loc["federated-lora", "auc"] == run.metrics["auc"] > 0.5
assert table.loc["federated-lora", ["epsilon", "delta"]].tolist() == [8.0, 1e-4]
assert table.attrs["accountant"] == "exact composition"
run.report("report.html")
assert "<table>" in run._repr_html_()
assert run.adapter.is_file()
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A contract's file: one round, one-hot columns, two sites."""
    from tests.conftest import TABLE_CONTRACT

    file = tmp_path / "small.toml"
    file.write_text(TABLE_CONTRACT.replace("rounds = 3", "rounds = 1"))
    return file


@pytest.fixture
def contract(small: Path) -> st.Contract:
    return st.Contract.load(small)


@pytest.fixture
def rows() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    age = rng.integers(20, 90, 120)
    return pd.DataFrame(
        {
            "age": age,
            "smoker": rng.choice(["yes", "no"], 120),
            "outcome": (age > 50).astype(int),
            "hospital": rng.choice(["north", "south"], 120),
        }
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What simulate has asked `run` for, which computes nothing here; the rows are split."""
    found: list[dict[str, Any]] = []

    def run(recipe: Any, options: Any, folder: Path, command: str, **more: Any) -> Any:
        split = recipe.rows(folder)
        found.append(
            {
                "recipe": recipe,
                "options": options,
                "folder": folder,
                "command": command,
                "counts": {c["site"]: c["train"] + c["test"] for c in split.counts},
                **more,
            }
        )
        return {"contract_json": recipe.contract.model_dump_json()}

    monkeypatch.setattr(module, "run", run)
    return found


def test_a_script_without_a_main_guard(small: Path) -> None:
    (small.parent / "study.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "study.py"],
        cwd=small.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "this script runs\n"  # once, and progress is on standard error
    assert "RESULT" in done.stderr
    folder = small.parent / "runs" / "small"
    assert {path.name for path in folder.iterdir()} >= {
        "result.json",
        "report.html",
        "contract.json",
    }
    report = (small.parent / "report.html").read_text()
    assert report == (folder / "report.html").read_text()
    call = re.search(r"silotune\.simulate\(&#39;small&#39;, [^<]*", report)
    assert call is not None
    assert "epsilon=8" in call[0]
    loaded = st.RunResult.load(folder)
    assert loaded.metrics["auc"] is not None
    assert loaded.contract.privacy.epsilon == 8.0
    with pytest.raises(FrozenInstanceError):
        loaded.folder = folder  # type: ignore[misc]
    with pytest.raises(UsageError, match=r"cannot be written: No such file .* a folder"):
        loaded.report(folder / "none" / "report.html")


def test_a_module_that_is_run_by_name_is_not_run_again(tmp_path: Path) -> None:
    code = """
    from silotune.simulations.execution.pool_context import PoolContext
    print("once", flush=True)
    child = PoolContext().Process(target=int)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert (__spec__.name, __file__ is not None) == ("named", True)
    """
    (tmp_path / "named.py").write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, "-m", "named"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "once\n"), done.stderr


def test_frames_of_sites_and_files_are_the_same_rows(
    contract: st.Contract, rows: pd.DataFrame, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    rows.to_csv(file, index=False)
    parts = dict(iter(rows.groupby("hospital")))
    for number, (data, site) in enumerate(
        [(rows, "hospital"), (file, "hospital"), (str(file), "hospital"), (parts, None)]
    ):
        st.simulate(contract, data, site=site, folder=tmp_path / str(number))
    counts = [call["counts"] for call in asked]
    assert counts[0] == rows["hospital"].value_counts().to_dict()
    assert counts == counts[:1] * 4
    st.simulate(contract, rows, folder=tmp_path / "dealt")
    assert sum(asked[-1]["counts"].values()) == len(rows)


def test_missing_and_whole_numbers_of_a_frame(
    contract: st.Contract, rows: pd.DataFrame, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    """pandas makes whole numbers with gaps to floats, and flags are no text."""
    contract = contract.changed(
        input={"missing": "unknown"},
        task={
            "labels": [{"name": "well", "values": ["FALSE"]}, {"name": "ill", "values": ["TRUE"]}]
        },
    )
    rows["age"] = rows["age"].where(rows.index % 3 > 0)
    rows["outcome"] = rows["outcome"] == 1
    st.simulate(contract, rows, site="hospital", folder=tmp_path / "run")
    assert sum(asked[0]["counts"].values()) == len(rows)


def test_the_settings_are_those_of_the_command(
    contract: st.Contract, rows: pd.DataFrame, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    st.simulate(
        contract,
        rows,
        epsilon=3,
        delta=1e-5,
        baselines=[],
        repeats=2,
        evaluate_every=2,
        processes=1,
        site="hospital",
        encoding="latin-1",
        delimiter=";",
        secure_aggregation=False,
        compute={"micro_batch": 8},
        folder=tmp_path / "run",
        progress=False,
    )
    options = asked[0]["options"]
    assert (options.epsilon, options.delta, options.repeats, options.processes) == (3, 1e-5, 2, 1)
    assert (options.variants, options.masked) == (["federated-lora"], False)
    assert options.performance.micro_batch == 8
    assert (asked[0]["quiet"], asked[0]["stderr"]) == (True, True)
    assert asked[0]["command"] == (
        "silotune.simulate('small', site='hospital', epsilon=3, delta=1e-05, baselines=[], "
        "repeats=2, evaluate_every=2, secure_aggregation=False, encoding='latin-1', "
        "delimiter=';', compute={'micro_batch': 8})"
    )


def test_names_of_baselines() -> None:
    recipe = load_recipe("heart-diagnosis")
    assert _variants(recipe, None) == []
    assert _variants(recipe, ["head", "alone", "pooled", "no-dp", "federated-one-hot"]) == [
        "federated-lora",
        "federated-head",
        "alone",
        "pooled-no-dp",
        "federated-no-dp",
        "federated-one-hot",
    ]
    with pytest.raises(UsageError, match=r"'haed', .* Did you mean 'head'\? Known: alone, alone-t"):
        _variants(recipe, ["haed"])
    with pytest.raises(UsageError, match=r"must be a list, got 'head'\. Write \['head'\]"):
        _variants(recipe, "head")


def test_a_contract_of_ones_own_gets_a_head_and_a_one_hot_baseline(
    lora_contract: st.Contract, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    table = write_rows(tmp_path / "rows.csv", 20)
    recipe = with_baselines(recipe_of(lora_contract, "own", table, None))
    assert _variants(recipe, ["head", "one-hot"]) == [
        "federated-lora",
        "federated-head",
        "federated-one-hot",
    ]
    head = recipe.config.variants["head"]["phases"]
    assert [(p["trains"], p["rounds"], p["budget_share"]) for p in head] == [("head", 1, 1.0)]
    last = lora_contract.model_dump(mode="json")["phases"][-1] | {"budget_share": 1.0}
    both = lora_contract.changed(phases=[last])
    recipe = with_baselines(recipe_of(both, "own", table, None))
    (head,) = recipe.config.variants["head"]["phases"]
    assert (head["trains"], "adapter_lr" in head, head["budget_share"]) == ("head", False, 1.0)
    answers = tiny.contract_of("language", "llama")
    assert "head" not in with_baselines(recipe_of(answers, "own", table, None)).config.variants


WRONG: list[tuple[dict[str, Any], type[SilotuneError], str]] = [
    ({"data": None}, UsageError, r"data is missing: .* data=DataFrame"),
    ({"data": 5}, UsageError, "data is a int, and must be a DataFrame"),
    ({"data": "none.csv"}, UsageError, r"data = 'none\.csv' is no file"),
    ({"site": "hospitl"}, UsageError, r"'hospitl' is no column .* Did you mean 'hospital'"),
    ({"contract": "small.toml"}, UsageError, r"read it with Contract\.load\('small\.toml'\)"),
    ({"contract": "hart-diagnosis", "data": None}, UsageError, "Did you mean 'heart-diagnosis'"),
    ({"contract": 5}, UsageError, "contract is a int, and must be a Contract, a Recipe or"),
    ({"contract": "heart-diagnosis"}, UsageError, r"'data' goes with .* Leave data out"),
    ({"baselines": ["tuned"]}, UsageError, "'tuned', .* Known: alone, no-dp, pooled"),
    (
        {"baselines": ["head"]},
        UsageError,
        "'head', which is the method itself of this contract: leave it out. Known: alone, no-dp",
    ),
    ({"repeats": 0}, UsageError, "'repeats' must be at least 1, got 0"),
    ({"processes": 1.5}, UsageError, "'processes' must be a whole number, got 1.5"),
    ({"epsilon": -1.0}, ContractError, "'privacy.epsilon' must be greater than 0, got -1.0"),
    ({"compute": {"bf": True}}, ContractError, r"Unknown key 'bf' .* Did you mean 'bf16'"),
    ({"delimiter": ",,"}, UsageError, "delimiter"),
    ({"compute": {"device": "mps"}}, ContractError, '"auto", "cpu", "cuda" or "cuda:0"'),
]


@pytest.mark.parametrize(("changed", "error", "said"), WRONG)
def test_wrong_arguments_are_named(
    contract: st.Contract,
    rows: pd.DataFrame,
    tmp_path: Path,
    changed: dict[str, Any],
    error: type[SilotuneError],
    said: str,
) -> None:
    given = {"contract": contract, "data": rows, "folder": tmp_path / "run", "progress": False}
    with pytest.raises(error, match=said):
        st.simulate(**given | changed)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused_before_the_records_are_written(
    contract: st.Contract, rows: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pd.DataFrame, "to_csv", None)
    with pytest.raises(DataError, match=r"^device is 'cuda:1', but torch can use 0 CUDA devices"):
        st.simulate(contract, rows, compute={"device": "cuda:1"})


def test_wrong_tables_by_site(rows: pd.DataFrame) -> None:
    sites = ["north", "south"]
    with pytest.raises(UsageError, match=r"'nort', .* Did you mean 'north'"):
        _joined({"nort": rows, "south": rows}, None, sites)
    with pytest.raises(UsageError, match="data has no table of: south"):
        _joined({"north": rows}, None, sites)
    with pytest.raises(UsageError, match="'site' goes with one table"):
        _joined({"north": rows, "south": rows}, "hospital", sites)
    table, column = _joined({"north": rows.assign(site="x"), "south": rows}, None, sites)
    assert (column, set(table[column])) == ("site_", set(sites))


def test_what_records_say_is_a_note_of_the_error(
    contract: st.Contract, rows: pd.DataFrame, tmp_path: Path
) -> None:
    rows["smoker"] = "perhaps"
    with pytest.raises(DataError) as caught:
        st.simulate(contract, rows, site="hospital", folder=tmp_path / "run", progress=False)
    assert "perhaps" not in str(caught.value)
    (note,) = caught.value.__notes__
    assert "perhaps" in note


def test_a_result_as_a_table() -> None:
    result = st.RunResult(Path("run"), tiny.contract_of("classification", "one-hot"), CONTENT)
    table = result.table()
    assert table.loc["federated-lora", "accuracy"] == pytest.approx(0.7)
    assert table.loc["federated-lora", "accuracy_sd"] == pytest.approx(0.1)
    assert math.isnan(table.loc["federated-no-dp", "accuracy_sd"])  # one run has no spread
    assert table["epsilon"].tolist()[1:] == [8.0, math.inf]
    assert math.isnan(table.loc["majority", "epsilon"])
    assert math.isnan(table.loc["federated-no-dp", "delta"])
    html = result._repr_html_()
    assert "0.700 ±0.100" in html
    assert "Federated &lt;LoRA&gt;" in html
    assert guarantee(CONTENT, 8.0, 1e-4) in html
    assert html.count("<th>") == 5  # method, three metrics, guarantee
    assert result.metrics == {"accuracy": pytest.approx(0.7)}
    seeded = CONTENT | {"privacy": CONTENT["privacy"] | {"insecure": True}}
    table = st.RunResult(Path("run"), result.contract, seeded).table()
    assert math.isinf(table.loc["federated-lora", "epsilon"])


def _content() -> dict[str, Any]:
    contract = tiny.contract_of("classification", "one-hot")
    content = CONTENT | {"format": 1, "contract_json": contract.model_dump_json()}
    made: dict[str, Any] = json.loads(json.dumps(content))
    return made


def test_a_damaged_result_is_a_usage_error(tmp_path: Path) -> None:
    def load(content: Any) -> st.RunResult:
        (tmp_path / "result.json").write_text(json.dumps(content), encoding="utf-8")
        return st.RunResult.load(tmp_path)

    whole = _content()
    assert load(whole).adapter.is_relative_to(tmp_path / "variants")
    assert not load(whole).table().attrs["quick"]
    for damaged in ([], {}, 5, *({k: v for k, v in whole.items() if k != key} for key in whole)):
        with pytest.raises(UsageError, match="no readable result"):
            load(damaged)
    for key, value in (("name", "../../other"), ("name", ".."), ("metrics", 5), ("main", False)):
        variants = [v | {key: value} for v in whole["variants"]]
        with pytest.raises(UsageError, match="no readable result"):
            load(whole | {"variants": variants})
    with pytest.raises(UsageError, match="has format 2, and this Silotune reads format 1"):
        load(whole | {"format": 2})


def test_the_table_that_the_readme_prints_is_not_cut() -> None:
    names = load_recipe("heart-diagnosis").contract.task.metrics
    found = [_variant("federated-no-dp", "Federated", [0.51234, 0.6], None)]
    for variant in found:
        variant["metrics"] = dict.fromkeys([*names, "loss"], variant["metrics"]["accuracy"])
    contract = tiny.contract_of("classification", "one-hot")
    run = st.RunResult(Path("run"), contract, CONTENT | {"variants": found})
    for page in ("README.md", "README.zh-CN.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        (shown,) = re.findall(r"^print\(run\.table\(\)\[(\[.*?\])\]\)", text, re.M)
        lines = str(run.table()[ast.literal_eval(shown)]).splitlines()
        assert "..." not in lines[0]
        assert max(map(len, lines)) <= 80


def _variant(name: str, label: str, values: list[float], epsilon: float | None) -> dict[str, Any]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {
        "name": name,
        "label": label,
        "main": name == "federated-lora",
        "private": name != "federated-no-dp",
        "repeats": len(values),
        "epsilon": epsilon,
        "delta": 1e-4 if epsilon else None,
        "stopped": None,
        "metrics": {"accuracy": {"mean": float(np.mean(values)), "sd": sd, "values": values}},
    }


CONTENT: dict[str, Any] = {
    "metric": {"name": "accuracy", "label": "Accuracy"},
    "variants": [
        _variant("majority", "Always the majority class", [0.5], None),
        _variant("federated-lora", "Federated <LoRA>", [0.6, 0.7, 0.8], 8.0),
        _variant("federated-no-dp", "Without DP", [0.9], None),
    ],
    "verdict": {"word": "learns", "headline": "learns; calibrated", "warnings": []},
    "privacy": {
        "unit": "record",
        "adjacency": "add or remove one record",
        "accountant": "exact composition",
        "insecure": False,
    },
}
