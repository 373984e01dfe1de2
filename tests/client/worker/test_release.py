"""The one way out: nothing leaves but what was charged, by name, shape, type and size."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.ledger_entries import Charged
from silotune.client.worker import release
from silotune.common.contract.contract import Contract
from silotune.common.contract.privacy import Metric
from silotune.common.errors import (
    CODES,
    DataError,
    PeerError,
    ProtocolError,
    RefusalError,
    SilotuneError,
)
from silotune.common.protocol import messages
from silotune.common.protocol.messages import (
    Arrays,
    Description,
    Endorsement,
    Keys,
    Masked,
    Refusal,
    Revealed,
    Shares,
    Update,
)

SHAPES: dict[str, tuple[int, ...]] = {
    "head.weight": (2, 6),
    "head.bias": (2,),
    "layer.lora_A": (2, 4),
    "layer.lora_B": (4, 2),
}
SECRET = "Jane Doe 1961"


def change() -> Arrays:
    return {"head.weight": np.full((2, 6), 0.25, np.float32), "head.bias": np.zeros(2, np.float32)}


def charged(contract: Contract, /, **facts: Any) -> Charged:
    return Charged(
        **{
            "sequence": 3,
            "previous": "0" * 64,
            "at": 0.0,
            "record_set": "1" * 64,
            "basis": "basis",
            "source": "rows.csv",
            "rows": 80,
            "unit": "record",
            "contract": contract.hash,
            "run": "r",
            "round": 2,
            "attempt": 4,
            "request": "2" * 64,
            "noise_multiplier": 1.0,
            "sampling_rate": 0.5,
            "steps": 1,
            "order": 3.0,
            **facts,
        }
    )


@pytest.fixture
def contract(table_contract: Contract) -> Contract:
    return table_contract.changed(releases=[{"metric": "loss", "share": 0.1}])


def update(contract: Contract, charge: Charged | None = None, **given: Any) -> bytes:
    values: dict[str, Any] = {
        "change": change(),
        "metrics": {"loss": 0.5},
        "epsilon": 1.0,
        "shapes": SHAPES,
        "receipt": PrivacyLedger.in_memory("north").receipt(),
        "sign": lambda _: bytes(64),
        **given,
    }
    return release.update(contract, "north", charge or charged(contract), **values)


def refused(
    contract: Contract, charge: Charged | None = None, *, code: str = "E502", **given: Any
) -> str:
    """The refusal's sentence; it has this code."""
    with pytest.raises(ProtocolError) as error:
        update(contract, charge, **given)
    assert error.value.code == code
    return str(error.value)


def test_what_was_charged_leaves_as_it_is(contract: Contract) -> None:
    message = messages.unpack(update(contract))
    header = message.header
    assert isinstance(header, Update)
    assert (header.site, header.run, header.round, header.attempt) == ("north", "r", 2, 4)
    assert (header.epsilon, header.metrics) == (1.0, {"loss": 0.5})
    assert set(header.model_dump()) == {
        "contract",
        "kind",
        "site",
        "run",
        "round",
        "attempt",
        "epsilon",
        "metrics",
        "receipt",
        "request",
        "signature",
    }
    assert {name: a.tolist() for name, a in message.arrays.items()} == {
        name: a.tolist() for name, a in change().items()
    }


@pytest.mark.parametrize("facts", [{"contract": "f" * 64}, {"noise_multiplier": 0.0}])
def test_another_contracts_charge_pays_for_nothing(
    contract: Contract, facts: dict[str, Any]
) -> None:
    assert "not what was charged" in refused(contract, charged(contract, **facts))


def test_a_reply_without_privacy_is_not_paid_by_a_private_charge(contract: Contract) -> None:
    without = contract.changed(privacy={"mode": "none", "epsilon": 0.5})
    free = charged(without, noise_multiplier=0.0)
    assert isinstance(messages.unpack(update(without, free, epsilon=None)).header, Update)
    assert "not what was charged" in refused(without, charged(without), epsilon=None)
    assert "outside the contract" in refused(without, free, epsilon=0.0)


