"""The policy: what it refuses, what its file may say, and that only its owner's counts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.client.privacy.budget import Limit
from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.ledger_entries import Adopted
from silotune.client.records.record_ids import RecordSet, of_table
from silotune.client.site import policy as policies
from silotune.client.site import signed_policy
from silotune.client.site.policy import Policy, permissive_policy
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.contract.model import EncoderModel
from silotune.common.contract.privacy import Unit
from silotune.common.data.records import Table
from silotune.common.errors import ContractError, DataError, RefusalError, UsageError

TEXT = """
name = "north"

[data]
file = "rows.csv"
key = ["patient"]

[budgets.record]
epsilon = 8.0
delta = 1e-4

[permits]
contracts = ["{hash}"]
metrics = ["loss"]
min_records = 3

[server]
address = "server.example.org:8000"
ca = "ca.pem"
""".replace("{hash}", "a" * 64)


def written(path: Path, text: str = TEXT) -> Path:
    path.write_text(text)
    return path


# Reading


def test_a_policy_is_read_and_its_paths_start_at_its_folder(tmp_path: Path) -> None:
    found = policies.load(written(tmp_path / "site.toml"))
    assert found.data.file == tmp_path / "rows.csv"
    assert found.server is not None
    assert found.server.ca == tmp_path / "ca.pem"
    assert found.limits == {"record": Limit(8.0, 1e-4)}
    # What is not said is the narrow choice.
    assert not found.permits.allow_without_dp
    assert found.data.duplicate_records == "refuse"
    assert found.permits.max_clip_norm == 1.0
    assert found.permits.min_sites == found.permits.min_quorum == 2


@pytest.mark.parametrize(
    ("line", "instead", "told"),
    [
        ("epsilon = 8.0", f"epsilon = {value}", "budgets.record.epsilon")
        for value in (
            "nan",
            "-1.0",
            "0.0",
            "-0.0",
            "inf",
            "-inf",
            "1e300",
            "100.5",
            '"8"',
            "true",
            "[8.0]",
        )
    ]
    + [
        ("delta = 1e-4", f"delta = {value}", "budgets.record.delta")
        for value in ("nan", "-1e-4", "0.0", "inf", "0.5", "1.0", "0.01", '"1e-4"', "false")
    ]
    + [
        ("epsilon = 8.0", "epsilon = 8.0\nepsilom = 9.0", "Unknown key 'budgets.record.epsilom'"),
        ("epsilon = 8.0", "", "Key 'budgets.record.epsilon' is missing"),
        ("min_records = 3", "min_records = 3.5", "permits.min_records"),
        ("min_records = 3", "min_records = 0", "permits.min_records"),
        ("min_records = 3", "min_record = 3", "Did you mean 'min_records'"),
        ("min_records = 3", "max_clip_norm = nan", "permits.max_clip_norm"),
        ("min_records = 3", "max_clip_norm = inf", "permits.max_clip_norm"),
        ("min_records = 3", "max_clip_norm = 0.0", "permits.max_clip_norm"),
        ("min_records = 3", "min_sites = -1", "permits.min_sites"),
        ("min_records = 3", 'repeat = "keep"', "Unknown key 'permits.repeat'"),
        ('metrics = ["loss"]', 'metrics = ["labels"]', "permits.metrics.1"),
        ('metrics = ["loss"]', 'metrics = "loss"', "permits.metrics"),
        (f'["{"a" * 64}"]', f'["{"A" * 64}"]', "permits.contracts.1"),
        (f'["{"a" * 64}"]', f'["{"a" * 63}"]', "permits.contracts.1"),
        ('key = ["patient"]', 'key = "patient"', "data.key"),
        ('key = ["patient"]', 'duplicate_records = "ignore"', "data.duplicate_records"),
        ('name = "north"', 'name = "../north"', "'name'"),
        (".org:8000", ".org", "server.address"),
        ("[server]", "[serve]", "Unknown key 'serve'"),
    ],
)
def test_what_a_policy_must_not_say_is_told_in_one_sentence_with_its_line(
    tmp_path: Path, line: str, instead: str, told: str
) -> None:
    assert line in TEXT
    path = written(tmp_path / "site.toml", TEXT.replace(line, instead))
    with pytest.raises(ContractError) as error:
        policies.load(path)
    (problem,) = [p for p in error.value.problems if told in p]
    assert re.search(rf"\({re.escape(str(path))}:\d+\)", problem)
    assert len(problem.splitlines()) == 1
    assert error.value.code == "E103"


def test_true_is_the_only_yes(tmp_path: Path) -> None:
    """TOML's own truth values; what pydantic reads as one besides is not for this switch."""
    for value, allowed in (("true", True), ("false", False)):
        text = TEXT.replace("min_records = 3", f"allow_without_dp = {value}")
        assert policies.load(written(tmp_path / "s.toml", text)).permits.allow_without_dp is allowed


