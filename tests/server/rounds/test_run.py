"""What the operator accepts, from whom, and what it makes of it. No network, no model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import load_file
from safetensors.numpy import save as save_tensors

from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract
from silotune.common.errors import ProtocolError, RunError
from silotune.common.protocol import messages
from silotune.common.protocol.messages import (
    Arrays,
    Describe,
    Description,
    Message,
    Refusal,
    Train,
    Update,
)
from silotune.server.rounds.exchange import drive_round
from silotune.server.rounds.run import FederatedRun, RoundRecord
from silotune.server.storage.run_store import RunStore

RECIPE = Path(__file__).parents[3] / "simulations" / "recipes" / "heart-diagnosis" / "contract.toml"
# age: young, old, missing; smoker: yes, no, missing.
SHAPES = {"head.bias": (2,), "head.weight": (2, 6)}
Start = Callable[..., FederatedRun]


def filled(value: float) -> Arrays:
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def start(tmp_path: Path, table_contract: Contract) -> Start:
    """start(contract=table_contract, **more) -> a fresh run, each in its own folder."""
    count = 0

    def new(contract: Contract = table_contract, **more: Any) -> FederatedRun:
        nonlocal count
        count += 1
        registry = RunStore.create(tmp_path / f"run-{count}", contract)
        return FederatedRun(contract, registry, "run-1", more.pop("initial", filled(0)), **more)

    return new


def update(run: FederatedRun, site: str, arrays: Arrays | float = 1.0, /, **changes: Any) -> bytes:
    """A site's reply to the open round; `changes` replaces header fields."""
    fields: dict[str, Any] = {
        "contract": run.contract.hash,
        "site": site,
        "run": run.run_id,
        "round": run.server_round,
        "attempt": 1,
        "epsilon": 1.0,
        "metrics": {},
        "request": run.digest(changes.get("attempt", 1)),
        "receipt": {"sequence": run.server_round, "head": "0" * 64, "signature": "0" * 128},
    }
    body = filled(arrays) if isinstance(arrays, float) else arrays
    return messages.pack(Message(Update(**(fields | changes)), body))


def description(run: FederatedRun, site: str, **changes: Any) -> Description:
    fields = {"contract": run.contract.hash, "site": site, "signature": "0" * 128}
    return Description(**(fields | changes))


def play(run: FederatedRun, **replies: Arrays | float) -> RoundRecord:
    """One round with these updates."""
    run.begin()
    for site, arrays in replies.items():
        run.accept(site, 10, update(run, site, arrays))
    return run.finish()


def on_disk(run: FederatedRun) -> list[int]:
    return [facts["round"] for facts in run.registry.rounds()]


