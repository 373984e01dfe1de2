"""Ways to get more out of a site than its owner allows, each tried from end to end on disk."""

from __future__ import annotations

import errno
import math
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.client.privacy.accountant import merged, plan_epsilon
from silotune.client.privacy.budget import Budget, Limit
from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import FILE, PrivacyLedger
from silotune.client.privacy.ledger_entries import Charged
from silotune.client.privacy.reply_store import ReplyStore
from silotune.client.site import policy as policies
from silotune.client.site import signed_policy
from silotune.client.site.folder import SiteFolder
from silotune.client.site.policy import Policy, permissive_policy
from silotune.client.worker import worker as workers
from silotune.client.worker.worker import Worker
from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract
from silotune.common.errors import (
    ContractError,
    DataError,
    RefusalError,
    SilotuneError,
    UsageError,
)
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Message, Receipt, Refusal, Train, Update

Rows = Callable[..., Path]
HEADER = "age,smoker,outcome"


@dataclass
class Home:
    """A site with keys, ledger, 80 rows, and a policy that permits the contract's ε once."""

    folder: Path
    contract: Contract

    @property
    def file(self) -> Path:
        return self.folder / "rows.csv"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def keys(self) -> Keys:
        return Keys.load(self.folder / "keys")

    def ledger(self) -> PrivacyLedger:
        return PrivacyLedger.open(self.state, self.keys)

    def policy(self, contract: Contract | None = None, file: Path | None = None) -> Policy:
        found = permissive_policy(contract or self.contract, "north", file or self.file, None)
        limit = policies.Budgets.Budget(
            epsilon=self.contract.privacy.epsilon, delta=self.contract.privacy.delta
        )
        return found.model_copy(update={"budgets": policies.Budgets(record=limit)})

    def worker(
        self,
        contract: Contract | None = None,
        file: Path | None = None,
        policy: Policy | None = None,
    ) -> Worker:
        """A worker started anew on what is on disk."""
        return Worker(
            policy or self.policy(contract, file), contract or self.contract, self.ledger()
        )

    def charges(self) -> list[Charged]:
        return list(self.ledger().charges.values())

    def spend_all(self) -> None:
        worker = self.worker()
        for number in range(1, self.contract.rounds + 1):
            assert isinstance(header_of(worker, number), Update)

    def spent(self, worker: Worker) -> float:
        ledger = self.ledger()
        budget = Budget(ledger, worker.record_set, "record")
        return budget.spent(self.contract.privacy.delta).epsilon


@pytest.fixture
def home(tmp_path: Path, table_contract: Contract, write_rows: Rows) -> Home:
    found = Home(tmp_path / "site", table_contract)
    PrivacyLedger.create(found.state, Keys.create(found.folder / "keys"), "north")
    write_rows(found.file, 80)
    return found


def wire(
    worker: Worker,
    number: int = 1,
    attempt: int = 1,
    run: str = "r",
    receipt: Receipt | None = None,
) -> bytes:
    header = Train(
        contract=worker.contract.hash, run=run, round=number, attempt=attempt, receipt=receipt
    )
    return messages.pack(Message(header, worker.model.initial_arrays()))


def header_of(worker: Worker, *args: Any, **kwargs: Any) -> Any:
    return messages.unpack(worker.handle(wire(worker, *args, **kwargs))).header


def code(worker: Worker, *args: Any, **kwargs: Any) -> str:
    """The code by which a request is refused; '' if it is answered."""
    header = header_of(worker, *args, **kwargs)
    return header.code if isinstance(header, Refusal) else ""


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()[1:]