@pytest.mark.parametrize("value", ['"yes"', '"on"', "1", '"t"', '"true"', "1.0", "[true]"])
def test_a_word_for_yes_does_not_switch_privacy_off(tmp_path: Path, value: str) -> None:
    text = TEXT.replace("min_records = 3", f"allow_without_dp = {value}")
    with pytest.raises(ContractError, match=r"permits\.allow_without_dp") as error:
        policies.load(written(tmp_path / "site.toml", text))
    assert len(error.value.problems) == 1


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    text = TEXT.replace("8.0", "nan").replace("1e-4", "2.0").replace('"north"', "5")
    with pytest.raises(ContractError) as error:
        policies.load(written(tmp_path / "site.toml", text))
    assert len(error.value.problems) == 3


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe", b"\0", b"a" * 10])
def test_a_file_that_is_no_toml_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "site.toml").write_bytes(content)
    with pytest.raises(UsageError, match=r"site\.toml") as error:
        policies.load(tmp_path / "site.toml")
    assert error.value.code == "E102"
    with pytest.raises(UsageError, match="cannot be read"):
        policies.load(tmp_path / "absent.toml")


# Refusing contracts


@pytest.fixture
def policy(table_contract: Contract, tmp_path: Path) -> Policy:
    return permissive_policy(table_contract, "north", tmp_path / "rows.csv", None)


def with_permits(policy: Policy, **permits: Any) -> Policy:
    return policy.model_copy(update={"permits": policy.permits.model_copy(update=permits)})


def codes(policy: Policy, contract: Contract) -> list[str]:
    found = policy.refusals(contract)
    assert all(len(str(refusal).splitlines()) == 1 for refusal in found)
    return [refusal.code for refusal in found]


def permitted(policy: Policy, contract: Contract, **permits: Any) -> Policy:
    """The policy, which now also permits `contract` by hash: other reasons stand alone."""
    return with_permits(policy, contracts=(contract.hash,), **permits)


def test_the_permitted_contract_is_not_refused(policy: Policy, table_contract: Contract) -> None:
    assert policy.refusals(table_contract) == []


@pytest.mark.parametrize(
    "change",
    [
        {"privacy": {"delta": 1.1e-4}},
        {"privacy": {"epsilon": 7.0}},
        {"quorum": 1},
        {"name": "small2"},
        {"deadline_seconds": 601.0},
    ],
)
def test_a_contract_of_another_hash_is_refused(
    policy: Policy, table_contract: Contract, change: dict[str, Any]
) -> None:
    found = codes(policy, table_contract.changed(**change))
    assert "E201" in found


RELEASES = [{"metric": "loss", "share": 0.1}, {"metric": "accuracy", "share": 0.1}]