def events(run: FederatedRun, what: str | None = None) -> list[dict[str, Any]]:
    lines = (run.registry.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return [event for event in found if what in (None, event["event"])]


# Asking


def test_requests_carry_the_adapter_and_nothing_else(start: Start) -> None:
    run = start()
    described = messages.unpack(run.describe())
    assert isinstance(described.header, Describe)
    assert (described.header.contract, described.arrays) == (run.contract.hash, {})
    asked = messages.unpack(run.request("north"))
    assert asked.header == Train(contract=run.contract.hash, run="run-1", round=1)
    assert {n: a.shape for n, a in asked.arrays.items()} == SHAPES
    assert run.request("north") == run.request("south")


def test_identify(start: Start) -> None:
    run = start()

    def described(**changes: Any) -> bytes:
        return messages.pack(Message(description(run, "north", **changes)))

    assert run.identify(described()) == "north"
    refusal = Refusal(contract=run.contract.hash, site="north", code="E201", incident="0" * 16)
    for wire, code in [
        (described(contract="0" * 64), "E503"),
        (b"", "E401"),
        (update(run, "north"), "E503"),
        (messages.pack(Message(refusal)), "E201"),
        (run.describe(), "E503"),
    ]:
        with pytest.raises(ProtocolError) as caught:
            run.identify(wire)
        assert caught.value.code == code


def test_a_node_that_claims_a_sites_name_is_not_that_site(
    start: Start, table_contract: Contract
) -> None:
    """A registered node is some site; which one, only the roster's key can say."""
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw().hex()
    run = start(
        table_contract.changed(sites=[{"name": "north", "public_key": public}, {"name": "south"}])
    )
    asked = messages.unpack(run.describe()).header
    assert isinstance(asked, Describe)
    earlier = messages.unpack(start(run.contract).describe()).header
    assert isinstance(earlier, Describe)

    def described(by: Ed25519PrivateKey, site: str, challenge: str) -> bytes:
        statement = Description.statement(run.contract.hash, site, challenge)
        signature = by.sign(statement).hex()
        return messages.pack(Message(description(run, "north", signature=signature)))

    assert run.identify(described(key, "north", asked.challenge)) == "north"
    for by, site, challenge in (
        (other, "north", asked.challenge),
        (key, "south", asked.challenge),
        (key, "north", earlier.challenge),
    ):
        with pytest.raises(ProtocolError, match="not signed by that site's key"):
            run.identify(described(by, site, challenge))
    assert run.identify(messages.pack(Message(description(run, "south")))) == "south"


def test_a_description_brings_no_arrays(start: Start) -> None:
    run = start()
    header = description(run, "north")
    with pytest.raises(ProtocolError):
        run.identify(messages.pack(Message(header, filled(1.0))))


# Rejecting: each bad reply has its code, and the others' round goes on


def spoilt(value: float) -> Arrays:
    arrays = filled(1.0)
    arrays["head.weight"][1, 2] = value
    return arrays


def float64(run: FederatedRun, site: str) -> bytes:
    header = messages.unpack(update(run, site)).header.model_dump_json()
    arrays = {n: a.astype(np.float64) for n, a in filled(1.0).items()}
    return save_tensors(arrays, metadata={"silotune": header})


def refusal(run: FederatedRun, site: str, code: str = "E210") -> bytes:
    return messages.pack(
        Message(Refusal(contract=run.contract.hash, site=site, code=code, incident="ab" * 8))
    )


BAD: dict[str, tuple[Callable[[FederatedRun, str], bytes], str]] = {
    "nothing": (lambda run, site: b"", "E401"),
    "rubbish": (lambda run, site: b"rubbish" * 9, "E501"),
    "cut": (lambda run, site: update(run, site)[:-1], "E501"),
    "nan": (lambda run, site: update(run, site, spoilt(np.nan)), "E508"),
    "inf": (lambda run, site: update(run, site, spoilt(np.inf)), "E508"),
    "-inf": (lambda run, site: update(run, site, spoilt(-np.inf)), "E508"),
    "float64": (float64, "E502"),
    "no arrays": (lambda run, site: update(run, site, {}), "E502"),
    "one array": (
        lambda run, site: update(run, site, {"head.bias": np.ones(2, np.float32)}),
        "E502",
    ),
    "one more": (
        lambda run, site: update(run, site, filled(1.0) | {"x": np.ones(1, np.float32)}),
        "E502",
    ),
    "other names": (
        lambda run, site: update(run, site, {n + "_": a for n, a in filled(1.0).items()}),
        "E502",
    ),
    "transposed": (
        lambda run, site: update(run, site, {n: a.T for n, a in filled(1.0).items()}),
        "E502",
    ),
    "broadcasts": (
        lambda run, site: update(run, site, {n: a[:1] for n, a in filled(1.0).items()}),
        "E502",
    ),
    "flat": (
        lambda run, site: update(run, site, {n: a.ravel() for n, a in filled(1.0).items()}),
        "E502",
    ),
    "another contract": (lambda run, site: update(run, site, contract="0" * 64), "E503"),
    "another run": (lambda run, site: update(run, site, run="run-2"), "E503"),
    "the next round": (lambda run, site: update(run, site, round=2), "E503"),
    "attempt 2": (lambda run, site: update(run, site, attempt=2), "E503"),
    "another site": (lambda run, site: update(run, "south"), "E503"),
    "a stranger": (lambda run, site: update(run, "west"), "E503"),
    "the request": (lambda run, site: run.request("north"), "E503"),
    "a description": (lambda run, site: messages.pack(Message(description(run, site))), "E503"),
    "refusal": (refusal, "E210"),
    "incident": (lambda run, site: refusal(run, site, "E500"), "E500"),
    "stranger's refusal": (
        lambda run, site: messages.pack(
            Message(Refusal(contract="0" * 64, site=site, code="E210", incident="ab" * 8))
        ),
        "E503",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_reply_does_not_count(start: Start, table_contract: Contract, case: str) -> None:
    make, code = BAD[case]
    run = start(table_contract.changed(quorum=1))
    run.begin()
    run.accept("north", 10, make(run, "north"))
    run.accept("south", 10, update(run, "south", 2.0))
    facts = run.finish()
    assert (facts.sites, dict(facts.failed)) == (("south",), {"north": code})
    assert dict(facts.epsilon) == {"south": 1.0}
    np.testing.assert_array_equal(run.adapter["head.weight"], np.full((2, 6), 2.0))
    assert on_disk(run) == [1]
    (rejected,) = events(run, "rejected")
    assert (rejected["round"], rejected["site"], rejected["code"]) == (1, "north", code)


@pytest.mark.parametrize("case", BAD)
def test_below_the_quorum_nothing_is_committed(start: Start, case: str) -> None:
    make, code = BAD[case]
    run = start()
    run.begin()
    run.accept("north", 10, make(run, "north"))
    run.accept("south", 10, update(run, "south"))
    with pytest.raises(RunError) as caught:
        run.finish()
    if code == "E508":
        assert caught.value.code == "E508"
        assert str(caught.value).startswith(
            "Run stopped at round 1: training diverged: the updates of north have values that are "
            "not finite or beyond 1e+06. Lower head_lr and adapter_lr in the contract's [[phases]]."
        )
    else:
        assert caught.value.code == "E402"
        assert "round 1: 1 of 2 sites counted" in str(caught.value)
        assert f"north: {code}" in str(caught.value)
    assert "No adapter released" in str(caught.value)
    assert on_disk(run) == []
    assert not (run.registry.folder / "adapter.safetensors").exists()
    assert not run.adapter["head.weight"].any()
    assert events(run, "stopped")[0]["failed"] == {"north": code}


def test_a_site_that_diverged_does_not_explain_one_that_is_silent(start: Start) -> None:
    """Lower rates would not bring the silent one back."""
    run = start()
    run.begin()
    run.accept("north", 10, update(run, "north", spoilt(np.nan)))
    with pytest.raises(RunError, match=r"0 of 2 sites counted \(north: E508\)") as caught:
        run.finish()
    assert caught.value.code == "E402"


def test_a_sum_that_leads_out_of_range_has_diverged(start: Start) -> None:
    run = start()
    play(run, north=9e5, south=9e5)
    with pytest.raises(RunError) as caught:
        play(run, north=9e5, south=9e5)
    assert caught.value.code == "E508"
    assert str(caught.value).startswith(
        "Run stopped at round 2: training diverged: The aggregate: 'head.bias' has values beyond "
        "1e+06. Lower head_lr and adapter_lr in the contract's [[phases]]."
    )
    assert on_disk(run) == [1]


def test_silence_is_no_reply(start: Start) -> None:
    run = start()
    run.begin()
    with pytest.raises(RunError, match=r"0 of 2 sites counted \(no reply\)"):
        run.finish()


def test_failing_in_the_last_round_releases_nothing(start: Start) -> None:
    run = start()
    for _ in range(2):
        play(run, north=1.0, south=1.0)
    run.begin()
    run.fail("south", "E402")
    run.accept("north", 10, update(run, "north"))
    with pytest.raises(RunError, match="round 3"):
        run.finish()
    assert on_disk(run) == [1, 2]
    with pytest.raises(RunError, match="did not finish"):
        run.registry.adapter()


def test_an_answer_counts_once(start: Start, table_contract: Contract) -> None:
    run = start(table_contract.changed(quorum=1))
    run.begin()
    run.accept("north", 10, update(run, "north", 1.0))
    run.accept("north", 10, update(run, "north", 5.0))
    facts = run.finish()
    assert (facts.sites, dict(facts.failed)) == (("north",), {})
    np.testing.assert_array_equal(run.adapter["head.bias"], [1.0, 1.0])
    assert [e["code"] for e in events(run, "rejected")] == ["E503"]


def test_answering_twice_is_no_quorum(start: Start) -> None:
    run = start()
    run.begin()
    for _ in range(2):
        run.accept("north", 10, update(run, "north"))
    with pytest.raises(RunError, match="1 of 2"):
        run.finish()


def test_yesterdays_update_is_not_todays(start: Start) -> None:
    run = start()
    run.begin()
    old = update(run, "north")
    run.accept("north", 10, old)
    run.accept("south", 10, update(run, "south"))
    run.finish()
    run.begin()
    run.accept("north", 10, old)
    run.accept("south", 10, update(run, "south"))
    with pytest.raises(RunError, match="north: E503"):
        run.finish()


def test_a_site_outside_the_roster_does_not_count(start: Start) -> None:
    """Its own name is right and its bytes are in order: it is still nobody's site."""
    run = start()
    run.begin()
    run.accept("west", 10, update(run, "west"))
    run.accept("north", 10, update(run, "north"))
    with pytest.raises(RunError) as caught:
        run.finish()
    assert caught.value.code == "E402"
    assert on_disk(run) == []


def test_a_site_counts_or_failed_but_not_both(start: Start) -> None:
    run = start()
    run.begin()
    run.accept("north", 10, b"")
    run.accept("north", 10, update(run, "north"))
    run.accept("south", 10, update(run, "south"))
    try:
        facts = run.finish()
    except RunError:
        return
    assert not set(facts.sites) & set(facts.failed)


def test_updates_that_overflow_together_are_not_committed(
    start: Start, table_contract: Contract
) -> None:
    """Each update is finite, their sum with the velocity is not: an adapter of infinities would
    end the run for every site, and stand on disk as a committed round."""
    run = start(table_contract.changed(quorum=1))
    with np.errstate(all="ignore"):
        try:
            for _ in range(3):
                play(run, north=3e38)
        except RunError:
            pass
    for folder in (run.registry.folder / "rounds").iterdir():
        for array in load_file(folder / "adapter.safetensors").values():
            assert np.isfinite(array).all()


@pytest.mark.parametrize("epsilon", [None, 8.0000001, 8.01, 1e300])
def test_a_reported_epsilon_is_one_the_contract_allows(start: Start, epsilon: float | None) -> None:
    """In a private run every site states what it spent, and never more than the contract's 8."""
    run = start()
    run.begin()
    run.accept("north", 10, update(run, "north", epsilon=epsilon))
    run.accept("south", 10, update(run, "south", epsilon=8.0 * (1 + 5e-10)))
    with pytest.raises(RunError, match="north: E50"):
        run.finish()


# Aggregating


def test_weights_are_the_contracts(start: Start, table_contract: Contract) -> None:
    sites = [{"name": "north", "weight": 1.0}, {"name": "south", "weight": 3.0}]
    run = start(table_contract.changed(sites=sites))
    play(run, north=1.0, south=5.0)
    np.testing.assert_array_equal(run.adapter["head.weight"], np.full((2, 6), 4.0))


def test_the_order_of_replies_changes_no_bit(start: Start, table_contract: Contract) -> None:
    three = table_contract.changed(
        sites=[{"name": n, "weight": w} for n, w in [("north", 0.1), ("south", 0.7), ("west", 3)]]
    )
    rng = np.random.default_rng(0)
    updates = [
        {
            s.name: {n: rng.standard_normal(x).astype(np.float32) for n, x in SHAPES.items()}
            for s in three.sites
        }
        for _ in range(three.rounds)
    ]
    released = []
    for turn in range(3):
        run = start(three)
        for replies in updates:
            names = list(replies)
            play(run, **{n: replies[n] for n in names[turn:] + names[:turn]})
        released.append((run.registry.folder / "adapter.safetensors").read_bytes())
    assert len(set(released)) == 1


def two_phases(contract: Contract, averaging_start: float) -> Contract:
    phase = contract.phases[0].model_dump(mode="json")
    return contract.changed(
        phases=[phase | {"rounds": n, "budget_share": 0.5} for n in (4, 3)],
        aggregation={"server_momentum": 0.9, "averaging_start": averaging_start},
    )


@pytest.mark.parametrize("averaging_start", [0.0, 0.25, 0.5, 0.9])
def test_phases_end_at_their_mean_and_start_at_rest(
    start: Start, table_contract: Contract, averaging_start: float
) -> None:
    """The rule of the contract's docstrings, written out for one number."""
    changes = [1.0, -0.5, 0.25, 2.0, 1.5, -1.0, 0.125]
    x, place, expected = 0.0, 0, []
    for rounds in (4, 3):
        v, later = 0.0, []
        for k in range(1, rounds + 1):
            v = 0.9 * v + changes[place]
            x, place = x + v, place + 1
            later += [x] if k > rounds * averaging_start else []
            expected.append(float(np.mean(later)) if later else x)
        x = expected[-1]
    run = start(two_phases(table_contract, averaging_start))
    for change, value in zip(changes, expected, strict=True):
        play(run, north=change, south=change)
        came_to = run.adapter if run.server_round in (5, 8) else run.released()
        np.testing.assert_allclose(came_to["head.bias"], value, rtol=1e-5)
    assert run.done
    np.testing.assert_allclose(run.registry.adapter()["head.weight"], x, rtol=1e-5)


def test_state_is_committed_with_the_round(start: Start) -> None:
    run = start()
    for change in (1.0, 2.0):
        play(run, north=change, south=change)
    folder = run.registry.folder / "rounds" / "0002"
    state = load_file(folder / "state.safetensors")
    assert state["velocity/head.bias"] == pytest.approx([0.9 + 2.0] * 2)
    assert load_file(folder / "adapter.safetensors")["head.bias"] == pytest.approx([3.9] * 2)
    assert state["mean/head.bias"] == pytest.approx([3.9] * 2)


def test_each_phase_trains_its_own_tensors(start: Start) -> None:
    recipe = contracts.load(RECIPE)
    phases = [p.model_dump(mode="json") | {"rounds": 1} for p in recipe.phases]
    contract = recipe.changed(phases=phases, quorum=1)
    site = contract.sites[0].name
    rng = np.random.default_rng(0)
    shapes = {"head.bias": (2,), "head.weight": (2, 4), "q.lora_A": (3, 4), "q.lora_B": (4, 3)}
    first = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    run = start(contract, initial=first)

    def change(*names: str) -> Arrays:
        return {n: np.ones(shapes[n], np.float32) for n in names}

    head = ("head.bias", "head.weight")
    for trains in (head, (*head, "q.lora_B")):
        run.begin()
        for wrong in (head[:1], shapes, (*head, "q.lora_A"), (*head, "q.lora_B")):
            if set(wrong) != set(trains):
                run.accept(site, 10, update(run, site, change(*wrong)))
        with pytest.raises(RunError, match="E502"):
            run.finish()
        run.begin()
        run.accept(site, 10, update(run, site, change(*trains)))
        run.finish()
        changed = {n for n in shapes if run.adapter[n].tobytes() != first[n].tobytes()}
        assert changed == set(trains)


# Telling


def test_metrics_are_taken_when_due(start: Start, table_contract: Contract) -> None:
    seen: list[tuple[float, bool]] = []

    def evaluate(adapter: Arrays, adapter_active: bool) -> dict[str, float | None]:
        seen.append((float(adapter["head.bias"][0]), adapter_active))
        return {"auc": None, "loss": 0.5}

    told: list[RoundRecord] = []
    run = start(
        two_phases(table_contract, 0.5), evaluate=evaluate, evaluate_every=3, on_round=told.append
    )
    while not run.done:
        play(run, north=1.0, south=1.0)
    assert [f.round for f in told if f.metrics] == [3, 6, 7]
    # Of what would be released then, not of the last iterate: 1 + 1.9 + 2.71 after three rounds.
    assert seen[0][0] == pytest.approx(5.61)
    assert not any(adapter_active for _, adapter_active in seen)
    assert seen[-1][0] == pytest.approx(run.registry.adapter()["head.bias"][0])
    assert [r["metrics"] for r in run.registry.rounds()] == [dict(f.metrics) for f in told]


def test_facts_of_a_round(start: Start, table_contract: Contract) -> None:
    run = start(table_contract.changed(quorum=1))
    run.begin()
    asked = run.request("north")
    reply = update(run, "north")
    run.accept("north", len(asked), reply)
    run.accept("south", len(asked), b"???")
    facts = run.finish()
    assert (facts.round, facts.bytes_up, facts.bytes_down) == (1, len(reply) + 3, 2 * len(asked))
    assert facts.seconds >= 0
    written = json.loads((run.registry.folder / "rounds/0001/round.json").read_text())
    assert written == run.registry.rounds()[0]
    assert (written["sites"], written["failed"]) == (["north"], {"south": "E501"})
    play(run, north=1.0, south=1.0)
    assert run.registry.rounds()[1]["failed"] == {}


def test_events_tell_the_whole_run(start: Start) -> None:
    run = start()
    play(run, north=1.0, south=1.0)
    run.begin()
    run.accept("north", 10, refusal(run, "north"))
    with pytest.raises(RunError):
        run.finish()
    assert [e["event"] for e in events(run)] == ["run", "committed", "rejected", "stopped"]
    assert events(run)[0]["contract"] == run.contract.hash
    assert all(event["at"] > 1e9 for event in events(run))


def test_a_finished_run_has_no_further_round(start: Start) -> None:
    run = start()
    while not run.done:
        play(run, north=1.0, south=1.0)
    assert on_disk(run) == [1, 2, 3]
    with pytest.raises(ValueError, match="round 4 is not in the plan"):
        play(run, north=1.0, south=1.0)
    assert on_disk(run) == [1, 2, 3]


# Receipts


KEYS = {name: Ed25519PrivateKey.generate() for name in ("north", "south")}


@pytest.fixture
def keyed(table_contract: Contract) -> Contract:
    return table_contract.changed(
        sites=[
            {"name": name, "public_key": key.public_key().public_bytes_raw().hex()}
            for name, key in KEYS.items()
        ]
    )


def receipt(site: str, number: int, head: str = "0" * 64, **more: str) -> dict[str, Any]:
    signature = KEYS[site].sign(messages.Receipt.statement(site, number, head)).hex()
    return {"sequence": number, "head": head, "signature": signature} | more


def signed(
    run: FederatedRun, site: str, number: int, head: str = "0" * 64, **changes: Any
) -> bytes:
    unsigned = update(run, site, **{"receipt": receipt(site, number, head), **changes})
    return messages.pack(messages.signed(messages.unpack(unsigned), KEYS[site].sign))


def test_each_site_gets_its_own_newest_receipt_back(start: Start, keyed: Contract) -> None:
    """Also when answers come out of turn, as with two workers on one ledger."""
    run = start(keyed)
    run.begin()
    for site, number in (("north", 7), ("south", 1)):
        run.accept(site, 1, signed(run, site, number))
    run.finish()
    run.begin()
    run.accept("north", 1, signed(run, "north", 5))
    assert not events(run, "rejected")
    asked = {site: messages.unpack(run.request(site)).header for site in KEYS}
    assert (asked["north"].receipt.sequence, asked["south"].receipt.sequence) == (7, 1)
    # Of two for one entry the first stays: a site whose ledger was copied sees that it was.
    run.accept("south", 1, signed(run, "south", 1, receipt=receipt("south", 1, "f" * 64)))
    assert not events(run, "rejected")
    kept = run.gate.last_receipt("south")
    assert kept is not None
    assert kept.head == "0" * 64


def test_a_receipt_is_checked_with_the_rosters_key(start: Start, keyed: Contract) -> None:
    run = start(keyed)
    run.begin()
    for forged in (
        receipt("north", 3, signature="0" * 128),
        receipt("south", 3),
        receipt("north", 3) | {"sequence": 10**9},
    ):
        run.accept("north", 1, signed(run, "north", 3, receipt=forged))
        assert messages.unpack(run.request("north")).header.receipt is None
    assert [e["code"] for e in events(run, "rejected")] == ["E503"] * 3
    for site in KEYS:
        run.accept(site, 1, signed(run, site, 3))
    assert run.finish().sites == ("north", "south")


def test_an_update_that_was_changed_on_its_way_does_not_count(
    start: Start, keyed: Contract
) -> None:
    """By whoever carries it: Flower's node signs no message."""
    run = start(keyed)
    run.begin()
    whole = messages.unpack(signed(run, "north", 3))

    def changed(arrays: Arrays | None = None, **fields: Any) -> bytes:
        header = whole.header.model_copy(update=fields)
        return messages.pack(Message(header, whole.arrays if arrays is None else arrays))

    other = messages.pack(messages.signed(whole, KEYS["south"].sign))
    for forged in (
        changed(filled(1.0000001)),
        changed(epsilon=0.5),
        changed(request="0" * 64),
        changed(receipt=messages.Receipt(**receipt("north", 2))),
        changed(signature="0" * 128),
        changed(signature=receipt("north", 3)["signature"]),
        other,
        update(run, "north", receipt=receipt("north", 3)),
    ):
        run.accept("north", 1, forged)
    assert [e["code"] for e in events(run, "rejected")] == ["E503"] * 8
    assert run.gate.last_receipt("north") is None
    run.accept("north", 1, messages.pack(whole))
    run.accept("south", 1, signed(run, "south", 3))
    assert run.finish().sites == ("north", "south")


def test_an_update_of_another_run_of_the_same_name_does_not_count(
    start: Start, keyed: Contract
) -> None:
    """Its relay could send what the site once answered; it answers another adapter."""
    before = start(keyed)
    before.begin()
    old = signed(before, "north", 3)
    again = start(keyed, initial=filled(1))
    again.begin()
    again.accept("north", 1, old)
    assert [e["code"] for e in events(again, "rejected")] == ["E503"]
    again.accept("north", 1, signed(again, "north", 3))
    assert len(events(again, "rejected")) == 1


def test_a_norm_beyond_the_contracts_does_not_count(start: Start, table_contract: Contract) -> None:
    norm = float(np.sqrt(sum(np.sum(a**2) for a in filled(1.0).values())))
    for factor, counts in ((0.999, False), (1.0, True), (1.001, True)):
        run = start(
            table_contract.changed(quorum=1, aggregation={"max_update_norm": factor * norm})
        )
        run.begin()
        run.accept("north", 1, update(run, "north", 1.0))
        assert [e["code"] for e in events(run, "rejected")] == ([] if counts else ["E502"])


def test_a_lost_reply_is_asked_for_again_where_the_quorum_needs_it(
    start: Start, table_contract: Contract
) -> None:
    """As another attempt: the site's charge stands, and it answers no request twice."""
    for quorum, expected in ((2, [1, 2, 3]), (1, [1])):
        run, attempts = start(table_contract.changed(quorum=quorum)), []
        stages = run.stages(["north", "south"])
        asked = next(stages)
        try:
            while True:
                came = {"north": update(run, "north")} if "north" in asked else {}
                attempt = messages.unpack(asked["south"]).header.attempt
                attempts.append(attempt)
                came["south"] = (
                    refusal(run, "south", "E204")
                    if attempt < 3
                    else update(run, "south", attempt=3)
                )
                asked = stages.send(came)
        except StopIteration as end:
            facts = end.value
        assert attempts == expected
        assert facts.sites == (("north", "south") if quorum == 2 else ("north",))


def test_a_round_for_which_sites_have_no_step_left_can_be_left_out(start: Start) -> None:
    """They would refuse it again and again; the rounds before it are not lost."""
    run = start()
    play(run, north=1.0, south=1.0)
    begun = run.adapter["head.bias"].copy()
    sites = {name: lambda _, name=name: refusal(run, name, "E210") for name in ("north", "south")}
    with pytest.raises(RunError, match=r"north, south will refuse .* \(E210\): with --skip-round"):
        drive_round(run.stages(list(sites)), sites)
    run.skip()
    assert run.server_round == 3
    np.testing.assert_array_equal(run.adapter["head.bias"], begun)
    first = start()
    with pytest.raises(RunError) as error:
        drive_round(first.stages(["north"]), {"north": lambda _: refusal(first, "north", "E210")})
    assert "--skip-round" not in str(error.value)


def test_no_site_is_charged_again_for_a_round_that_cannot_count(
    start: Start, table_contract: Contract
) -> None:
    contract = table_contract.changed(
        sites=[{"name": n} for n in ("north", "south", "east", "west")], quorum=3
    )
    for silent, asked_again in ((("east", "west"), []), (("west",), [["south"]]), ((), [])):
        run = start(contract)
        stages = run.stages(["north", "south", "east", "west"])
        asked = next(stages)
        came = {s: update(run, s) for s in asked if s not in ("south", *silent)}
        again = []
        with contextlib.suppress(RunError, StopIteration):
            again.append(sorted(stages.send(came | {"south": refusal(run, "south", "E204")})))
        assert again == asked_again


def test_an_answer_to_another_attempt_does_not_count(start: Start) -> None:
    run = start()
    run.begin()
    run.accept("north", 1, update(run, "north"), attempt=2)
    run.accept("south", 1, update(run, "south", attempt=2), attempt=2)
    assert [e["site"] for e in events(run, "rejected")] == ["north"]


# Ending early


def early(contract: Contract, patience: int, metric: str = "auc") -> Contract:
    return contract.changed(
        aggregation={"early_stop": {"metric": metric, "patience": patience}},
        phases=[
            {
                "trains": "head",
                "rounds": n,
                "sampling_rate": 0.5,
                "head_lr": 0.5,
                "budget_share": 0.5,
            }
            for n in (3, 6)
        ],
    )


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize(
    ("metric", "scores", "rounds", "best"),
    [
        # The first phase does not count.
        ("auc", [0.9, 0.9, 0.9, 0.6, 0.7, 0.7, 0.7, 0.9, 0.9], 7, 5),
        ("auc", [0.1] * 3 + [0.5, 0.6, 0.7, 0.8, 0.9, 1.0], 9, 9),
        ("auc", [0.1] * 3 + [None, 0.5, None, 0.5, None, 0.5], 9, 5),
        ("loss", [0.1] * 3 + [0.5, 0.4, 0.4, 0.4, 0.3, 0.2], 7, 5),
        ("loss", [0.1] * 3 + [0.4, 0.5, 2.0, 9.0, 0.3, 0.2], 6, 4),
        ("calibration", [0.1] * 3 + [0.5, 0.4, 0.4, 0.4, 0.3, 0.2], 7, 5),
    ],
)
def test_a_run_ends_early_by_public_rows(
    start: Start,
    table_contract: Contract,
    metric: str,
    scores: list[float | None],
    rounds: int,
    best: int,
    killed: bool,
) -> None:
    """At what it had come to at its best; the run's last metrics are of what it releases."""
    contract, seen = early(table_contract, 2, metric), list[Arrays]()

    def evaluate(adapter: Arrays, adapter_active: bool) -> dict[str, float | None]:
        seen.append(adapter)
        return {"loss": 1.0, "auc": 1.0, metric: scores[run.server_round - 1]}

    run = start(contract, evaluate=evaluate)
    while not run.done:
        play(run, north=1.0, south=1.0)
        if killed:
            run.registry.close()
            registry = RunStore.open(run.registry.folder, contract)
            run = FederatedRun(contract, registry, "run-1", filled(0), evaluate=evaluate)
            run.restore()
    assert on_disk(run) == list(range(1, rounds + 1))
    assert [e["round"] for e in events(run, "released")][-1] == rounds
    np.testing.assert_array_equal(run.registry.adapter()["head.bias"], run.adapter["head.bias"])
    released = run.registry.adapter()["head.bias"]
    np.testing.assert_array_equal(released, seen[best - 1]["head.bias"])
    np.testing.assert_array_equal(released, seen[-1]["head.bias"])


def test_ending_early_needs_public_rows(start: Start, table_contract: Contract) -> None:
    with pytest.raises(RunError, match="--test FILE"):
        start(early(table_contract, 2))


def test_a_receipt_that_nobody_can_check_is_not_kept(start: Start) -> None:
    """A stranger that claims a site's name must not spoil its later runs."""
    run = start()
    run.begin()
    run.accept("north", 1, signed(run, "north", 10**9))
    assert not events(run, "rejected")
    assert messages.unpack(run.request("north")).header.receipt is None


def test_receipts_outlive_a_run(keyed: Contract, tmp_path: Path) -> None:
    def begin(number: int, contract: Contract) -> FederatedRun:
        registry = RunStore.create(tmp_path / f"run-{number}", contract, tmp_path / ".receipts")
        run = FederatedRun(contract, registry, "run-1", filled(0))
        run.begin()
        return run

    first = begin(1, keyed)
    first.accept("north", 1, signed(first, "north", 9))
    for number, contract in ((2, keyed), (3, keyed.changed(name="other"))):
        asked = messages.unpack(begin(number, contract).request("north")).header
        assert asked.receipt.sequence == 9


def test_released_metrics_are_those_of_the_contract(start: Start, table_contract: Contract) -> None:
    contract = table_contract.changed(releases=[{"metric": "loss", "share": 0.1}])
    for metrics, counts in (
        ({"loss": 0.5}, True),
        ({}, False),
        ({"loss": 0.5, "accuracy": 1.0}, False),
    ):
        run = start(contract.changed(quorum=1))
        run.begin()
        run.accept("north", 1, update(run, "north", metrics=metrics))
        assert (not events(run, "rejected")) is counts
        if counts:
            run.finish()
            assert run.registry.rounds()[0]["released"] == {"north": {"loss": 0.5}}