@pytest.mark.parametrize("epsilon", [None, 8.0001, 1e9, np.inf])
def test_an_epsilon_outside_the_contract_does_not_leave(
    contract: Contract, epsilon: float | None
) -> None:
    assert "outside the contract" in refused(contract, epsilon=epsilon)


@pytest.mark.parametrize("epsilon", [np.nan, -1.0, -np.inf])
def test_an_epsilon_that_is_none_does_not_leave(contract: Contract, epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        update(contract, epsilon=epsilon)


def test_the_whole_of_the_contracts_epsilon_may_leave(contract: Contract) -> None:
    assert update(contract, epsilon=8.0)


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"loss": 0.5, "accuracy": 0.5},
        {"accuracy": 0.5},
        {"records": 80.0},
        {"loss": 0.5, "count": 1.0},
    ],
)
def test_other_metrics_than_the_contracts_do_not_leave(
    contract: Contract, metrics: dict[str, float]
) -> None:
    assert "not the contract's" in refused(contract, metrics=metrics)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6 + 0.5, -1.1e6, 1e300])
def test_a_metric_that_is_not_finite_or_too_large_does_not_leave(
    contract: Contract, value: float
) -> None:
    sentence = refused(contract, metrics={"loss": value})
    assert "not finite or too large" in sentence
    assert str(value) not in sentence


def test_the_largest_metric_and_the_max_update_norm_may_leave(contract: Contract) -> None:
    largest = {**change(), "head.weight": np.zeros((2, 6), np.float32)}
    largest["head.weight"][0, 0] = 1e6
    assert update(contract, change=largest, metrics={"loss": -1e6})


TAMPERED: dict[str, Callable[[Arrays], Arrays]] = {
    "nothing": lambda a: {},
    "a tensor less": lambda a: {"head.bias": a["head.bias"]},
    "a tensor more": lambda a: {**a, "records": np.ones((80, 2), np.float32)},
    "frozen tensors": lambda a: {**a, "layer.lora_A": np.ones((2, 4), np.float32)},
    "another phase's": lambda a: {**a, "layer.lora_B": np.ones((4, 2), np.float32)},
    "another name": lambda a: {"head.weight": a["head.weight"], SECRET: a["head.bias"]},
    "a row more": lambda a: {**a, "head.weight": np.ones((3, 6), np.float32)},
    "transposed": lambda a: {**a, "head.weight": a["head.weight"].T},
    "an axis more": lambda a: {**a, "head.bias": a["head.bias"][None]},
    "no axis": lambda a: {**a, "head.bias": np.ones((), np.float32)},
    "float64": lambda a: {**a, "head.bias": a["head.bias"].astype(np.float64)},
    "integers": lambda a: {**a, "head.bias": a["head.bias"].astype(np.int32)},
    "text": lambda a: {**a, "head.bias": np.array(["Jane", "Doe"])},
    "NaN": lambda a: {**a, "head.bias": np.array([0, np.nan], np.float32)},
    "inf": lambda a: {**a, "head.bias": np.array([0, -np.inf], np.float32)},
    "huge": lambda a: {**a, "head.bias": np.array([0, 1.1e6], np.float32)},
    "long in norm": lambda a: {**a, "head.weight": np.full((2, 6), 9e5, np.float32)},
}
OUT_OF_RANGE = {"NaN", "inf", "huge", "long in norm"}


@pytest.mark.parametrize("how", TAMPERED)
def test_other_tensors_than_the_trained_ones_do_not_leave(contract: Contract, how: str) -> None:
    code = "E508" if how in OUT_OF_RANGE else "E502"
    assert SECRET not in refused(contract, code=code, change=TAMPERED[how](change()))


def test_a_phase_with_adapter_lets_out_its_tensors_and_no_others(lora_contract: Contract) -> None:
    trained = {**change(), "layer.lora_B": np.ones((4, 2), np.float32)}
    for number, allowed, other in ((1, change(), trained), (2, trained, change())):
        charge = charged(lora_contract, round=number)
        assert update(lora_contract, charge, change=allowed, metrics={})
        refused(lora_contract, charge, change=other, metrics={})


