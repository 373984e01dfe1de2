"""What crosses the boundary: exactly these fields, or ProtocolError. Nothing is executed."""

from __future__ import annotations

import io
import json
import pickle
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save as save_tensors

from silotune.common.errors import CODES, ProtocolError
from silotune.common.protocol.messages import (
    MAX_HEADER,
    MAX_WIRE,
    Agree,
    Describe,
    Description,
    Endorse,
    Endorsement,
    Header,
    Keys,
    Masked,
    Message,
    Receipt,
    Refusal,
    Reveal,
    Revealed,
    Share,
    Shares,
    Train,
    Update,
    pack,
    unpack,
)

FUZZ = settings(deadline=None, max_examples=150, derandomize=True, database=None)
HASH = "0123456789abcdef" * 4
UPDATE: dict[str, Any] = {
    "kind": "update",
    "contract": HASH,
    "site": "north",
    "run": "run-1",
    "round": 2,
    "attempt": 1,
    "request": HASH,
    "epsilon": 1.5,
    "metrics": {},
    "receipt": {"sequence": 3, "head": HASH, "signature": "0" * 128},
    "signature": "1" * 128,
}
REFUSAL: dict[str, Any] = {
    "kind": "refusal",
    "contract": HASH,
    "site": "north",
    "code": "E210",
    "incident": "ab" * 8,
}

WITH_ARRAYS = Train | Update
WITH_BLOBS = Train | Masked | Share | Reveal | Keys | Shares | Endorsement | Revealed

# Wire bytes by hand


def raw(outer: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    head = outer if isinstance(outer, bytes) else json.dumps(outer, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + data


def inner(header: dict[str, Any] | str, **tensors: Any) -> dict[str, Any]:
    text = (
        header
        if isinstance(header, str)
        else json.dumps(header, sort_keys=True, separators=(",", ":"))
    )
    return {"__metadata__": {"silotune": text}, **tensors}


def refused(wire: bytes) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        unpack(wire)
    assert caught.value.code in ("E501", "E502")
    return caught.value


def read_or_refused(wire: bytes) -> None:
    """The whole of what `unpack` may do with any bytes."""
    try:
        message = unpack(wire)
    except ProtocolError:
        return
    assert isinstance(message.header, Header)
    assert all(array.dtype == np.float32 for array in message.arrays.values())
    assert all(isinstance(blob, bytes) for blob in message.blobs.values())
    assert isinstance(message.header, WITH_ARRAYS) or not message.arrays
    assert isinstance(message.header, WITH_BLOBS) or not message.blobs


hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
sites = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}\Z")
runs = st.from_regex(r"\A[a-z0-9][a-z0-9-]{0,63}\Z")
rounds = st.integers(1, 1_000_000)
epsilons = st.none() | st.floats(0, 1e308)
signatures = st.text("0123456789abcdef", min_size=128, max_size=128)
receipts = st.builds(
    Receipt,
    sequence=st.integers(1, 1 << 62),
    head=hashes,
    signature=signatures,
)
metrics = st.dictionaries(
    st.sampled_from(["loss", "accuracy"]), st.floats(allow_nan=False, allow_infinity=False)
)
headers = st.one_of(
    st.builds(Describe, contract=hashes, challenge=hashes),
    st.builds(
        Train,
        contract=hashes,
        run=runs,
        round=rounds,
        attempt=rounds,
        receipt=st.none() | receipts,
        agreement=st.none() | hashes,
    ),
    *(
        st.builds(kind, contract=hashes, run=runs, round=rounds, attempt=rounds)
        for kind in (Agree, Share)
    ),
    *(
        st.builds(
            kind,
            contract=hashes,
            agreement=hashes,
            round=rounds,
            survivors=st.lists(sites, max_size=4).map(tuple),
        )
        for kind in (Endorse, Reveal)
    ),
    *(
        st.builds(kind, contract=hashes, site=sites)
        for kind in (Keys, Shares, Endorsement, Revealed)
    ),
    st.builds(
        Masked,
        request=hashes,
        contract=hashes,
        site=sites,
        run=runs,
        round=rounds,
        attempt=rounds,
        epsilon=epsilons,
        receipt=receipts,
        agreement=hashes,
    ),
    st.builds(Description, contract=hashes, site=sites, signature=signatures),
    st.builds(
        Update,
        request=hashes,
        contract=hashes,
        site=sites,
        run=runs,
        round=rounds,
        attempt=rounds,
        epsilon=epsilons,
        metrics=metrics,
        receipt=receipts,
    ),
    st.builds(
        Refusal,
        contract=hashes,
        site=sites,
        code=st.sampled_from(sorted(CODES)),
        incident=st.text("0123456789abcdef", min_size=16, max_size=16),
    ),
)
arrays = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
        lambda name: name != "__metadata__" and name[:1] != ":"
    ),
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)),
    max_size=4,
)


