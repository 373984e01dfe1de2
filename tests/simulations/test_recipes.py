"""The shipped recipes, their arms, and the settings of `sim run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from silotune.client.accounting import epsilon, plan
from silotune.common.errors import UsageError
from silotune.simulations.arms import arms_of
from silotune.simulations.run import Options, _set_aside, load_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", recipe_names())
def test_every_arm_of_a_recipe_is_a_contract_within_its_budget(name: str) -> None:
    recipe = load_recipe(name)
    arms = arms_of(recipe.contract, recipe.facts["arms"])
    assert arms[0].main
    names = {arm.name for arm in arms}
    assert {"alone", "alone-tuned", "federated-head", "federated-no-dp", "pooled-no-dp"} <= names
    for arm in arms:
        for contract in arm.contracts:
            assert (contract.privacy.mode == "dp") == arm.private
            if arm.private:
                assert contract.privacy.epsilon == recipe.contract.privacy.epsilon
                assert contract.privacy.delta == recipe.contract.privacy.delta
                spent = epsilon(plan(contract), contract.privacy.delta)
                assert spent <= contract.privacy.epsilon


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("epsilon=abc",), "'epsilon' must be a number, got 'abc'"),
        (("repeats=1.5",), "'repeats' must be a whole number, got '1.5'"),
        (("repeats=0",), "'repeats' must be at least 1"),
        (("epsilonn=3",), "Did you mean 'epsilon'"),
        (("epsilon",), "key=value"),
    ],
)
def test_a_wrong_setting_is_one_sentence(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError) as error:
        Options.parse(words)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(UsageError, match="Did you mean 'heart-diagnosis'"):
        load_recipe("heart-diagnose")


def silotune(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / "silotune"), *args], capture_output=True, text=True,
        env=os.environ | env, check=False, timeout=300,
    )


@pytest.mark.parametrize(
    "setting", ["epsilon=nan", "epsilon=-1", "delta=0", "arms=nobody", "epsilon=1e9"]
)
def test_a_setting_out_of_bounds_is_a_usage_error(setting: str, tmp_path: Path) -> None:
    done = silotune("sim", "run", "heart-diagnosis", setting, "--out", str(tmp_path / "run"))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert setting.split("=", maxsplit=1)[0].rstrip("s") in done.stderr
    assert not (tmp_path / "run").exists()


def test_without_the_data_and_without_a_network(tmp_path: Path) -> None:
    done = silotune(
        "sim", "run", "heart-diagnosis", "--out", str(tmp_path / "run"),
        SILOTUNE_HOME=str(tmp_path / "empty"), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path),
    )
    assert done.returncode == 1
    assert done.stderr.startswith("✗ E306")
    assert "Traceback" not in done.stderr


def test_an_older_run_is_set_aside_not_lost(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "result.json").write_text("{}")
    _set_aside(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
    assert len(list(tmp_path.glob("demo-*/result.json"))) == 1


@pytest.mark.download
@pytest.mark.xdist_group("system")
def test_nothing_outlives_a_killed_run(encoder_folder: Path, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "silotune"), "sim", "run", "heart-diagnosis", "repeats=1",
        "arms=federated-one-hot", "--out", str(tmp_path / "run"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("  1/30"):
                break
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
    finally:
        process.kill()
        process.wait(timeout=10)
        assert process.stdout is not None
        process.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.download
@pytest.mark.xdist_group("system")
def test_make_demo_ends_in_a_verdict_a_result_and_a_report(
    encoder_folder: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        ["make", "demo", f"OUT={tmp_path / 'demo'}",
         "SETTINGS=repeats=1 cheap_repeats=1 arms=federated-head,federated-one-hot"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "demo" / "result.json").read_text())
    main = next(arm for arm in result["arms"] if arm["main"])
    assert main["metrics"]["auc"]["mean"] >= 0.88
    assert len(result["curve"]) == 30
    assert "30/30" in done.stdout
    assert f"RESULT  {result['verdict']['word']}" in done.stdout
    for site in result["privacy"]["sites"]:
        assert 7.9 < site["epsilon"] <= 8.0
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("<svg") >= 3
    # The headline stands in the terminal, the JSON and the page alike.
    headline = f"{main['metrics']['auc']['mean']:.3f}"
    assert headline in done.stdout
    assert headline in page