def test_a_charge_for_a_round_outside_the_plan_lets_nothing_out(contract: Contract) -> None:
    with pytest.raises(ValueError, match="not in the plan"):
        update(contract, charged(contract, round=4))


def test_a_description_is_a_name(contract: Contract) -> None:
    message = messages.unpack(release.description(contract, "north", "0" * 64, lambda s: s[:64]))
    signed = Description.statement(contract.hash, "north", "0" * 64)[:64].hex()
    assert message.header == Description(contract=contract.hash, site="north", signature=signed)
    assert not message.arrays


# Refusals


def told(error: Exception) -> Exception:
    """The error with the secret in its cause, its context and its notes."""
    error.add_note(f"note: {SECRET}")
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as inner:
            raise error from inner
    except type(error) as raised:
        return raised


ERRORS: dict[str, tuple[Exception, str]] = {
    "plain": (ValueError(SECRET), "E500"),
    "arguments": (OSError(5, SECRET, f"/data/{SECRET}"), "E500"),
    "group": (ExceptionGroup(SECRET, [ValueError(SECRET)]), "E500"),
    "refusal": (RefusalError(SECRET, code="E210"), "E210"),
    "data": (DataError(SECRET, code="E302", local=SECRET), "E302"),
    "peer": (PeerError(SECRET), "E401"),
    "unknown code": (SilotuneError(SECRET, code="E999"), "E500"),
    "a secret as code": (RefusalError("no", code=SECRET), "E500"),
    "an empty code": (RefusalError(SECRET, code=""), "E202"),
}