blobs = st.dictionaries(sites, st.binary(max_size=40), max_size=4)


def carried(header: Any, named: dict[str, Any], bytes_: dict[str, bytes]) -> Message:
    """A message with as much of these as its kind may carry."""
    return Message(
        header,
        named if isinstance(header, WITH_ARRAYS) else {},
        bytes_ if isinstance(header, WITH_BLOBS) else {},
    )


@FUZZ
@given(headers, arrays, blobs)
def test_round_trip(header: Any, named: dict[str, Any], bytes_: dict[str, bytes]) -> None:
    """Headers, arrays and blobs come back bit by bit, NaN and infinity too (rounds.py judges)."""
    sent = carried(header, named, bytes_)
    named = sent.arrays
    message = unpack(pack(sent))
    assert message.header == header
    assert message.blobs == sent.blobs
    assert type(message.header) is type(header)
    assert set(message.arrays) == set(named)
    for name, array in named.items():
        assert message.arrays[name].dtype == np.float32
        assert message.arrays[name].shape == array.shape
        assert message.arrays[name].tobytes() == array.tobytes()


def test_a_number_by_itself_keeps_its_shape() -> None:
    header = Train(contract=HASH, run="r", round=1)
    message = Message(header, {"x": np.zeros((), np.float32)})
    assert unpack(pack(message)).arrays["x"].shape == ()


@FUZZ
@given(headers, arrays, blobs, st.randoms(use_true_random=False))
def test_the_same_message_is_the_same_bytes(
    header: Any, named: dict[str, Any], bytes_: dict[str, bytes], rng: Any
) -> None:
    sent = carried(header, named, bytes_)
    order, peers = list(sent.arrays), list(sent.blobs)
    rng.shuffle(order)
    rng.shuffle(peers)
    shuffled = {name: np.asfortranarray(sent.arrays[name]) for name in order}
    wire = pack(sent)
    assert pack(Message(header, shuffled, {name: sent.blobs[name] for name in peers})) == wire
    assert pack(unpack(wire)) == wire


@FUZZ
@given(headers, arrays, blobs)
def test_a_kind_carries_only_what_it_may(
    header: Any, named: dict[str, Any], bytes_: dict[str, bytes]
) -> None:
    wire = pack(Message(header, named, bytes_))
    if carried(header, named, bytes_) == Message(header, named, bytes_):
        unpack(wire)
    else:
        assert refused(wire).code == "E502"


def example(masked: bool = False) -> bytes:
    if masked:
        facts = {k: v for k, v in UPDATE.items() if k not in ("kind", "metrics")}
        return pack(Message(Masked(**facts, agreement=HASH), blobs={"masked": bytes(range(9))}))
    values = {"head.bias": np.ones(2, np.float32), "head.weight": np.ones((2, 3), np.float32)}
    return pack(Message(Update(**UPDATE), values))


def test_every_truncation_is_refused() -> None:
    for wire in (example(), example(masked=True)):
        for size in range(len(wire)):
            refused(wire[:size])


def test_trailing_bytes_are_refused() -> None:
    for more in (b"\0", b"x" * 8, example()):
        refused(example() + more)


def test_every_flipped_bit_is_read_or_refused() -> None:
    for wire in (example(), example(masked=True)):
        for place in range(len(wire)):
            for bit in (1, 8, 128):
                read_or_refused(wire[:place] + bytes([wire[place] ^ bit]) + wire[place + 1 :])


