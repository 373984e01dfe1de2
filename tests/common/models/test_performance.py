"""How a machine computes: settings that do not go together are told, and none changes an update."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from silotune.client.privacy.accountant import Mechanism
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site import policy as policies
from silotune.client.site.policy import permissive_policy
from silotune.client.training import dataset, dp_optimizer
from silotune.client.training.local_round import train_round
from silotune.client.training.noise import NoiseSource
from silotune.client.worker.worker import Worker
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.data.records import Table, table
from silotune.common.errors import ContractError, DataError
from silotune.common.models.base import Network, device_of
from silotune.common.models.factory import build
from silotune.common.protocol.messages import Arrays
from silotune.simulations.comparison.options import Options, computing

Rows = Callable[..., Path]
CUDA = torch.cuda.is_available()
SITE = """
name = "north"
[data]
file = "rows.csv"
[budgets.record]
epsilon = 8.0
delta = 1e-4
[permits]
contracts = ["{hash}"]
[performance]
{settings}
"""


class Silent(NoiseSource):
    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return np.zeros(shape)


def loaded(folder: Path, settings: str, contract: str = "a" * 64) -> policies.Policy:
    text = SITE.replace("{settings}", settings).replace("{hash}", contract)
    (folder / "site.toml").write_text(text)
    return policies.load(folder / "site.toml")


# What a site may write


def test_what_is_not_said_is_the_default(tmp_path: Path) -> None:
    found = loaded(tmp_path, "").performance
    assert found == Performance(cache_folder=tmp_path / "state")
    found = loaded(tmp_path, 'cache_folder = "cache"\nmicro_batch = 4').performance
    assert found.cache_folder == tmp_path / "cache"
    assert found.micro_batch == 4
    found = loaded(tmp_path, 'cache_folder = "/scratch"').performance
    assert found.cache_folder == Path("/scratch")


@pytest.mark.parametrize("engine", ["hooks", "ghost"])
@pytest.mark.parametrize("other", ['bf16 = "on"', "checkpointing = true"])
def test_settings_that_do_not_go_together_are_told_in_one_sentence(
    tmp_path: Path, engine: str, other: str
) -> None:
    """With the file, the line of the table, both keys and the value."""
    with pytest.raises(ContractError) as error:
        loaded(tmp_path, f'gradients = "{engine}"\n{other}')
    assert error.value.code == "E103"
    (problem,) = error.value.problems
    assert f'gradients = "{engine}"' in problem
    assert problem.startswith(f"{other} does not go with")
    assert problem.endswith("/site.toml:12).")
    assert len(problem.splitlines()) == 1


@pytest.mark.parametrize("engine", ["hooks", "ghost"])
@pytest.mark.parametrize(
    "other",
    [
        'bf16 = "auto"',
        'bf16 = "off"',
        "checkpointing = false",
        "compile = false",
        "micro_batch = 1",
    ],
)
def test_settings_that_do_go_together_are_read(tmp_path: Path, engine: str, other: str) -> None:
    assert loaded(tmp_path, f'gradients = "{engine}"\n{other}').performance.gradients == engine


def test_compiled_layers_are_refused_wherever_they_can_be_asked_for(tmp_path: Path) -> None:
    """torch.compile compiles the first widths only; later ones have other bits."""
    sentence = "compile = true is refused: .* leave the key out"
    with pytest.raises(ContractError, match=sentence) as error:
        loaded(tmp_path, "compile = true")
    assert "site.toml:" in str(error.value)
    for ask in (Options.parse, computing):
        with pytest.raises(ContractError, match=sentence):
            ask(("compile=true",))
    with pytest.raises(ValueError, match=sentence):
        Performance(compile=True)
    assert loaded(tmp_path, "compile = false").performance == loaded(tmp_path, "").performance


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('bf16 = "yes"', "performance.bf16"),
        ("bf16 = true", "performance.bf16"),
        ('gradients = "fast"', "performance.gradients"),
        ("checkpointing = 1", "performance.checkpoi"),
        ('compile = "on"', "performance.compile"),
        ("micro_batch = 0", "performance.micro_batch"),
        ("micro_batch = 1025", "performance.micro_batch"),
        ("micro_batch = 1.5", "performance.micro_b"),
        ("cache_megabytes = 0", "performance.cache_megabytes"),
        ("cache_megabytes = -1", "performance.cache_megabytes"),
        ("cache_folder = 5", "performance.cache_folder"),
        ('device = "gpu"', "performance.device"),
        ('device = "cuda:"', "performance.device"),
        ('device = "cuda:100"', "performance.device"),
        ('device = "mps"', "performance.device"),
        ('device = "cpu\\n"', "performance.device"),
        ("epsilon = 100.0", "Unknown key 'performance.epsilon'"),
        ("microbatch = 4", "Did you mean 'micro_batch'"),
    ],
)
def test_each_problem_is_one_sentence_with_file_line_key_and_value(
    tmp_path: Path, line: str, told: str
) -> None:
    with pytest.raises(ContractError) as error:
        loaded(tmp_path, line)
    (problem,) = error.value.problems
    assert told in problem
    assert "/site.toml:11)" in problem
    assert len(problem.splitlines()) == 1
    value = line.split(" = ")[1]
    assert "Unknown key" in problem or f"got {value}" in problem


def test_what_a_device_may_be_is_said(tmp_path: Path) -> None:
    """ "gpu" is a plain name of letters; the sentence must not ask for one."""
    with pytest.raises(ContractError) as error:
        loaded(tmp_path, 'device = "gpu"')
    assert "plain name" not in str(error.value)
    for allowed in ('"auto"', '"cpu"', '"cuda"', '"cuda:0"'):
        assert allowed in str(error.value)


def test_what_a_folder_may_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(ContractError) as error:
        loaded(tmp_path, "cache_folder = 5")
    assert "<class" not in str(error.value)


# Devices


@pytest.mark.skipif(CUDA, reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_device_that_is_not_there_is_told(
    table_contract: Contract, tmp_path: Path, write_rows: Rows, device: str
) -> None:
    with pytest.raises(DataError) as error:
        device_of(Performance(device=device))
    assert error.value.code == "E309"
    assert str(error.value) == (
        f"performance.device is '{device}', but torch can use 0 CUDA devices on this machine. "
        'Set "auto" or "cpu".'
    )
    # It comes before anything is charged, and no model is kept that would be found next time.
    write_rows(tmp_path / "rows.csv", 120)
    policy = permissive_policy(
        table_contract, "north", tmp_path / "rows.csv", None, Performance(device=device)
    )
    ledger = PrivacyLedger.in_memory("north")
    for _ in range(2):
        with pytest.raises(DataError) as again:
            Worker(policy, table_contract, ledger)
        assert again.value.code == "E309"
    assert not ledger.charges


@pytest.mark.skipif(CUDA, reason="this machine has a CUDA device")
def test_auto_is_the_processor_without_a_device() -> None:
    assert device_of(Performance()) == device_of(Performance(device="cpu")) == torch.device("cpu")


# The same update, however it is computed

EXACT = {"bf16": "off", "device": "cpu"}  # what the others are held against
# What each setting may change, in clip norms over the whole update; float32 rounds at 2^-24, and a
# block of other rows or another engine adds up in another order. bf16 has 8 bits of mantissa: each
# product is off by up to 2^-9 of itself (0.003 to 0.014 of a clip norm was seen).
TOLERANCES: list[tuple[dict[str, Any], float]] = [
    (EXACT, 0.0),
    (EXACT | {"micro_batch": 1}, 1e-4),
    (EXACT | {"micro_batch": 7}, 1e-4),
    (EXACT | {"micro_batch": 64}, 1e-4),
    (EXACT | {"checkpointing": True}, 1e-5),
    (EXACT | {"checkpointing": True, "micro_batch": 5}, 1e-4),
    ({"gradients": "hooks"}, 1e-4),
    ({"gradients": "hooks", "micro_batch": 5}, 1e-4),
    # It clips to 0.1% less than the clip norm (client/training/dp_optimizer.py, GHOST_SLACK); the
    # whole is 2 to 7.
    ({"gradients": "ghost"}, 1e-2),
    ({"bf16": "on"}, 0.05),
    ({"bf16": "on", "checkpointing": True}, 0.05),
    ({"bf16": "auto"}, 0.05),
    (EXACT | {"cache_megabytes": 1}, 0.0),
    pytest.param(
        EXACT | {"device": "cuda"},
        1e-3,
        marks=pytest.mark.skipif(  # type: ignore[list-item]
            not CUDA, reason="no CUDA device"
        ),
    ),
    pytest.param(
        {"device": "cuda", "bf16": "on"},
        0.05,
        marks=pytest.mark.skipif(  # type: ignore[list-item]
            not CUDA, reason="no CUDA device"
        ),
    ),
]
CLIP = 0.2


def adapter_of(model: Network) -> Arrays:
    rng = np.random.default_rng(0)
    return {
        n: a if n.endswith("lora_A") else rng.normal(0, 0.05, a.shape).astype(np.float32)
        for n, a in model.initial_arrays().items()
    }


def update(
    contract: Contract,
    rows: Table,
    settings: dict[str, Any],
    folder: Path | None,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Arrays]:
    """For each phase the noiseless sum of clipped gradients over the clip norm."""
    monkeypatch.setattr(dp_optimizer, "NOISE_ROUNDING_LOG2", -40)
    model = build(contract, folder, Performance.model_validate(settings))
    data = dataset.load(rows, contract, model)
    found: dict[str, Arrays] = {}
    for plan in contract.kinds_of_round():
        phase = plan.phase
        if plan.round_in_phase > 1:
            continue
        change, _ = train_round(
            contract,
            plan,
            Mechanism(1e-3, 1.0, 1),
            model,
            data,
            adapter_of(model),
            Silent(site="x"),
            CLIP,
        )
        assert phase.adapter_lr in (None, phase.head_lr)
        scale = np.float32(contract.privacy.expected_units / phase.head_lr / CLIP)
        found[phase.trains] = {n: a * scale for n, a in change.items()}
    return found


def rates(contract: Contract) -> Contract:
    """With rates that make a step as large as the sum: float32 must not round it away."""
    phases = [
        p
        | {"head_lr": 50.0, "sampling_rate": 1.0}
        | ({"adapter_lr": 50.0} if p["adapter_lr"] else {})
        for p in contract.model_dump()["phases"]
    ]
    return contract.changed(phases=phases)


def distance(a: Arrays, b: Arrays) -> float:
    assert a.keys() == b.keys()
    return float(np.sqrt(sum(np.sum((a[n].astype(float) - b[n]) ** 2) for n in a)))


@pytest.mark.parametrize(("settings", "tolerance"), TOLERANCES)
def test_no_setting_changes_the_update_of_a_table(
    table_contract: Contract,
    write_rows: Rows,
    tmp_path: Path,
    settings: dict[str, Any],
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contract = rates(table_contract)
    rows = table(write_rows(tmp_path / "rows.csv", 30))
    (plain,) = update(contract, rows, EXACT, None, monkeypatch).values()
    (found,) = update(contract, rows, settings, None, monkeypatch).values()
    assert distance(plain, found) <= tolerance
    size = distance(plain, {n: np.zeros_like(a) for n, a in plain.items()})
    assert size > 3  # the tolerance is small beside what is compared


TEXTS = [" ".join(["pain in the chest"] * (1 + k % 6)) + f" since day {k}" for k in range(23)]


@pytest.mark.download
@pytest.mark.parametrize(("settings", "tolerance"), TOLERANCES)
def test_no_setting_changes_the_update_of_an_encoder(
    lora_contract: Contract,
    encoder_folder: Path,
    settings: dict[str, Any],
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Head alone and LoRA, on texts of two buckets."""
    contract = rates(
        Contract.model_validate(
            lora_contract.model_dump(mode="json") | {"input": {"kind": "text", "column": "note"}}
        )
    )
    rows = Table(
        "notes.csv",
        ["note", "outcome"],
        [(line, [text, str(line % 2)]) for line, text in enumerate(TEXTS, 2)],
    )
    plain = update(contract, rows, EXACT, encoder_folder, monkeypatch)
    found = update(contract, rows, settings, encoder_folder, monkeypatch)
    assert list(plain) == ["head", "head+adapter"]
    for trains, reference in plain.items():
        assert distance(reference, found[trains]) <= tolerance
        size = distance(reference, {n: np.zeros_like(a) for n, a in reference.items()})
        assert size > 10 * tolerance
    parts = plain["head+adapter"]
    assert all(np.abs(a).max() > 1e-3 for a in parts.values())