@pytest.mark.parametrize("how", ERRORS)
def test_a_refusal_carries_a_code_and_no_text(
    contract: Contract, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    error, code = ERRORS[how]
    with caplog.at_level(logging.ERROR):
        wire = release.refusal(contract, "north", told(error))
    for secret in (SECRET, "Jane", "1961", type(error).__name__, "Traceback"):
        assert secret.encode() not in wire
    message = messages.unpack(wire)
    header = message.header
    assert isinstance(header, Refusal)
    assert header.code == code
    assert code in CODES
    assert not message.arrays
    assert header.incident in caplog.text
    assert set(header.model_dump()) == {"contract", "kind", "site", "code", "incident"}


def test_an_attribute_that_looks_like_a_code_is_none(contract: Contract) -> None:
    error = ValueError("x")
    error.code = "E210"  # type: ignore[attr-defined]
    header = messages.unpack(release.refusal(contract, "north", error)).header
    assert isinstance(header, Refusal)
    assert header.code == "E500"


def test_two_refusals_have_nothing_in_common_but_the_code(contract: Contract) -> None:
    error = RefusalError(SECRET, code="E210")
    found = [messages.unpack(release.refusal(contract, "north", error)).header for _ in range(2)]
    one, other = (header for header in found if isinstance(header, Refusal))
    assert one.incident != other.incident
    assert one.model_copy(update={"incident": other.incident}) == other


def test_refusals_of_one_code_have_one_length(contract: Contract) -> None:
    sizes = {
        len(release.refusal(contract, "north", RefusalError("x" * n, code="E210")))
        for n in (0, 1, 1000)
    }
    assert len(sizes) == 1


def test_what_only_the_owner_may_see_is_not_logged(
    contract: Contract, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        release.refusal(contract, "north", DataError("A row is wrong.", local=SECRET))
    assert "A row is wrong." in caplog.text
    assert SECRET not in caplog.text


# Masks


def masking(contract: Contract) -> Contract:
    return contract.changed(
        sites=[
            {"name": name, "public_key": str(place) * 64}
            for place, name in enumerate(("north", "south", "east"))
        ],
        quorum=3,
        secure_aggregation={"threshold": 3, "bound": 4.0},
    )


def packed(entries: int) -> Callable[[Arrays, dict[Metric, float]], bytes]:
    """A mask that gives so many entries, whatever it is asked to mask."""
    return lambda change, metrics: bytes(3 * entries)


ENTRIES = 2 * 6 + 2 + 1  # head.weight, head.bias, one metric


def test_no_update_leaves_unmasked_under_a_contract_with_masks(contract: Contract) -> None:
    assert "otherwise about masks" in refused(masking(contract))
    assert "otherwise about masks" in refused(masking(contract), mask=None, agreement="0" * 64)


def test_no_update_leaves_masked_under_a_contract_without_masks(contract: Contract) -> None:
    def called(*_: object) -> bytes:
        raise AssertionError("it was masked")

    assert "otherwise about masks" in refused(contract, mask=called, agreement="0" * 64)


def test_a_masked_update_is_one_blob_of_three_bytes_an_entry_and_no_array(
    contract: Contract,
) -> None:
    contract = masking(contract)
    seen: list[Arrays] = []

    def mask(found: Arrays, metrics: dict[Metric, float]) -> bytes:
        seen.append(found)
        assert metrics == {"loss": 0.5}
        return bytes(range(3 * ENTRIES))

    message = messages.unpack(update(contract, mask=mask, agreement="a" * 64))
    header = message.header
    assert isinstance(header, Masked)
    assert header.agreement == "a" * 64
    assert (message.arrays, message.blobs) == ({}, {"masked": bytes(range(3 * ENTRIES))})
    assert "metrics" not in header.model_dump()
    assert {name: a.tolist() for name, a in seen[0].items()} == {
        name: a.tolist() for name, a in change().items()
    }
    for entries in (0, ENTRIES - 1, ENTRIES + 1):
        assert "another length" in refused(contract, mask=packed(entries), agreement="a" * 64)


@pytest.mark.parametrize("how", sorted(set(TAMPERED) - OUT_OF_RANGE))
def test_other_tensors_than_the_trained_ones_do_not_leave_masked(
    contract: Contract, how: str
) -> None:
    contract = masking(contract)
    with pytest.raises((ProtocolError, TypeError)):
        update(contract, change=TAMPERED[how](change()), mask=packed(ENTRIES), agreement="a" * 64)


@pytest.mark.parametrize(
    ("value", "held"),
    [
        (np.nan, 0.0),
        (np.inf, 4.0),
        (-np.inf, -4.0),
        (4.0, 4.0),
        (4.001, 4.0),
        (-1e30, -4.0),
    ],
)
def test_what_is_masked_is_held_to_the_bound_and_the_number_of_entries_is_logged(
    contract: Contract, value: float, held: float, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Arrays] = []

    def mask(found: Arrays, _: dict[Metric, float]) -> bytes:
        seen.append(found)
        return bytes(3 * ENTRIES)

    spoilt = {**change(), "head.bias": np.array([1.0, value], np.float32)}
    with caplog.at_level(logging.WARNING):
        assert update(masking(contract), change=spoilt, mask=mask, agreement="a" * 64)
    assert seen[0]["head.bias"].tolist() == [1.0, held]
    assert ("1 entries of the update were beyond" in caplog.text) == (value != held)
    assert ("were beyond" in caplog.text) == (value != held)


STEPS: list[type[Any]] = [Keys, Shares, Endorsement, Revealed]


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_of_secure_aggregation_leaves_for_sites_of_the_roster_only(
    contract: Contract, kind: type[Any]
) -> None:
    contract = masking(contract)
    for blobs in ({}, {"north": b"n"}, {"north": b"n", "south": b"s", "east": b"e"}):
        message = messages.unpack(release.step(contract, "north", kind, blobs))
        assert (message.header, message.blobs) == (
            kind(contract=contract.hash, site="north"),
            blobs,
        )
        assert not message.arrays
    for blobs in ({SECRET: b"x"}, {"north": b"n", "west": b"w"}):
        with pytest.raises(ProtocolError, match="not one of secure aggregation") as caught:
            release.step(contract, "north", kind, blobs)
        assert caught.value.code == "E502"


@pytest.mark.parametrize("kind", STEPS)
def test_no_step_of_secure_aggregation_leaves_under_a_contract_without_it(
    contract: Contract, kind: type[Any]
) -> None:
    for blobs in ({}, {"north": b"n"}, {SECRET: b"x"}):
        with pytest.raises(ProtocolError, match="not one of secure aggregation"):
            release.step(contract, "north", kind, blobs)