def written(path: Path, lines: list[str], header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


# Asking again


def test_restart_replay(home: Home) -> None:
    """A worker started anew gives the same bytes, also when the server adds its receipt."""
    first = home.worker()
    asked = wire(first)
    reply = first.handle(asked)
    receipt = messages.unpack(reply).header.receipt  # type: ignore[union-attr]
    again = home.worker()
    assert again.handle(asked) == reply
    assert again.handle(wire(again, receipt=receipt)) == reply
    assert len(home.charges()) == 1


def test_replay_after_the_budget_is_spent(home: Home) -> None:
    home.spend_all()
    worker = home.worker()
    for number in (1, 2, 3):
        assert code(worker, number) == ""
    assert len(home.charges()) == 3


def test_replay_on_other_records(home: Home, write_rows: Rows) -> None:
    """A round that was answered is not computed anew because the file has changed meanwhile."""
    worker = home.worker()
    reply = worker.handle(asked := wire(worker))
    write_rows(home.file, 80, seed=9)
    assert home.worker().handle(asked) == reply
    assert len(home.charges()) == 1


def test_second_run(home: Home) -> None:
    home.spend_all()
    for worker in (home.worker(), home.worker()):
        assert code(worker, run="r2") == "E210"
        assert code(worker, 1, attempt=2) == "E210"
    assert len(home.charges()) == 3


def test_many_runs_none_of_which_is_finished(home: Home) -> None:
    """Each run asks for its first round alone; together they stop at the same limit."""
    worker = home.worker()
    granted = sum(code(worker, run=f"r{i}") == "" for i in range(12))
    assert 1 <= granted <= 3
    assert home.spent(worker) <= home.contract.privacy.epsilon * (1 + 1e-9)


def test_restart_between_all_rounds(home: Home) -> None:
    answers = [code(home.worker(), number, run=run) for run in "ab" for number in (1, 2, 3)]
    assert answers == ["", "", "", "E210", "E210", "E210"]


def test_another_contract(home: Home) -> None:
    """Other name, other columns, more ε: the records are the same ones."""
    home.spend_all()
    number = home.contract.model_dump(mode="json")["input"]["columns"][:1]
    for other in (
        home.contract.changed(name="other"),
        home.contract.changed(name="other", input={"columns": number}),
        home.contract.changed(privacy={"epsilon": 50.0}),
        home.contract.changed(privacy={"epsilon": 0.5}),
    ):
        with pytest.raises(RefusalError, match="lifetime budget of these records") as refusal:
            home.worker(other)
        assert refusal.value.code == "E210"


# Other files


def renamed(home: Home) -> Path:
    return Path(shutil.copy(home.file, home.folder / "new-study.csv"))


def reordered(home: Home) -> Path:
    rows = [",".join(reversed(line.split(","))) for line in reversed(lines_of(home.file))]
    return written(home.folder / "new.csv", rows, "outcome,smoker,age")


def respelt(home: Home) -> Path:
    rows = [
        f'"{age}.0",{rest}' for age, rest in (line.split(",", 1) for line in lines_of(home.file))
    ]
    path = written(home.folder / "new.csv", rows)
    path.write_bytes(path.read_text().replace("\n", "\r\n").encode("utf-8-sig"))
    return path


def subset(home: Home) -> Path:
    return written(home.folder / "new.csv", lines_of(home.file)[:20])


def one_of_them(home: Home) -> Path:
    """One old record among new ones: it has nothing left, and the file is charged as one."""
    rows = [f"{100 + i // 2},no,{i % 2}" for i in range(30)]
    return written(home.folder / "new.csv", [*rows, lines_of(home.file)[0]])


def duplicated(home: Home) -> Path:
    return written(home.folder / "new.csv", lines_of(home.file) * 2)


def with_a_column(home: Home) -> Path:
    """Every row with another word: no number of a row, but part of what a record is."""
    rows = [f"{line},w{i}" for i, line in enumerate(lines_of(home.file))]
    return written(home.folder / "new.csv", rows, HEADER + ",word")


def numbered(home: Home) -> Path:
    rows = [f"{500 + i},{line}" for i, line in enumerate(lines_of(home.file))]
    return written(home.folder / "new.csv", rows, "number," + HEADER)


def with_a_column_twice(home: Home) -> Path:
    rows = [f"{line},{i}" for i, line in enumerate(lines_of(home.file))]
    return written(home.folder / "new.csv", rows, HEADER + ",AGE")


SAME_COLUMNS = [renamed, reordered, respelt, subset, one_of_them, duplicated, numbered]
OTHER_COLUMNS = [with_a_column, with_a_column_twice]


@pytest.mark.parametrize("dodge", SAME_COLUMNS + OTHER_COLUMNS)
def test_spent_records_in_another_file(home: Home, dodge: Callable[[Home], Path]) -> None:
    home.spend_all()
    worker = home.worker(file=dodge(home))
    assert code(worker, run="new") == "E210"
    assert len(home.charges()) == 3
    # Found record by record, not because nothing could be compared.
    comparable = worker.record_set.basis == home.worker().record_set.basis
    assert comparable == (dodge in SAME_COLUMNS)


def test_records_numbered_anew(home: Home) -> None:
    """Spent with one numbering, brought back with another, or with none."""
    rows = lines_of(home.file)
    for name, start in (("first", 0), ("second", 1000)):
        numbers = [f"{line},{start + i}" for i, line in enumerate(rows)]
        written(home.folder / f"{name}.csv", numbers, HEADER + ",number")
    worker = home.worker(file=home.folder / "first.csv")
    assert [code(worker, number) for number in (1, 2, 3)] == [""] * 3
    for file in (home.folder / "second.csv", home.file):
        again = home.worker(file=file)
        assert again.record_set.id == worker.record_set.id
        assert code(again, run="new") == "E210"


def test_new_records_have_their_own_budget(home: Home) -> None:
    """So that the refusals above are about records, not about the site."""
    home.spend_all()
    fresh = written(home.folder / "new.csv", [f"{100 + i // 2},no,{i % 2}" for i in range(30)])
    worker = home.worker(file=fresh)
    assert worker.record_set.repeated == 0
    assert [code(worker, number, run="new") for number in (1, 2, 3)] == [""] * 3
    assert code(worker, run="newer") == "E210"


def test_relabelled_rows_with_a_key(home: Home) -> None:
    """With a key a corrected row is the same record; what it costs to correct is nothing."""
    rows = [f"p{i},{line}" for i, line in enumerate(lines_of(home.file))]
    file = written(home.folder / "keyed.csv", rows, "patient," + HEADER)
    policy = home.policy(file=file)
    policy = policy.model_copy(
        update={"data": policy.data.model_copy(update={"key": ("patient",)})}
    )
    worker = home.worker(policy=policy)
    for number in (1, 2, 3):
        assert code(worker, number) == ""
    written(file, [f"p{i},{20 + i % 60},yes,1" for i in range(80)], "patient," + HEADER)
    assert code(home.worker(policy=policy), run="new") == "E210"


def test_a_key_named_later(home: Home) -> None:
    """What a key makes of records cannot be compared with before: everything counts."""
    home.spend_all()
    policy = home.policy()
    policy = policy.model_copy(update={"data": policy.data.model_copy(update={"key": ("age",)})})
    assert code(home.worker(policy=policy), run="new") == "E210"


def test_duplicated_records_stop_a_worker_that_wants_them_apart(home: Home) -> None:
    policy = home.policy(file=duplicated(home))
    policy = policy.model_copy(
        update={"data": policy.data.model_copy(update={"duplicate_records": "refuse"})}
    )
    with pytest.raises(DataError) as error:
        home.worker(policy=policy)
    assert error.value.code == "E307"


# The ledger's file


def test_rolled_back_ledger_without_head(home: Home) -> None:
    copy = home.folder / "copy"
    shutil.copytree(home.state, copy)
    home.spend_all()
    shutil.rmtree(home.state)
    copy.rename(home.state)
    with pytest.raises(RefusalError) as refusal:
        home.worker()
    assert refusal.value.code == "E212"


def test_rolled_back_ledger_with_head_and_a_servers_receipt(home: Home) -> None:
    """Ledger and head put back together look whole; the receipt of any reply tells."""
    copy = home.folder.with_name("copy")
    shutil.copytree(home.folder, copy)
    before = home.worker()
    receipts = [header_of(before, number).receipt for number in (1, 2, 3)]
    shutil.rmtree(home.folder)
    copy.rename(home.folder)
    worker = home.worker()
    for receipt in receipts:
        assert code(worker, run="r2", receipt=receipt) == "E211"
    assert home.charges() == []
    # A forged one is not taken for the site's own.
    forged = receipts[0].model_copy(update={"sequence": 1, "head": worker.ledger.receipt().head})
    assert code(worker, run="r2", receipt=forged) == "E503"


def test_rolled_back_ledger_under_a_running_worker(home: Home) -> None:
    copy = home.folder / "copy.sqlite"
    shutil.copy(home.state / FILE, copy)
    worker = home.worker()
    assert code(worker) == ""
    for path in home.state.glob(f"{FILE}*"):
        path.unlink()
    copy.rename(home.state / FILE)
    code(worker, 2)  # whatever it says: it never finds its way back
    with pytest.raises(RefusalError) as refusal:
        home.worker()
    assert refusal.value.code == "E212"


def test_deleted_ledger(home: Home) -> None:
    home.spend_all()
    shutil.rmtree(home.state)
    with pytest.raises(RefusalError, match="already belong to a ledger"):
        PrivacyLedger.create(home.state, home.keys, "north")
    with pytest.raises(RefusalError):
        home.worker()


def test_a_charge_taken_out_under_a_running_worker(home: Home) -> None:
    worker = home.worker()
    assert code(worker) == ""
    database = worker.ledger._database
    database.execute("DELETE FROM entries WHERE sequence >= 3")
    assert code(worker, 2) == "E212"


# Policy and contract


def test_forged_policy(home: Home) -> None:
    config = home.folder / "site.toml"
    text = (
        f'name = "north"\n[data]\nfile = "rows.csv"\n[budgets.record]\nepsilon = 8.0\n'
        f'delta = 1e-4\n[permits]\ncontracts = ["{home.contract.hash}"]\n'
    )
    config.write_text(text)
    site = SiteFolder(config)
    signed_policy.sign(config, home.folder / "keys" / "owner.key", 0)
    policy, ledger, _ = site.open()
    assert policy.limits["record"] == Limit(8.0, 1e-4)
    config.write_text(text.replace("8.0", "80.0"))
    with pytest.raises(RefusalError) as refusal:
        site.open()
    assert refusal.value.code == "E213"
    thief = Keys.create(home.folder / "thief")
    assert thief.folder is not None
    signed_policy.sign(config, thief.folder / "owner.key", 5)
    with pytest.raises(RefusalError) as refusal:
        site.open()
    assert refusal.value.code == "E213"
    assert ledger.policy == home.ledger().policy


POLICY = """name = "north"
[data]
file = "rows.csv"
duplicate_records = "keep"
[budgets.record]
epsilon = 8.0
delta = 1e-4
[permits]
min_records = 1
contracts = ["{contract}"]
"""


def write_policy(home: Home, *changes: tuple[str, str]) -> Path:
    config = home.folder / "site.toml"
    text = POLICY.format(contract=home.contract.hash)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    config.write_text(text)
    return config


def sign_policy(home: Home, *changes: tuple[str, str]) -> Policy:
    """What `silotune site sign` does, in another process than the worker's."""
    config, ledger = write_policy(home, *changes), home.ledger()
    serial = ledger.policy.serial if ledger.policy else 0
    signed_policy.sign(config, home.folder / "keys" / "owner.key", serial)
    return signed_policy.adopt(config, ledger, home.keys.owner)


def test_a_run_goes_on_when_its_owner_signs_a_policy_that_permits_it(home: Home) -> None:
    """As `site join` for another contract does. A run that has not begun waits for a start."""
    worker = home.worker(policy=sign_policy(home))
    assert code(worker) == ""
    newer = sign_policy(
        home,
        ("contracts = [", f'contracts = ["{"0" * 64}", '),
        ("[data]", '[server]\naddress = "other:8443"\nca = "ca.crt"\n[data]'),
    )
    assert [code(worker, 2), code(worker, 3)] == ["", ""]
    assert code(worker, 1, run="r2") == "E213"
    assert len(home.charges()) == 3
    assert code(home.worker(policy=newer), 1, run="r2") == "E210"  # a full second plan


def test_a_narrower_policy_holds_at_once_while_the_worker_runs(home: Home) -> None:
    """'From here on these limits hold' (client/privacy/ledger_entries.py, Adopted)."""
    worker = home.worker()
    reply = worker.handle(wire(worker))
    assert isinstance(messages.unpack(reply).header, Update)
    narrow = sign_policy(home, ("epsilon = 8.0", "epsilon = 1.0"))
    assert [code(worker, 2), code(worker, 1, run="r2")] == ["E210", "E213"]
    assert worker.handle(wire(worker)) == reply  # paid for under the policy of then
    assert len(home.charges()) == 1
    # Started again it obeys the new one, too.
    assert code(home.worker(policy=narrow), 2) == "E210"
    assert len(home.charges()) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([('contracts = ["{contract}"]', "contracts = []")], "E201"),
        ([("[permits]", '[permits]\ntasks = ["regression"]')], "E205"),
        ([("[permits]", "[permits]\nmax_clip_norm = 0.5")], "E205"),
        ([("[permits]", "[permits]\nmasked_only = true")], "E205"),
        ([("[permits]", "[permits]\nmin_sites = 3")], "E205"),
        ([("budgets.record", "budgets.entity")], "E205"),
        ([("delta = 1e-4", "delta = 1e-5")], "E205"),
        ([("min_records = 1", "min_records = 100")], "E304"),
        ([("keep", "refuse")], "E307"),
        ([("epsilon = 8.0", "epsilon = 3.0")], "E210"),
        ([("[permits]", "[run]\nepsilon = 2.0\n[permits]")], "E210"),
        ([('file = "rows.csv"', 'file = "others.csv"')], "E213"),
        ([("[data]", '[data]\nkey = ["age"]')], "E213"),
    ],
)
def test_what_a_later_policy_forbids_stops_a_run_in_progress(
    home: Home, changes: list[tuple[str, str]], expected: str
) -> None:
    worker = home.worker(policy=sign_policy(home))
    assert code(worker) == ""
    sign_policy(
        home, *((old.replace("{contract}", home.contract.hash), new) for old, new in changes)
    )
    assert code(worker, 2) == expected
    assert len(home.charges()) == 1