@FUZZ
@given(st.data())
def test_mangled_bytes(data: st.DataObject) -> None:
    wire = bytearray(example(data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(wire)))
        wire[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    read_or_refused(bytes(wire))


@FUZZ
@given(st.binary(max_size=300))
def test_any_bytes(wire: bytes) -> None:
    read_or_refused(wire)
    read_or_refused(raw(wire))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "F64", "U8", "silotune", HASH]),
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.dictionaries(
            st.sampled_from(["__metadata__", "silotune", "x", "dtype", "shape", "data_offsets"]),
            inside,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@FUZZ
@given(json_values, json_values, json_values)
def test_any_json(outer: Any, header: Any, tensor: Any) -> None:
    for value in (
        outer,
        {"__metadata__": header},
        {"__metadata__": {"silotune": header}},
        inner(json.dumps(header)),
        inner(UPDATE, x=tensor),
    ):
        read_or_refused(raw(json.dumps(value).encode(), bytes(8)))


@FUZZ
@given(st.sampled_from(sorted(UPDATE)), json_values)
def test_any_value_of_any_field(key: str, value: Any) -> None:
    read_or_refused(raw(inner(UPDATE | {key: value})))


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"\0" * 8,
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 2**63) + b"{}" * 40,
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 0) + b"{}",
        raw(b"{}"),
        raw(b"[]"),
        raw(b"null"),
        raw(b"1" * 6000),
        raw(b"[" * 100_000),
        raw(b'{"a":' * 100_000),
        raw(inner("[" * 100_000)),
        raw(inner("1" * 6000)),
        raw(b"\xff\xfe"),
        raw({"silotune": "{}"}),
        raw({"__metadata__": {}}),
        raw({"__metadata__": []}),
        raw({"__metadata__": {"silotune": 5}}),
    ],
    ids=lambda w: f"{len(w)}-{w[8:16]!r}",
)
def test_bombs_and_rubbish(wire: bytes) -> None:
    assert refused(wire).code == "E501"


def test_sizes_are_checked_before_anything_is_read() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return MAX_WIRE + 1

    with pytest.raises(ProtocolError, match="outside"):
        unpack(Huge(b"x"))
    padded = json.dumps(inner(UPDATE)).encode() + b" " * MAX_HEADER
    with pytest.raises(ProtocolError, match="header length"):
        unpack(raw(padded))


def test_a_pickle_is_refused_and_not_run() -> None:
    ran: list[int] = []

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return ran.append, (1,)

    payload = pickle.dumps(Evil())
    refused(payload)
    refused(struct.pack("<Q", len(payload)) + payload)
    refused(raw(inner(UPDATE), payload))
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}]), allow_pickle=True)
    refused(file.getvalue())
    assert not ran


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8", "bool"])
def test_blobs_are_bytes(dtype: str) -> None:
    facts = {k: v for k, v in UPDATE.items() if k != "metrics"}
    metadata = {"silotune": json.dumps(facts | {"kind": "masked", "agreement": HASH})}
    wire = save_tensors({":masked": np.zeros(8, dtype)}, metadata=metadata)
    assert refused(wire).code == "E502"
    square = save_tensors({":masked": np.zeros((2, 2), np.uint8)}, metadata=metadata)
    assert refused(square).code == "E501"


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "int8", "uint8", "bool"])
def test_only_float32_crosses(dtype: str) -> None:
    metadata = {"silotune": json.dumps(UPDATE)}
    wire = save_tensors({"x": np.zeros(8, dtype)}, metadata=metadata)
    assert refused(wire).code == "E502"
    both = {"w": np.zeros(2, np.float32), "x": np.zeros(8, dtype)}
    assert refused(save_tensors(both, metadata=metadata)).code == "E502"


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ([2**64 - 1, 2], [0, 8]),
        ([2**40], [0, 8]),
        ([0, 2**64 - 1], [0, 0]),
        ([-1], [0, 8]),
        ([2.0], [0, 8]),
        ([2], [8, 0]),
        ([2], [0, 2**63]),
        ([1] * 70, [0, 4]),
        ([3], [0, 8]),
    ],
    ids=str,
)
def test_impossible_arrays(shape: list[Any], offsets: list[int]) -> None:
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    refused(raw(inner(UPDATE, x=tensor), bytes(offsets[1] if 0 < offsets[1] < 100 else 0)))