@pytest.mark.parametrize(
    ("change", "permits", "code"),
    [
        ({"privacy": {"clip_norm": 1.01}}, {}, "E205"),
        ({"privacy": {"delta": 1.01e-4}}, {}, "E205"),
        ({}, {"tasks": ("regression",)}, "E205"),
        ({}, {"min_sites": 3}, "E205"),
        ({"quorum": 1}, {"min_quorum": 2}, "E205"),
        ({"privacy": {"mode": "none"}}, {}, "E203"),
        ({"releases": RELEASES[:1]}, {}, "E206"),
        ({"releases": RELEASES}, {"metrics": ("loss",)}, "E206"),
        ({"sites": [{"name": "south"}, {"name": "east"}]}, {}, "E201"),
        ({"sites": [{"name": "North"}, {"name": "south"}]}, {}, "E201"),
    ],
)
def test_each_reason_is_a_refusal_by_itself(
    policy: Policy,
    table_contract: Contract,
    change: dict[str, Any],
    permits: dict[str, Any],
    code: str,
) -> None:
    contract = table_contract.changed(**change)
    assert codes(permitted(policy, contract, **permits), contract) == [code]


def test_what_is_narrower_is_not_refused(policy: Policy, table_contract: Contract) -> None:
    contract = table_contract.changed(
        privacy={"clip_norm": 0.5, "delta": 1e-6, "epsilon": 1.0}, releases=RELEASES[:1]
    )
    assert codes(permitted(policy, contract, metrics=("loss", "accuracy")), contract) == []
    without = table_contract.changed(privacy={"mode": "none"})
    assert codes(permitted(policy, without, allow_without_dp=True), without) == []


def test_a_model_is_known_by_its_hash(policy: Policy, lora_contract: Contract) -> None:
    assert codes(permitted(policy, lora_contract), lora_contract) == []
    assert codes(permitted(policy, lora_contract, models=("0" * 64,)), lora_contract) == ["E205"]
    assert isinstance(lora_contract.model, EncoderModel)
    known = permitted(policy, lora_contract, models=(lora_contract.model.sha256,))
    assert codes(known, lora_contract) == []


def test_all_reasons_are_told_at_once(policy: Policy, table_contract: Contract) -> None:
    contract = table_contract.changed(
        privacy={"mode": "none", "clip_norm": 5.0, "delta": 1e-3},
        releases=RELEASES,
        sites=[{"name": "west"}],
        quorum=1,
    )
    found = codes(with_permits(policy, min_quorum=2, min_sites=2), contract)
    assert sorted(found) == ["E201"] * 2 + ["E203"] + ["E205"] * 4 + ["E206"] * 2


# Records


def records(rows: int, distinct: int) -> RecordSet:
    data = b"".join(i.to_bytes(16, "big") for i in range(distinct))
    return RecordSet.of_bytes("b", data, rows)


def test_too_few_records_are_refused_without_their_number(policy: Policy) -> None:
    narrow = with_permits(policy, min_records=100)
    narrow.check_records(records(100, 100), "record", None)
    with pytest.raises(DataError, match=r"fewer rows than permits\.min_records = 100") as error:
        narrow.check_records(records(99, 99), "record", None)
    assert error.value.code == "E304"
    assert "99" not in str(error.value)


def test_repeated_records_are_refused_unless_the_owner_keeps_them(policy: Policy) -> None:
    policy.check_records(records(5, 4), "record", None)
    refusing = policy.model_copy(
        update={"data": policy.data.model_copy(update={"duplicate_records": "refuse"})}
    )
    refusing.check_records(records(5, 5), "record", None)
    with pytest.raises(DataError, match="the same record more than once") as error:
        refusing.check_records(records(59, 42), "record", None)
    assert error.value.code == "E307"
    assert "17" not in str(error.value)
    assert error.value.local.startswith("17 rows")


