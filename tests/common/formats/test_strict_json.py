"""JSON from outside has one meaning: no key twice, no half of a character, no NaN."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from silotune.client.privacy.ledger_entries import verify_export
from silotune.client.site.signed_policy import adopt, sign, signature_file
from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract
from silotune.common.data import records
from silotune.common.errors import DataError, ProtocolError, RefusalError, UsageError
from silotune.common.formats import strict_json
from silotune.common.protocol import join_request
from silotune.common.protocol.messages import Message, Train, pack, unpack

FUZZ = settings(deadline=None, max_examples=100, derandomize=True, database=None)
KEY = st.text(st.characters(exclude_categories=()), max_size=4)
VALUE = st.recursive(
    KEY
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(KEY, x, max_size=3),
    max_leaves=12,
)
HALF = "half of a character"


def has_half(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


@FUZZ
@given(VALUE, st.booleans(), st.sampled_from([None, 1]))
@example("\ud83d\ude00", True, None)
@example("\\ud800", True, None)
@example(["\ud800", "\udc00"], True, None)
def test_all_json_is_read_as_json_loads_reads_it_but_for_halves(
    value: Any, ascii_: bool, indent: int | None
) -> None:
    assume(ascii_ or not has_half(value))
    text = json.dumps(value, ensure_ascii=ascii_, indent=indent)
    if has_half(json.loads(text)):
        with pytest.raises(ValueError, match=HALF):
            strict_json.loads(text)
    else:
        assert strict_json.loads(text) == json.loads(text)
        assert strict_json.loads(text.encode()) == json.loads(text)


@FUZZ
@given(st.dictionaries(KEY, VALUE, min_size=1, max_size=4), st.data())
def test_a_key_twice_is_refused_with_its_line_however_deep_and_written(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    assume(not has_half(fields))
    key = data.draw(st.sampled_from(sorted(fields)))
    again = "".join(f"\\u{ord(c):04x}" if ord(c) < 0x10000 else c for c in key)  # the same key
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in fields.items()]
    at = data.draw(st.integers(list(fields).index(key) + 1, len(lines)))
    lines.insert(at, f'"{again}" : {{}}')
    text = '{"a": [1, {"b":\n{' + ",\n".join(lines) + "}}]}"
    with pytest.raises(ValueError, match="stands twice") as error:
        strict_json.loads(text)
    assert f"again in line {2 + at};" in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1e999", "1e999 is larger"),
        ('{"a": [-1.5e400]}', "-1.5e400"),
        ('{"a": NaN}', "NaN"),
        ("[-Infinity]", "Infinity"),
        ("{", "line 1"),
        ("", "line 1"),
        ('["\\ud83d\\ud83d\\ude00"]', HALF),
        ('["\\ude00\\ud83d"]', HALF),
        ('{\n"\\uD800": 1}', "line 2"),
        (b"\xff", "utf-8"),
        (b'["\xed\xa0\x80"]', "utf-8"),
        ('["a\nb"]', "line 1"),
    ],
)
def test_what_is_not_json_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        strict_json.loads(text)


def with_epsilon_twice(contract: Contract) -> str:
    text = contract.model_dump_json(indent=1)
    assert text.count('"epsilon": 8.0') == 1
    return text.replace('"epsilon": 8.0', '"epsilon": 8.0,\n"epsilon": 1.0')


def test_a_contract_with_a_key_twice_or_half_a_character_is_one_sentence(
    tmp_path: Path, table_contract: Contract, run: Callable[..., tuple[int, str, str]]
) -> None:
    file = tmp_path / "c.json"
    text = table_contract.model_dump_json(indent=1)
    for changed, words in (
        (with_epsilon_twice(table_contract), 'the key "epsilon" stands twice'),
        (text.replace('"phrase": "age"', '"phrase": "\\ud800"'), HALF),
        (text.replace('"name": "small"', '"name": "\\ud800"'), HALF),
        (text.replace('"name": "small"', '"\\udfff": "small"'), HALF),
    ):
        assert changed != text
        file.write_text(changed)
        code, out, err = run("contract", "validate", str(file))
        assert (code, out) == (2, "")
        assert err.startswith(f"✗ E102 {file} is not valid JSON: ")
        assert words in err
        assert "line " in err
        assert len(err.splitlines()) == 1


def test_a_join_request_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text('{"site": "north", "site": "south"}')
    with pytest.raises(UsageError, match="stands twice") as error:
        join_request.load(file)
    assert error.value.code == "E102"


def test_a_signature_with_a_key_twice_is_none(tmp_path: Path, table_contract: Contract) -> None:
    from silotune.client.privacy.keys import Keys
    from silotune.client.privacy.ledger import PrivacyLedger
    from silotune.client.site.policy import load

    folder = tmp_path / "keys"
    Keys.create(folder)
    keys = Keys.load(folder)
    site = tmp_path / "site.toml"
    site.write_text(
        'name = "north"\n[data]\nfile = "rows.csv"\n[budgets.record]\nepsilon = 8.0\n'
        "delta = 1e-4\n[permits]\n"
    )
    assert load(site).name == "north"
    ledger = PrivacyLedger.create(tmp_path / "state", keys, "north")
    sign(site, folder / "owner.key", 0)
    adopt(site, ledger, keys.owner)
    file = signature_file(site)
    file.write_text(file.read_text().replace('"serial":1', '"serial":9,"serial":1'))
    with pytest.raises(RefusalError, match="not signed") as error:
        adopt(site, ledger, keys.owner)
    assert error.value.code == "E213"


def test_an_export_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    from silotune.client.privacy.keys import Keys
    from silotune.client.privacy.ledger import PrivacyLedger

    folder = tmp_path / "keys"
    Keys.create(folder)
    ledger = PrivacyLedger.create(tmp_path / "state", Keys.load(folder), "north")
    lines = list(ledger.export())
    assert len(verify_export(lines)) == 1
    for at in range(len(lines)):
        key = lines[at].split('"')[1]
        twice = [*lines[:at], lines[at].replace("{", f'{{"{key}": 0, ', 1), *lines[at + 1 :]]
        with pytest.raises(RefusalError, match="not in a ledger's form"):
            verify_export(twice)


def test_an_exports_entry_with_a_key_twice_is_refused() -> None:
    """Also where the site itself wrote and signed it: two auditors must not read two numbers."""
    from silotune.client.privacy import ledger_entries
    from silotune.client.privacy.keys import Keys
    from silotune.client.privacy.ledger import PrivacyLedger
    from silotune.common.protocol.messages import Receipt

    keys = Keys.in_memory()
    ledger = PrivacyLedger.in_memory("north", keys)
    first, entry, _ = (json.loads(line) for line in ledger.export())
    body = entry["body"].replace("{", '{"site": "south", ', 1)
    assert ledger_entries._READ.validate_json(body, strict=True) == ledger.entries[0]
    head = ledger_entries.digest(body, bytes.fromhex(entry["mac"]))
    signature = keys.signing.sign(Receipt.statement("north", 1, head)).hex()
    receipt = Receipt(sequence=1, head=head, signature=signature)
    forged = [json.dumps(first), json.dumps(entry | {"body": body}), receipt.model_dump_json()]
    with pytest.raises(RefusalError, match="not in a ledger's form"):
        verify_export(forged)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.replace('"run":"r"', '"run":"q","run":"r"'),
        lambda h: h.replace('"run":"r"', '"run":"r","run":"r"'),
        lambda h: h.replace('"run":"r"', '"run":"\\ud800"'),
    ],
)
def test_a_message_with_a_key_twice_or_half_a_character_is_refused(
    change: Callable[[str], str], table_contract: Contract
) -> None:
    wire = pack(Message(Train(contract=table_contract.hash, run="r", round=1), {}))
    size = int.from_bytes(wire[:8], "little")
    outer = json.loads(wire[8 : 8 + size])
    inner = outer["__metadata__"]["silotune"]
    outer["__metadata__"]["silotune"] = change(inner)
    assert outer["__metadata__"]["silotune"] != inner
    header = json.dumps(outer).encode()
    with pytest.raises(ProtocolError):
        unpack(len(header).to_bytes(8, "little") + header + wire[8 + size :])


def test_contracts_are_still_read_from_what_a_run_writes(
    tmp_path: Path, table_contract: Contract
) -> None:
    file = tmp_path / "contract.json"
    file.write_text(table_contract.model_dump_json())
    assert contracts.load(file).hash == table_contract.hash


def test_half_a_character_in_a_records_key_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"age": 1, "\\ud800": 2}\n')
    with pytest.raises(DataError, match="a key holds half a character") as error:
        records.table(file)
    assert error.value.code == "E311"
