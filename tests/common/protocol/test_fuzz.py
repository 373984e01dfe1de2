"""Contracts, policies, join requests, messages that are almost right: read, or refused in words.

No other exception, no traceback, and nothing that was changed counts as what was agreed. By
`make soak` 20,000 of each.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from silotune.client.site.policy import Policy, permissive_policy
from silotune.common.config import types
from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract
from silotune.common.errors import ProtocolError, SilotuneError
from silotune.common.protocol import messages
from silotune.common.protocol.join_request import JoinRequest
from silotune.common.protocol.messages import Message, Train

FUZZ = settings(
    deadline=None,
    max_examples=int(os.environ.get("SILOTUNE_FUZZ", "150")),
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
RECIPES = Path(__file__).parents[3] / "simulations" / "recipes"
CONTRACT = contracts.load(RECIPES / "heart-diagnosis" / "contract.toml")
MASKED = CONTRACT.changed(
    sites=[{"name": s.name, "public_key": f"{n:064x}"} for n, s in enumerate(CONTRACT.sites, 1)],
    secure_aggregation={},
)
POLICY = permissive_policy(MASKED, "Cleveland", Path("records.csv"), None)

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["none", "entity", "../x", "\x1b[31m", "A" * 200, 1e308, -0.0, [], {}, [[]]]),
    st.recursive(
        st.integers(),
        lambda x: (
            st.lists(x, max_size=2)
            | st.dictionaries(st.sampled_from(["name", "kind", "values"]), x, max_size=2)
        ),
        max_leaves=4,
    ),
)


def paths(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document, the whole aside."""
    inside = data.items() if isinstance(data, dict) else enumerate(data)
    return [
        place
        for key, value in inside
        for place in [
            (*at, key),
            *(paths(value, (*at, key)) if isinstance(value, dict | list) else []),
        ]
    ]


def spoil(data: st.DataObject, document: Any) -> Any:
    """The document with up to three places replaced, taken out, doubled or put beside."""
    document = json.loads(json.dumps(document))
    for _ in range(data.draw(st.integers(1, 3))):
        places = paths(document)
        if not places:
            return document
        *way, key = data.draw(st.sampled_from(places))
        inside = document
        for step in way:
            inside = inside[step]
        what = data.draw(st.integers(0, 4))
        if what == 0:
            del inside[key]
        elif what == 1 and isinstance(inside, list):
            inside.append(inside[key])
        elif what == 2 and isinstance(inside, dict):
            inside[data.draw(st.text(max_size=6))] = inside[key]
        else:
            inside[key] = copy.deepcopy(data.draw(values))  # it may be spoilt in its turn
    return document


def read(document: Any, model: type[Any]) -> Any:
    """The model, or None if it was refused in a sentence or more, each short and printable."""
    try:
        return types.parse(json.dumps(document), "fuzz.json", model)
    except SilotuneError as error:
        code, lines = error.code, str(error).split("\n")
    assert code in ("E102", "E103")
    assert all(line.isprintable() and 0 < len(line) < 3000 for line in lines), lines
    return None


@FUZZ
@given(st.data(), st.sampled_from([CONTRACT, MASKED]))
def test_a_contract(data: st.DataObject, contract: Contract) -> None:
    found = read(spoil(data, contract.model_dump(mode="json")), Contract)
    if found is None or found == MASKED:
        return
    # Whatever else it says, this site has not agreed to it; nor does it hide what it permits.
    assert found.hash != MASKED.hash
    assert POLICY.refusals(found)
    assert contracts.parse(found.model_dump_json(), "again.json").hash == found.hash
    if found.secure_aggregation is not None:
        n, t = len(found.sites), found.threshold
        assert n >= 3
        assert 2 * t > n + found.secure_aggregation.max_colluding_sites
        assert found.quorum >= t


@FUZZ
@given(st.data())
def test_a_policy(data: st.DataObject) -> None:
    found = read(spoil(data, POLICY.model_dump(mode="json")), Policy)
    if found is None:
        return
    assert all(limit.epsilon > 0 and 0 < limit.delta < 0.01 for limit in found.limits.values())
    target = found.target(MASKED) if found.name in MASKED.weights() else None
    assert target is None or target.epsilon <= MASKED.privacy.epsilon
    if not found.refusals(MASKED):  # then it agrees to this very contract, by name and hash
        assert MASKED.hash in found.permits.contracts
        assert found.name in MASKED.weights()
        assert found.permits.max_colluding_sites == 0


@FUZZ
@given(st.data())
def test_a_join_request(data: st.DataObject) -> None:
    good = JoinRequest(site="a", public_key="1" * 64, node_key="ecdsa-sha2-nistp384 " + "A" * 180)
    found = read(spoil(data, good.model_dump(mode="json")), JoinRequest)
    assert found is None or found == good or found.fingerprint != good.fingerprint


WIRE = messages.pack(
    Message(
        Train(contract=MASKED.hash, run="r", round=1, agreement="0" * 64),
        {"head.weight": np.ones((2, 3), np.float32)},
        {"Hungary": bytes(40)},
    )
)


@FUZZ
@given(st.data())
def test_a_message(data: st.DataObject) -> None:
    """Its bytes, and its header with the lengths put right."""
    wire = bytearray(WIRE)
    if data.draw(st.booleans()):
        size = int.from_bytes(wire[:8], "little")
        outer = json.loads(wire[8 : 8 + size])
        if data.draw(st.booleans()):
            inner = spoil(data, json.loads(outer["__metadata__"]["silotune"]))
            outer["__metadata__"]["silotune"] = json.dumps(inner)
        else:
            outer = spoil(data, outer)
        head = json.dumps(outer, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        wire[: 8 + size] = len(head).to_bytes(8, "little") + head
    else:
        for _ in range(data.draw(st.integers(1, 5))):
            at = data.draw(st.integers(0, len(wire) - 1))
            wire[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    try:
        found = messages.unpack(bytes(wire))
    except ProtocolError:
        return
    assert messages.pack(found) == bytes(wire)


@pytest.mark.parametrize("text", ["", "[", "\0", "a = 1\na = 2", "[[a]]\n[a]", "x = 1e999999"])
def test_toml_that_is_none(text: str) -> None:
    with pytest.raises(SilotuneError):
        contracts.parse(text, "fuzz.toml")