@pytest.mark.parametrize("unit", ["record", "entity"])
def test_rows_in_two_forms_are_refused_unless_the_owner_keeps_them(
    policy: Policy, unit: Unit
) -> None:
    """Of records and of entities; by the numbers of their rows on the owner's screen alone."""
    cells = [("0.1", "a"), ("7", "b"), ("0.10000000149011612", "a")]
    for number in (1.3, 2.3, 3.3, 4.3):  # with its own digits, and with those of 32 bits
        cells += [(str(number), "c"), (str(float(np.float32(number))), "c")]
    rows = [(line, list(row)) for line, row in enumerate(cells, 2)]
    key = ["number"]
    found = of_table(Table("rows.csv", ["number", "group"], rows), key, bytes(32))
    data = policy.data.model_copy(update={"key": tuple(key)})
    keeping = policy.model_copy(update={"data": data})
    keeping.check_records(found, unit, None)
    refusing = policy.model_copy(
        update={"data": data.model_copy(update={"duplicate_records": "refuse"})}
    )
    with pytest.raises(DataError, match="in different forms") as error:
        refusing.check_records(found, unit, None)
    assert error.value.code == "E307"
    what = {"record": "one record in", "entity": "one entity (number) in"}[unit]
    assert what in str(error.value)
    assert f"the privacy unit is one {unit}. " in str(error.value)
    assert error.value.local.startswith(f"The same {unit} each: rows 2, 4; ")
    assert error.value.local.endswith("; rows 7, 8; and 2 more.")
    only = of_table(Table("rows.csv", ["number", "group"], rows[1:3]), key, bytes(32))
    refusing.check_records(only, unit, None)


def test_a_later_policy_is_held_against_how_a_running_worker_computes(
    table_contract: Contract, tmp_path: Path
) -> None:
    """A worker that clips inexactly does so until it ends, whatever [performance] says later."""
    exact = permissive_policy(table_contract, "north", tmp_path / "rows.csv", None)
    permits = exact.permits.model_copy(update={"allow_inexact_clipping": False})
    later = exact.model_copy(update={"permits": permits})
    assert not later.for_worker_of(exact).refusals(table_contract)
    started = exact.model_copy(update={"performance": Performance(gradients="ghost")})
    refusals = later.for_worker_of(started).refusals(table_contract)
    assert [refusal.code for refusal in refusals] == ["E205"]


# Signing


@dataclass
class Home:
    """A site's folder with keys, a ledger and a policy; nothing is signed yet."""

    folder: Path
    ledger: PrivacyLedger

    @property
    def config(self) -> Path:
        return self.folder / "site.toml"

    @property
    def signature(self) -> Path:
        return self.folder / "site.toml.sig"

    @property
    def keys(self) -> Keys:
        return Keys.load(self.folder / "keys")

    def sign(self, after: int = 0, key: Path | None = None) -> None:
        signed_policy.sign(self.config, key or self.folder / "keys" / "owner.key", after)

    def adopt(self) -> Policy:
        return signed_policy.adopt(self.config, self.ledger, self.keys.owner)

    def adopted(self) -> list[int]:
        return [entry.serial for entry in self.ledger.entries if isinstance(entry, Adopted)]

    def refuses(self, why: str) -> None:
        """Adopting is refused for this reason and leaves no trace."""
        before = len(self.ledger.entries)
        with pytest.raises(RefusalError, match=why) as refusal:
            self.adopt()
        assert refusal.value.code == "E213"
        assert len(self.ledger.entries) == before


@pytest.fixture
def home(tmp_path: Path) -> Home:
    found = Keys.create(tmp_path / "keys")
    written(tmp_path / "site.toml")
    return Home(tmp_path, PrivacyLedger.create(tmp_path / "state", found, "north"))


def test_a_signed_policy_is_adopted_once(home: Home) -> None:
    home.sign()
    assert home.adopt() == home.adopt() == policies.load(home.config)
    entry = home.ledger.policy
    assert entry is not None
    assert (entry.serial, entry.epsilon, entry.delta) == (1, 8.0, 1e-4)
    assert home.adopted() == [1]
    assert PrivacyLedger.open(home.folder / "state", home.keys).policy == entry


def test_an_unsigned_policy_is_refused(home: Home) -> None:
    home.refuses("is not signed")
    for content in (b"", b"{}", b"\xff", b'{"policy": "x", "serial": 1, "signature": "y"}'):
        home.signature.write_bytes(content)
        home.refuses("is not signed")


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("8.0", "80.0"),
        lambda text: text + "\n",
        lambda text: text.replace("north", "north "),
        lambda text: text + "# nothing",
    ],
)
def test_a_policy_edited_after_signing_is_refused(home: Home, edit: Callable[[str], str]) -> None:
    home.sign()
    written(home.config, edit(TEXT))
    home.refuses("has changed since its owner signed it")