@pytest.mark.download
def test_bf16_does_change_something(
    lora_contract: Contract,
    encoder_folder: Path,
    write_rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or the comparison above would hold for a setting that does nothing."""
    rows = table(write_rows(tmp_path / "rows.csv", 12))
    contract = rates(lora_contract)
    plain, found = (
        update(contract, rows, {"bf16": bf16}, encoder_folder, monkeypatch)["head+adapter"]
        for bf16 in ("off", "on")
    )
    assert distance(plain, found) > 1e-4
    model = build(contract, encoder_folder, Performance(bf16="on"))
    assert model.bf16
    assert not build(contract, encoder_folder, Performance(gradients="hooks")).bf16


@pytest.mark.download
def test_the_default_settings_pass_the_bounds_of_the_self_test(
    lora_contract: Contract, encoder_folder: Path, write_rows: Rows, tmp_path: Path
) -> None:
    """Every engine starts a worker: each passes the check that is made before a site trains."""
    path = write_rows(tmp_path / "rows.csv", 20)
    for settings in ({}, {"gradients": "hooks"}, {"gradients": "ghost"}, {"checkpointing": True}):
        policy = permissive_policy(
            lora_contract, "north", path, encoder_folder, Performance.model_validate(settings)
        )
        assert not Worker(policy, lora_contract, PrivacyLedger.in_memory("north")).ledger.charges


# What is agreed and what is a machine's own


def test_settings_are_no_part_of_a_contract(
    table_contract: Contract, tmp_path: Path, write_rows: Rows
) -> None:
    path = write_rows(tmp_path / "rows.csv", 30)
    before = table_contract.hash
    for settings, _ in TOLERANCES[:9]:
        policy = permissive_policy(
            table_contract, "north", path, None, Performance.model_validate(settings)
        )
        worker = Worker(policy, table_contract, PrivacyLedger.in_memory("north"))
        assert worker.contract.hash == before
        assert worker.model.performance == policy.performance
    assert not {"performance", "micro_batch", "device"} & set(
        re.findall(r'"(\w+)":', table_contract.model_dump_json())
    )
    with pytest.raises(ContractError, match="Unknown key 'performance'"):
        table_contract.changed(performance={"device": "cpu"})


def test_models_of_different_settings_are_not_shared(table_contract: Contract) -> None:
    one, same, other = (
        build(table_contract, None, Performance(micro_batch=size)) for size in (3, 3, 4)
    )
    assert one is same
    assert one is not other


def test_ghost_clipping_needs_the_owners_leave(table_contract: Contract, tmp_path: Path) -> None:
    policy = loaded(tmp_path, 'gradients = "ghost"', table_contract.hash)
    (refusal,) = policy.refusals(table_contract)
    assert refusal.code == "E205"
    assert str(refusal) == (
        "The contract 'small': performance.gradients = \"ghost\" does not clip exactly, which "
        "permits.allow_inexact_clipping does not allow."
    )
    for allowed, expected in (("true", []), ("false", ["E205"])):
        text = (
            (tmp_path / "site.toml")
            .read_text()
            .replace("[permits]", f"[permits]\nallow_inexact_clipping = {allowed}")
        )
        (tmp_path / "other.toml").write_text(text)
        found = policies.load(tmp_path / "other.toml").refusals(table_contract)
        assert [refusal.code for refusal in found] == expected
    for engine in ("hooks", "expanded"):
        found = loaded(tmp_path, f'gradients = "{engine}"', table_contract.hash).refusals(
            table_contract
        )
        assert found == []
    for value in ('"yes"', "1"):
        (tmp_path / "other.toml").write_text(
            text.replace("allow_inexact_clipping = false", f"allow_inexact_clipping = {value}")
        )
        with pytest.raises(ContractError, match="allow_inexact_clipping"):
            policies.load(tmp_path / "other.toml")