def test_a_smaller_epsilon_of_a_run_ends_it_whichever_steps_it_has_taken(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    """A run of a quiet and a loud phase: by the exact ε of the steps taken so far the quiet rounds
    would still pass, and which of them come first is the server's choice."""
    quiet = {"trains": "head", "rounds": 2, "sampling_rate": 1.0, "head_lr": 0.1}
    two = home.contract.changed(
        phases=[quiet | {"budget_share": 0.1}, quiet | {"budget_share": 0.9}]
    )
    home = replace(home, contract=two)
    worker = home.worker(policy=sign_policy(home))
    assert code(worker) == ""
    sign_policy(home, ("[permits]", "[run]\nepsilon = 6.0\n[permits]"))
    first = worker.rounds[0]
    assert plan_epsilon([first, first], two.privacy.delta) < 6.0
    assert [code(worker, number) for number in (2, 3)] == ["E210"] * 2
    assert "began with a plan of ε = 8.00 (exact composition" in caplog.text
    assert len(home.charges()) == 1
    # The remedy: the former value.
    sign_policy(home)
    assert [code(worker, number) for number in (2, 3, 4)] == [""] * 3


def test_a_run_in_progress_gains_nothing_by_a_wider_policy(home: Home) -> None:
    worker = home.worker(policy=sign_policy(home))
    assert code(worker) == ""
    wider = home.worker(policy=sign_policy(home, ("epsilon = 8.0", "epsilon = 80.0")))
    assert [code(wider, number, run="r2") for number in (1, 2, 3)] == [""] * 3
    assert code(worker, 2) == "E210"
    assert code(wider, 2) == ""


def test_a_policy_that_is_edited_and_not_signed_changes_nothing_for_a_running_worker(
    home: Home,
) -> None:
    worker = home.worker(policy=sign_policy(home))
    assert code(worker) == ""
    write_policy(home, ("epsilon = 8.0", "epsilon = 1.0"))
    assert code(worker, 2) == ""
    sign_policy(home, ("min_records = 1", "min_records = 2"))  # permits the run; then a wider one
    write_policy(home, ("epsilon = 8.0", "epsilon = 80.0"), ("contracts", "models"))
    assert code(worker, 3) == ""
    assert len(home.charges()) == 3


def test_a_later_policy_whose_text_is_gone_stops_the_run(home: Home) -> None:
    worker = home.worker(policy=sign_policy(home))
    assert code(worker) == ""
    sign_policy(home, ("min_records = 1", "min_records = 2"))
    adopted = home.ledger().policy
    assert adopted is not None
    kept = home.state / "replies" / adopted.policy
    for content in (kept.read_bytes() + b"\n", None):
        kept.unlink()
        if content is not None:
            kept.write_bytes(content)
        assert code(worker, 2) == "E213"


def test_the_same_policy_adopted_again_stops_no_worker(home: Home) -> None:
    config = home.folder / "site.toml"
    config.write_text(
        f'name = "north"\n[data]\nfile = "rows.csv"\n[budgets.record]\nepsilon = 8.0\n'
        f'delta = 1e-4\n[permits]\ncontracts = ["{home.contract.hash}"]\n'
    )
    signed_policy.sign(config, home.folder / "keys" / "owner.key", 0)
    signed_policy.adopt(config, home.ledger(), home.keys.owner)
    worker = home.worker()
    signed_policy.adopt(config, home.ledger(), home.keys.owner)
    assert [code(worker, number) for number in (1, 2, 3)] == [""] * 3


def test_a_contract_with_another_key_for_this_site(home: Home) -> None:
    """Its servers would not know this site's receipts, and so not its rollback."""
    thief = Keys.create(home.folder / "thief")

    def contract(north: str | None, south: str | None = None) -> Contract:
        return home.contract.changed(
            sites=[{"name": "north", "public_key": north}, {"name": "south", "public_key": south}]
        )

    for wrong in (contract(thief.public), contract(thief.public, home.keys.public)):
        with pytest.raises(RefusalError, match="another key for this site") as refusal:
            home.worker(wrong)
        assert refusal.value.code == "E201"
    for right in (contract(None), contract(None, thief.public), contract(home.keys.public)):
        worker = home.worker(right)
    assert code(worker) == ""
    # A ledger in memory has a key of its own, which nobody can know: simulations.
    simulated = contract(thief.public)
    Worker(home.policy(simulated), simulated, PrivacyLedger.in_memory("north"))


@pytest.mark.parametrize("changed", [1.0001e-4, 9e-3])
def test_changed_delta_in_the_contract(home: Home, changed: float) -> None:
    other = home.contract.changed(privacy={"delta": changed})
    for policy, wanted in ((home.policy(), "E201"), (home.policy(other), "E205")):
        with pytest.raises(RefusalError) as refusal:
            home.worker(other, policy=policy)
        assert refusal.value.code == wanted


def test_looser_clip_in_the_contract(home: Home) -> None:
    other = home.contract.changed(privacy={"clip_norm": 1.5})
    policy = home.policy(other)
    narrow = policy.model_copy(
        update={"permits": policy.permits.model_copy(update={"max_clip_norm": 1.0})}
    )
    with pytest.raises(RefusalError, match=r"clip norm 1\.5 is looser") as refusal:
        home.worker(other, policy=narrow)
    assert refusal.value.code == "E205"


@pytest.mark.parametrize("value", [math.nan, -1.0, 0.0, math.inf, -math.inf, 1e9])
@pytest.mark.parametrize("key", ["epsilon", "delta"])
def test_an_epsilon_or_delta_that_means_nothing(home: Home, key: str, value: float) -> None:
    with pytest.raises(ContractError, match=key):
        home.contract.changed(privacy={key: value})
    text = home.contract.model_dump_json().replace(
        '"epsilon":8.0', f'"epsilon":{str(value).replace("inf", "Infinity").replace("nan", "NaN")}'
    )
    with pytest.raises(UsageError):  # Infinity and NaN are no JSON
        contracts.parse(text, "contract.json")


@pytest.mark.parametrize("limit", [Limit(math.nan, 1e-4), Limit(-1.0, 1e-4), Limit(0.0, 1e-4)])
def test_a_limit_that_means_nothing_lets_nothing_pass(home: Home, limit: Limit) -> None:
    """Should such a policy ever come to be, past every check of its file."""
    budget = policies.Budgets.Budget.model_construct(epsilon=limit.epsilon, delta=limit.delta)
    record = policies.Budgets.model_construct(record=budget)
    with pytest.raises(SilotuneError) as error:
        home.worker(policy=home.policy().model_copy(update={"budgets": record}))
    assert error.value.code == "E210"


# Time, crashes, races


@pytest.mark.parametrize("now", [0.0, -1e9, 4e12])
def test_clock_change(home: Home, monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    """No day brings a new budget: the clock is written down and nothing else."""
    home.spend_all()
    spent = home.spent(home.worker())
    monkeypatch.setattr(time, "time", lambda: now)
    worker = home.worker()
    assert code(worker, run="next-century") == "E210"
    assert home.spent(worker) == spent
    fresh = home.worker(file=written(home.folder / "n.csv", ["101,no,0", "101,yes,1", "102,no,1"]))
    assert code(fresh, run="fresh") == ""
    assert home.charges()[-1].at == now


def test_crash_between_charge_and_release(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, computed = home.worker(), []

    def fails(self: ReplyStore, charge: Charged, reply: bytes, own: bytes | None) -> None:
        computed.append(reply)
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(ReplyStore, "release", fails)
        assert code(worker) == "E500"
    assert len(home.charges()) == 1
    for asked in (worker, home.worker()):
        assert code(asked) == "E204"
    assert len(home.charges()) == 1
    restarted = home.worker()
    reply = messages.unpack(restarted.handle(wire(restarted, attempt=2)))
    assert isinstance(reply.header, Update)
    lost = messages.unpack(computed[0])
    assert not np.isin(reply.arrays["head.weight"], lost.arrays["head.weight"]).any()
    assert [charge.attempt for charge in home.charges()] == [1, 2]


@pytest.mark.parametrize("where", ["train_round", "release.update"])
def test_crashes_are_paid_for(home: Home, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A server that knows how to break a round pays for each try: three, then nothing is left."""

    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(f"{workers.__name__}.{where}", fails)
    answers = [code(home.worker(), 1, attempt) for attempt in range(1, 6)]
    assert answers == ["E500"] * 3 + ["E210"] * 2
    assert len(home.charges()) == 3


def test_a_full_disk_lets_nothing_leave(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head or reply cannot be written: the charge stands, and no reply leaves until they can."""

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    worker = home.worker()
    with monkeypatch.context() as patch:
        patch.setattr("silotune.client.privacy.stored_files.write_durably", fails)
        assert code(worker) == "E216"
    assert code(worker) == "E204"
    with monkeypatch.context() as patch:
        patch.setattr("silotune.client.privacy.keys.write_durably", fails)
        assert code(worker, 1, 2) == "E216"
    assert code(worker, 1, 2) == "E204"
    assert len(home.charges()) == 2


def test_a_disk_without_room_for_the_reply_spends_nothing(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked before the charge; once there is room the same request is answered."""
    worker = home.worker()
    free = shutil.disk_usage(home.state)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: free._replace(free=1 << 20))
        assert code(worker) == "E216"
    assert home.charges() == []
    assert code(worker) == ""


def test_two_workers_at_once(home: Home) -> None:
    """Each with a ledger of its own on one folder: what both are granted stays in the limit."""
    contract = home.contract.changed(
        phases=[{"trains": "head", "rounds": 24, "sampling_rate": 0.5, "head_lr": 0.5}]
    )
    limit = Limit(9.5, contract.privacy.delta)
    budget = policies.Budgets.Budget(epsilon=limit.epsilon, delta=limit.delta)
    policy = home.policy(contract).model_copy(update={"budgets": policies.Budgets(record=budget)})
    answers: dict[str, list[str]] = {"a": [], "b": []}
    pair = [home.worker(contract, policy=policy) for _ in answers]
    start = threading.Barrier(2)

    def hammer(worker: Worker, run: str) -> None:
        start.wait()
        for number in range(1, 25):
            answers[run].append(code(worker, number, run=run))

    threads = [
        threading.Thread(target=hammer, args=(worker, run))
        for worker, run in zip(pair, answers, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = [answer for run in answers.values() for answer in run]
    assert len(found) == 48
    assert set(found) == {"", "E210"}
    ledger = home.ledger()
    assert len(ledger.charges) == len(ledger.releases) == found.count("")
    assert len(ledger.entries) == 1 + 2 * len(ledger.charges)
    budget_of_pair = Budget(ledger, pair[0].record_set, "record")
    (past,) = budget_of_pair.pasts()
    assert past.order is not None
    assert past.spent(limit.delta).epsilon <= limit.epsilon * (1 + 1e-9)
    # And they went as far as they could: together through the plan that is theirs.
    plan = pair[0].plan
    assert pair[1].plan == plan
    assert past.left_of(merged(plan)) == ()
    with pytest.raises(RefusalError):
        budget_of_pair.check([past.history[0]], plan, past.order, limit, "one more")


def test_two_workers_of_two_contracts(home: Home) -> None:
    """Started while all was left; the second contract's first round finds out."""
    other = home.contract.changed(name="other")
    one, two = home.worker(), home.worker(other)
    assert [code(one, number) for number in (1, 2, 3)] == [""] * 3
    assert [code(two, number) for number in (1, 2, 3)] == ["E210"] * 3


# What a reply tells besides


def test_the_number_of_a_receipt_does_not_tell_which_records_are_there(home: Home) -> None:
    """Two worlds that differ in one row of the second run's file, with one and the same asking."""
    contract = home.contract.changed(
        phases=[{"trains": "head", "rounds": 12, "sampling_rate": 0.5, "head_lr": 0.5}]
    )
    code(home.worker(contract), 1)
    world = home.folder.with_name("world")
    shutil.copytree(home.folder, world)
    other = Home(world, home.contract)
    written(other.file, [*lines_of(home.file), "101,no,0"])
    one, two = (header_of(where.worker(contract), 2).receipt.sequence for where in (home, other))
    assert one == two