def test_two_arrays_cannot_share_bytes() -> None:
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    refused(raw(inner(UPDATE, x=tensor, y=tensor), bytes(8)))


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": float("nan")},
        {"epsilon": float("inf")},
        {"epsilon": -0.1},
        {"epsilon": "1"},
        {"epsilon": True},
        {"round": 0},
        {"round": -1},
        {"round": 1.0},
        {"round": True},
        {"round": "1"},
        {"round": 1_000_001},
        {"round": 10**30},
        {"attempt": 0},
        {"site": ""},
        {"site": "x" * 65},
        {"site": None},
        {"run": ""},
        {"run": "../etc"},
        {"run": "a\n"},
        {"run": "A"},
        {"contract": HASH[:-1]},
        {"contract": HASH.upper()},
        {"contract": HASH + "\n"},
        {"loss": 0.1},
        {"num-examples": 100},
        {"kind": "evaluate"},
        {"kind": None},
        {"kind": ["update"]},
    ],
    ids=str,
)
def test_a_header_has_these_fields_and_no_other(change: dict[str, Any]) -> None:
    unpack(raw(inner(UPDATE)))
    assert refused(raw(inner(UPDATE | change))).code == "E501"


@pytest.mark.parametrize("key", sorted(UPDATE))
def test_no_field_is_optional(key: str) -> None:
    refused(raw(inner({k: v for k, v in UPDATE.items() if k != key})))


@pytest.mark.parametrize(
    "change",
    [
        {"code": "E999"},
        {"code": "E21"},
        {"code": "age 63"},
        {"incident": "Maria K., 63yrs"},
        {"incident": "AB" * 8},
        {"incident": "ab" * 9},
        {"text": "age is 63"},
        {"arrays": {}},
    ],
    ids=str,
)
def test_a_refusal_has_no_words_of_its_own(change: dict[str, Any]) -> None:
    unpack(raw(inner(REFUSAL)))
    refused(raw(inner(REFUSAL | change)))


@pytest.mark.parametrize("site", ["age=63\nchol=240", "\x1b[31mred", "a\x00", "63岁", "63!"])
def test_a_site_name_is_no_free_text(site: str) -> None:
    """The contract's own pattern for names: otherwise 64 characters of a record fit here, or
    control characters for the operator's terminal."""
    refused(raw(inner(REFUSAL | {"site": site})))


def test_no_second_metadata_key() -> None:
    outer = inner(UPDATE)
    outer["__metadata__"]["note"] = "Maria K., 63"
    refused(raw(outer))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(UPDATE)[:-1] + ', "site": "south"}',
        json.dumps(UPDATE)[:-1] + f', "contract": "{"f" * 64}"}}',
    ],
)
def test_duplicate_keys_are_refused(text: str) -> None:
    """Two readers may take different ones of two equal keys."""
    refused(raw(inner(text)))


def test_duplicate_arrays_are_read_or_refused() -> None:
    head = json.dumps(inner(UPDATE))[:-1]
    one = '"x":{"dtype":"%s","shape":[2],"data_offsets":[0,8]}'
    for first, second in [("I32", "F32"), ("F32", "I32"), ("F32", "F32")]:
        read_or_refused(raw(f"{head}, {one % first}, {one % second}}}".encode(), bytes(8)))


def test_what_the_sender_wrote_is_not_repeated() -> None:
    for wire in (
        raw(inner(UPDATE | {"kind": "SECRET"})),
        raw(inner(UPDATE | {"SECRET": 1})),
        raw(inner(REFUSAL | {"code": "SECRET"})),
        raw(b"SECRET"),
        raw(inner(UPDATE, SECRET={"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}), bytes(4)),
    ):
        assert "SECRET" not in str(refused(wire))
