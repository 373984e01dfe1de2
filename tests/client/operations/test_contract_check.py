"""What every site would refuse of a contract is said by `contract validate`, by `site check` and
before a simulation computes anything: the same sentence with the same code as the worker's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from silotune.client.operations.contract_check import problems
from silotune.common.config import types
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.errors import SilotuneError
from silotune.common.models import compatibility
from silotune.common.models.adapted import Adapted
from silotune.common.models.factory import build
from tests import tiny

Ran = tuple[int, str, str]
CPU = Performance(device="cpu", bf16="off")


def masked(contract: Contract, bound: float) -> Contract:
    sites = [{"name": name, "public_key": f"{at:064x}"} for at, name in enumerate("abc", 1)]
    return contract.changed(
        sites=sites, quorum=3, secure_aggregation={"bound": bound}, privacy={"epsilon": 8.0}
    )


def of(**changes: Any) -> Contract:
    return tiny.contract_of("classification", "bert").changed(**changes)


IA3 = {"kind": "ia3", "layers": 2, "targets": ["query"]}
CASES: dict[str, tuple[Callable[[], Contract], Performance, str, str]] = {
    "a target that no layer is called": (
        lambda: of(adapter={"targets": ["value", "qeury"]}),
        CPU,
        "E310",
        "'qeury'",
    ),
    "more layers than there are": (
        lambda: of(adapter={"layers": 9}),
        CPU,
        "E310",
        "adapter.layers",
    ),
    "a rank beyond the layers": (lambda: of(adapter={"rank": 99}), CPU, "E310", "adapter.rank"),
    "texts beyond the positions": (
        lambda: of(model={"max_tokens": 100}),
        CPU,
        "E310",
        "max_tokens",
    ),
    "another model": (lambda: of(model={"sha256": "0" * 64}), CPU, "E305", "another model"),
    "an engine for Linears alone": (
        lambda: tiny.contract_of("classification", "bert", adapter=IA3),
        Performance(device="cpu", gradients="hooks"),
        "E310",
        "performance.gradients",
    ),
    "a device that is not there": (of, Performance(device="cuda:99"), "E309", "performance.device"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_worker_would_refuse_is_found_without_one(case: str) -> None:
    make, performance, code, says = CASES[case]
    contract, folder = make(), tiny.folder_of("bert")
    (found,) = problems(contract, folder, performance)
    assert found.code == code
    assert says in str(found)
    with pytest.raises(SilotuneError) as refused:
        build(contract, folder, performance)
    assert (refused.value.code, str(refused.value)) == (found.code, str(found))


def test_a_bound_that_does_not_fit_the_noise_is_found() -> None:
    for bound, fits in ((1e-5, False), (1e6, False)):
        found = problems(masked(of(), bound), tiny.folder_of("bert"), CPU)
        assert [error.code for error in found] == ["E205"] * (not fits)
        assert "secure_aggregation.bound" in str(found[0])
        low, high = (float(word.strip(".")) for word in str(found[0]).split()[-3::2])
        assert problems(masked(of(), (low * high) ** 0.5), tiny.folder_of("bert"), CPU) == []


def test_all_problems_are_found_at_once() -> None:
    contract = masked(of(adapter={"targets": ["qeury"]}), 1e-5)
    found = problems(contract, tiny.folder_of("bert"), Performance(device="cuda:99"))
    assert sorted(error.code for error in found) == ["E205", "E309", "E310"]


@pytest.mark.parametrize(("task", "model"), tiny.CASES)
def test_what_a_worker_would_carry_out_has_no_problem(task: str, model: str) -> None:
    contract = tiny.contract_of(task, model)
    folder = None if model == "one-hot" else tiny.folder_of(model)
    assert problems(contract, folder, CPU) == []


def test_no_weights_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers stand on torch's meta device: what is found costs no memory of the model's."""
    seen = []
    original = compatibility.adapt

    def noted(contract: Contract, base: Any, performance: Performance) -> Any:
        found = original(contract, base, performance)
        seen.extend(p.device.type for p in base.base.parameters())
        return found

    monkeypatch.setattr(compatibility, "adapt", noted)
    assert problems(of(), tiny.folder_of("bert"), CPU) == []
    assert set(seen) == {"meta"}
    model = build(of(), tiny.folder_of("bert"), CPU)
    assert isinstance(model, Adapted)
    assert {p.device for p in model.backbone.base.parameters()} == {torch.device("cpu")}


def written(contract: Contract, path: Path) -> Path:
    path.write_text(contract.model_dump_json(exclude_none=True))
    assert types.parse(path.read_text(), path.name, Contract) == contract
    return path


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name][1] is CPU])
def test_validate_says_what_the_run_would_refuse(
    case: str, run: Callable[..., Ran], tmp_path: Path
) -> None:
    make, _, code, says = CASES[case]
    file = written(make(), tmp_path / "made-up.json")
    exit_code, out, wrong = run("contract", "validate", file, "--model", tiny.folder_of("bert"))
    assert (exit_code, out) == (1, "")
    assert wrong.startswith(f"✗ {code} ")
    assert says in wrong
    # Without the folder the file alone is looked at, and that is said.
    exit_code, out, wrong = run("contract", "validate", file)
    assert (exit_code, wrong) == (0, "")
    assert "not checked: [model] and [adapter], for 'tiny' is not here" in out


def test_validate_says_all_problems(run: Callable[..., Ran], tmp_path: Path) -> None:
    contract = masked(of(adapter={"targets": ["qeury"]}), 1e-5)
    file = written(contract, tmp_path / "made-up.json")
    code, _, wrong = run("contract", "validate", file, "--model", tiny.folder_of("bert"))
    assert code == 1
    assert "secure_aggregation.bound" in wrong
    assert "'qeury'" in wrong