@pytest.mark.parametrize("adopted", [False, True])
def test_an_edit_with_its_own_digest_in_the_signature_is_refused(home: Home, adopted: bool) -> None:
    home.sign()
    if adopted:
        home.adopt()
    old = json.loads(home.signature.read_text())
    written(home.config, TEXT.replace("8.0", "80.0"))
    home.sign(key=Keys.create(home.folder / "thief").folder / "owner.key")  # type: ignore[operator]
    new = json.loads(home.signature.read_text())
    home.refuses("not the owner's")
    home.signature.write_text(json.dumps({**new, "signature": old["signature"]}))
    home.refuses("not the owner's")


def test_a_serial_number_cannot_be_raised_without_the_owner(home: Home) -> None:
    home.sign()
    home.adopt()
    found = json.loads(home.signature.read_text())
    home.signature.write_text(json.dumps({**found, "serial": 2}))
    home.refuses("not the owner's")


@pytest.mark.parametrize("serial", [0, -1, 1.5, True, "1", None])
def test_a_serial_number_is_a_positive_whole_number(home: Home, serial: object) -> None:
    home.sign()
    found = json.loads(home.signature.read_text())
    home.signature.write_text(json.dumps({**found, "serial": serial}))
    home.refuses("is not signed")


def test_an_older_signed_policy_put_back_is_refused(home: Home) -> None:
    home.sign()
    home.adopt()
    generous = home.folder / "old"
    generous.mkdir()
    for path in (home.config, home.signature):
        shutil.copy(path, generous)
    written(home.config, TEXT.replace("8.0", "2.0"))
    home.sign(after=1)
    assert home.adopt().limits["record"].epsilon == 2.0
    for path in generous.iterdir():
        shutil.copy(path, home.folder)
    home.refuses(r"is an older policy \(number 1\); the ledger has adopted number 2")
    # The ledger says so, not this process's memory.
    home.ledger = PrivacyLedger.open(home.folder / "state", home.keys)
    home.refuses("is an older policy")


def test_a_number_cannot_be_used_for_two_policies(home: Home) -> None:
    home.sign()
    home.adopt()
    written(home.config, TEXT.replace("8.0", "80.0"))
    home.sign()  # the owner's key, but no new number
    home.refuses("older policy")


def test_numbers_may_leave_gaps_and_the_same_policy_may_be_signed_anew(home: Home) -> None:
    for after in (0, 6):
        home.sign(after)
        home.adopt()
    assert home.adopted() == [1, 7]


def test_a_policy_for_another_site_is_refused(home: Home) -> None:
    written(home.config, TEXT.replace('"north"', '"south"'))
    home.sign()
    home.refuses("is for 'south', but the ledger is that of 'north'")


def test_another_owners_key_file_does_not_help(home: Home) -> None:
    """The worker checks with the key the ledger was opened with."""
    thief = Keys.create(home.folder / "thief")
    home.sign(key=home.folder / "thief" / "owner.key")
    home.refuses("not the owner's")
    (home.folder / "keys" / "owner.pub").write_bytes(thief.owner)
    with pytest.raises(RefusalError, match="another owner") as refusal:
        PrivacyLedger.open(home.folder / "state", home.keys)
    assert refusal.value.code == "E212"


def test_what_is_no_policy_is_not_signed(home: Home) -> None:
    written(home.config, TEXT.replace("8.0", "nan"))
    with pytest.raises(ContractError):
        home.sign()
    assert not home.signature.exists()


def test_a_signed_policy_that_means_nothing_is_not_adopted(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signed by an older version that let it pass, say."""
    written(home.config, TEXT.replace("8.0", "nan"))
    with monkeypatch.context() as patch:
        for module in (policies, signed_policy):
            patch.setattr(module, "parse", lambda *_: None)
        home.sign()
    with pytest.raises(ContractError):
        home.adopt()
    assert home.adopted() == []


def test_the_signature_is_the_sites_alone_to_read(home: Home) -> None:
    home.sign()
    assert home.signature.stat().st_mode & 0o777 == 0o600


# Masks, wherever they can be had


def of_sites(contract: Contract, sites: int, **changes: Any) -> Contract:
    """The contract with so many sites, whose keys are made up."""
    names = ("north", "south", "east", "west", "centre")[:sites]
    return contract.changed(
        sites=[{"name": n, "public_key": str(at) * 64} for at, n in enumerate(names)],
        quorum=sites,
        **changes,
    )


ROBUST = {"robust": {"rule": "median"}}
MASKED: dict[str, Any] = {"secure_aggregation": {}}


@pytest.mark.parametrize(
    ("sites", "changes", "refused_by"),
    [
        (2, {}, ["true"]),
        (3, {}, ["true", "auto"]),
        (5, {}, ["true", "auto"]),
        (3, {"aggregation": ROBUST}, ["true"]),
        (3, MASKED, []),
        (5, MASKED, []),
    ],
)
def test_a_contract_without_masks_is_refused_where_it_could_have_them(
    policy: Policy,
    table_contract: Contract,
    sites: int,
    changes: dict[str, Any],
    refused_by: list[str],
) -> None:
    contract = of_sites(table_contract, sites, **changes)
    for word, value in (("true", True), ("auto", "auto"), ("false", False)):
        found = permitted(policy, contract, masked_only=value).refusals(contract)
        assert [r.code for r in found] == (["E205"] if word in refused_by else []), word
        assert all("has no [secure_aggregation]" in str(r) for r in found)


@pytest.mark.parametrize("method", ["flexlora", "fedex"])
def test_a_method_that_needs_each_update_by_itself_goes_without_masks(
    lora_contract: Contract, method: str
) -> None:
    contract = of_sites(lora_contract, 3, aggregation={"method": method, "server_momentum": 0.0})
    assert not contract.can_be_masked
    assert of_sites(lora_contract, 3).can_be_masked


def test_masks_are_asked_for_where_they_can_be_had_unless_the_owner_says_otherwise(
    tmp_path: Path, table_contract: Contract
) -> None:
    contract = of_sites(table_contract, 3)
    text = TEXT.replace('key = ["patient"]', "").replace("a" * 64, contract.hash)
    default = policies.load(written(tmp_path / "site.toml", text))
    assert default.permits.masked_only == "auto"
    (found,) = default.refusals(contract)
    # Both ways out that the sentence names.
    assert "without --unmasked" in str(found)
    assert "set permits.masked_only = false and sign" in str(found)
    other = text.replace("min_records = 3", "min_records = 3\nmasked_only = false")
    assert policies.load(written(tmp_path / "other.toml", other)).refusals(contract) == []
    masked = contract.changed(**MASKED)
    text = text.replace(contract.hash, masked.hash)
    assert policies.load(written(tmp_path / "masked.toml", text)).refusals(masked) == []


@pytest.mark.parametrize("value", ['"sometimes"', "1", "0", '"true"', '"Auto"', "1.0", "[]"])
def test_another_word_about_masks_is_refused_with_those_that_may_stand(
    tmp_path: Path, value: str
) -> None:
    text = TEXT.replace("min_records = 3", f"masked_only = {value}")
    with pytest.raises(ContractError) as error:
        policies.load(written(tmp_path / "site.toml", text))
    (problem,) = error.value.problems
    assert problem.startswith('permits.masked_only must be true, false or "auto" (')
    assert "/site.toml:" in problem


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        ("0", True),
        ("20", True),
        ("1000000", True),
        ("-1", False),
        ("1000001", False),
        ("1.5", False),
        ("true", False),
        ('"auto"', False),
    ],
)
def test_how_often_the_set_of_sites_may_change_is_a_whole_number(
    tmp_path: Path, value: str, allowed: bool
) -> None:
    path = written(
        tmp_path / "site.toml", TEXT.replace("min_records = 3", f"set_changes = {value}")
    )
    if allowed:
        assert policies.load(path).permits.set_changes == int(value)
    else:
        with pytest.raises(ContractError, match=r"permits\.set_changes"):
            policies.load(path)
