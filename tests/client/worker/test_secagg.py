"""Masked runs with real workers in one process: what leaves, what is refused, what is charged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from silotune.client.operations import preflight
from silotune.client.privacy import accountant
from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.site.folder import SiteFolder
from silotune.client.site.policy import permissive_policy
from silotune.client.worker import worker as workers
from silotune.client.worker.secagg import MOST_AGREEMENTS, check_bound
from silotune.client.worker.worker import Worker
from silotune.common.contract.contract import Contract
from silotune.common.errors import ContractError, RefusalError, RunError
from silotune.common.models.factory import build
from silotune.common.protocol import messages, packing
from silotune.common.protocol.messages import (
    Agree,
    Endorse,
    Masked,
    Message,
    Refusal,
    Reveal,
    Share,
    Train,
)
from silotune.common.protocol.messages import Keys as PublicKeys
from silotune.common.secagg import fixed_point
from silotune.server.rounds.exchange import drive_round
from silotune.server.rounds.run import FederatedRun, RoundRecord
from silotune.server.storage.run_store import RunStore
from silotune.simulations.attacks.poisoning import Poison, masking_of

SITES = ("north", "south", "east", "west")
SECURE = {"bound": 4.0}
Answer = Callable[[bytes], bytes]


class Federation:
    """Sites with keys, ledgers that outlive their workers, and seeded noise."""

    def __init__(
        self,
        contract: Contract,
        folder: Path,
        write_rows: Callable[..., Path],
        sites: tuple[str, ...] = SITES,
        **secure: Any,
    ) -> None:
        self.folder = folder
        self.keys = {site: Keys.in_memory() for site in sites}
        self.contract = with_keys(contract, self.keys, **secure)
        self.files = {
            site: write_rows(folder / f"{site}.csv", 60, seed=place)
            for place, site in enumerate(sites)
        }
        self.ledgers = {s: PrivacyLedger.in_memory(s, self.keys[s]) for s in sites}
        self.workers: dict[str, Worker] = {}
        self.permits: dict[str, Any] = {}
        self.poison: Poison | None = None
        for site in sites:
            self.restart(site)

    def forget(self, site: str) -> None:
        """A new ledger for the site, and a worker on it."""
        self.ledgers[site] = PrivacyLedger.in_memory(site, self.keys[site])
        self.restart(site)

    def restart(self, site: str) -> None:
        policy = permissive_policy(self.contract, site, self.files[site], None)
        permits = policy.permits.model_copy(update=self.permits)
        policy = policy.model_copy(update={"permits": permits})
        self.workers[site] = Worker(
            policy,
            self.contract,
            self.ledgers[site],
            insecure_seed=1,
            masking=masking_of(site, self.contract, self.poison),
        )

    def run(self, name: str = "run-1", **changes: Any) -> FederatedRun:
        registry = RunStore.create(self.folder / f"runs-{name}", self.contract)
        arrays = build(self.contract, None).initial_arrays()
        return FederatedRun(self.contract, registry, name, arrays, **changes)

    def handles(self) -> dict[str, Answer]:
        # Looked up at each call: a test may start a worker anew between two stages.
        return {site: lambda wire, s=site: self.workers[s].handle(wire) for site in self.keys}


def with_keys(contract: Contract, keys: dict[str, Keys], **secure: Any) -> Contract:
    return contract.changed(
        sites=[
            {"name": s, "public_key": k.public, "weight": 1.0 + place}
            for place, (s, k) in enumerate(keys.items())
        ],
        quorum=secure.get("threshold", 3),
        secure_aggregation=SECURE | secure,
    )


@pytest.fixture
def federation(
    table_contract: Contract, tmp_path: Path, write_rows: Callable[..., Path]
) -> Federation:
    return Federation(table_contract, tmp_path, write_rows)


def released_contract(contract: Contract) -> Contract:
    return contract.changed(
        releases=[
            {"metric": "loss", "share": 0.1, "bound": 2.0},
            {"metric": "accuracy", "share": 0.1},
        ],
        privacy={"adaptive": {"max_clip_norm": 2.0}},
    )


def play(run: FederatedRun, handles: dict[str, Answer]) -> list[RoundRecord]:
    facts = []
    while not run.done:
        facts.append(drive_round(run.stages(list(handles)), handles))
    return facts


def recorded(handles: dict[str, Answer], seen: list[tuple[str, Message]]) -> dict[str, Answer]:
    """The same, with every reply noted."""

    def answer(site: str, wire: bytes) -> bytes:
        reply = handles[site](wire)
        seen.append((site, messages.unpack(reply)))
        return reply

    return {site: lambda wire, s=site: answer(s, wire) for site in handles}


# What comes of it


@pytest.mark.parametrize("change", [lambda c: c, released_contract])
def test_a_masked_run_gives_the_adapter_of_an_unmasked_one_to_quantisation(
    table_contract: Contract,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    change: Callable[[Contract], Contract],
) -> None:
    masked = Federation(change(table_contract), tmp_path / "masked", write_rows)
    plain = Federation(change(table_contract), tmp_path / "plain", write_rows)
    plain.contract = plain.contract.changed(secure_aggregation=None)
    for site in SITES:
        plain.restart(site)
    runs = masked.run(), plain.run()
    facts = play(runs[0], masked.handles()), play(runs[1], plain.handles())
    # A unit of the ring, half of it a site, over three rounds with momentum 0.9.
    off = 3 * 2.8 * len(SITES) / 2 / packing.factor(masked.contract, 1.0) + 1e-6
    for name, array in runs[1].registry.adapter().items():
        found = runs[0].registry.adapter()[name]
        np.testing.assert_allclose(found, array, rtol=0, atol=off)
        assert np.abs(array).max() > 100 * off  # it trained
    for with_masks, without in zip(*facts, strict=True):
        assert with_masks.sites == without.sites == tuple(sorted(SITES))
        assert with_masks.epsilon == without.epsilon
        assert set(with_masks.released) <= {""}
        for metric, mean in with_masks.released.get("", {}).items():
            weights = masked.contract.weights()
            each = sum(weights[s] * without.released[s][metric] for s in SITES) / 10
            if metric == "unclipped":
                each = mean  # held to [0, 1] at each site first; the clip norm shows it
            assert mean == pytest.approx(each, abs=1e-3)
        assert with_masks.clip_norm == (
            None if without.clip_norm is None else pytest.approx(without.clip_norm, abs=1e-4)
        )


def test_no_update_leaves_in_the_clear(federation: Federation) -> None:
    seen: list[tuple[str, Message]] = []
    play(federation.run(), recorded(federation.handles(), seen))
    kinds = [m.header.kind for _, m in seen]
    rounds = federation.contract.rounds
    assert {k: kinds.count(k) for k in set(kinds)} == {
        "keys": 4,
        "shares": 4,
        "masked": 4 * rounds,
        "revealed": 4 * rounds,
    }
    blobs = [m.blobs["masked"] for _, m in seen if m.header.kind == "masked"]
    assert all(not m.arrays for _, m in seen)
    # Uniform bytes: each masked entry is a fresh element of the ring, whatever the update is.
    words = np.frombuffer(b"".join(blobs), dtype=np.uint8)
    assert len(words) == 3 * 4 * rounds * 14
    assert abs(words.mean() - 127.5) < 5 * 74 / np.sqrt(len(words))


def test_a_run_agrees_on_keys_once_and_makes_each_sum_in_two_stages(
    federation: Federation,
) -> None:
    run, asked = federation.run(), []
    handles = federation.handles()
    while not run.done:
        stages = run.stages(SITES)
        wires = next(stages)
        while True:
            asked.append(messages.unpack(next(iter(wires.values()))).header.kind)
            try:
                wires = stages.send({s: handles[s](w) for s, w in wires.items()})
            except StopIteration:
                break
    assert asked == ["agree", "share", *["train", "reveal"] * federation.contract.rounds]


# Sites that go


def gone_from(handles: dict[str, Answer], site: str, kind: str) -> dict[str, Answer]:
    """The same, but `site` answers nothing readable from its first request of this kind on."""
    gone = False

    def answer(wire: bytes) -> bytes:
        nonlocal gone
        gone = gone or messages.unpack(wire).header.kind == kind
        return b"" if gone else handles[site](wire)

    return handles | {site: answer}


@pytest.mark.parametrize("kind", ["agree", "share", "train", "reveal"])
def test_a_site_that_goes_before_any_stage_leaves_the_sum_of_the_rest(
    federation: Federation, kind: str
) -> None:
    run = federation.run()
    facts = play(run, gone_from(federation.handles(), "west", kind))
    there = tuple(sorted(set(SITES) - {"west"}))
    assert [f.sites for f in facts][1:] == [there] * 2
    assert facts[0].sites == (tuple(sorted(SITES)) if kind == "reveal" else there)
    assert run.done


@pytest.mark.parametrize("kind", ["agree", "share", "train", "reveal"])
def test_a_site_that_misses_one_stage_is_back_in_the_next_round(
    federation: Federation, kind: str
) -> None:
    handles, missed = federation.handles(), []

    def once(wire: bytes) -> bytes:
        if messages.unpack(wire).header.kind == kind and not missed:
            missed.append(kind)
            return b""
        return handles["west"](wire)

    run = federation.run()
    facts = play(run, handles | {"west": once})
    assert [len(f.sites) for f in facts] == [4 if kind == "reveal" else 3, 4, 4]


def test_a_site_that_is_gone_is_asked_for_keys_less_and_less_often(
    table_contract: Contract, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    long = table_contract.changed(
        phases=[{"trains": "head", "rounds": 70, "sampling_rate": 0.5, "head_lr": 0.5}]
    )
    federation = Federation(long, tmp_path, write_rows)
    handles, asked = federation.handles(), []

    def gone(wire: bytes) -> bytes:
        header = messages.unpack(wire).header
        asked.append(getattr(header, "round", 0))
        return b""

    facts = play(federation.run(), handles | {"west": gone})
    assert all(len(f.sites) == 3 for f in facts)
    assert asked == [1, 2, 4, 8, 16, 32, 48, 64]


def test_who_sealed_what_does_not_open_is_left_to_the_logs_and_the_rest_stays(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    handles = federation.handles()

    def spoils(wire: bytes) -> bytes:
        reply = messages.unpack(handles["west"](wire))
        if reply.header.kind != "shares":
            return messages.pack(reply)
        return messages.pack(
            Message(reply.header, blobs=reply.blobs | {"north": bytes(len(reply.blobs["north"]))})
        )

    run = federation.run()
    facts = drive_round(run.stages(SITES), handles | {"west": spoils})
    assert dict(facts.failed) == {"north": "E507"}
    assert "what west sealed for this site does not open" in caplog.text
    assert not federation.ledgers["north"].charges


@pytest.mark.parametrize("size", [0, 1, 10_000])
def test_shares_of_another_length_are_not_passed_on(federation: Federation, size: int) -> None:
    handles = federation.handles()

    def long(wire: bytes) -> bytes:
        reply = messages.unpack(handles["west"](wire))
        blobs = dict.fromkeys(reply.blobs, bytes(size))
        return messages.pack(
            Message(reply.header, blobs=blobs) if reply.header.kind == "shares" else reply
        )

    facts = drive_round(federation.run().stages(SITES), handles | {"west": long})
    assert dict(facts.failed) == {"west": "E504"}
    assert facts.sites == ("east", "north", "south")


def test_an_endorsement_that_is_none_is_not_passed_on_and_its_site_named(
    table_contract: Contract, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    five = (*SITES, "centre")
    federation = Federation(table_contract, tmp_path, write_rows, five, threshold=3)
    handles = gone_from(federation.handles(), "south", "train")

    def signs_nothing(wire: bytes) -> bytes:
        reply = messages.unpack(handles["west"](wire))
        blobs = {"west": bytes(64)} if reply.header.kind == "endorsement" else reply.blobs
        return messages.pack(Message(reply.header, blobs=blobs))

    run = federation.run()
    facts = drive_round(run.stages(five), handles | {"west": signs_nothing})
    assert facts.sites == ("centre", "east", "north", "west")
    events = (run.registry.folder / "events.jsonl").read_text()
    assert [json.loads(e)["site"] for e in events.splitlines() if '"E504"' in e] == ["west"]


@pytest.mark.parametrize("kind", ["agree", "share", "train", "reveal"])
def test_below_the_threshold_the_run_stops_and_nothing_is_released(
    federation: Federation, kind: str
) -> None:
    run = federation.run()
    handles = gone_from(federation.handles(), "west", kind)
    handles = gone_from(handles, "south", kind)
    with pytest.raises(RunError, match="Run stopped at round 1"):
        play(run, handles)
    assert not run.registry.rounds()


def test_a_survivor_that_goes_before_the_endorsements_is_not_needed(
    table_contract: Contract, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    five = (*SITES, "centre")
    federation = Federation(table_contract, tmp_path, write_rows, five, threshold=3)
    handles = gone_from(federation.handles(), "west", "train")
    run = federation.run()
    facts = drive_round(run.stages(five), gone_from(handles, "south", "endorse"))
    assert facts.sites == ("centre", "east", "north", "south")
    handles = gone_from(gone_from(handles, "south", "endorse"), "east", "reveal")
    with pytest.raises(RunError, match="2 sites revealed their shares, 3 must"):
        drive_round(run.stages(five), handles)


def test_a_restarted_site_is_missing_in_its_round_and_back_after_the_next_agreement(
    federation: Federation,
) -> None:
    run, handles = federation.run(), federation.handles()
    facts = [drive_round(run.stages(SITES), handles)]
    federation.restart("west")
    facts.append(drive_round(run.stages(SITES), handles))
    facts.append(drive_round(run.stages(SITES), handles))
    assert [len(f.sites) for f in facts] == [4, 3, 4]
    assert dict(facts[1].failed) == {"west": "E506"}
    charged = [c.round for c in federation.ledgers["west"].charges.values()]
    assert charged == [1, 3], "a request that cannot be masked costs nothing"


def test_a_round_does_not_start_when_too_few_members_have_their_secrets(
    federation: Federation,
) -> None:
    """Its sites would be charged for a sum that never opens."""
    run, handles = federation.run(), federation.handles()

    def silent(site: str) -> Answer:
        def answer(wire: bytes) -> bytes:
            return b"" if messages.unpack(wire).header.kind == "agree" else handles[site](wire)

        return answer

    drive_round(run.stages(SITES), handles)
    for site in ("east", "west"):  # too few are left for a sum of three
        run.masking.has_failed(site, "E506")
    with pytest.raises(RunError, match="0 of 4 sites agreed on keys") as caught:
        drive_round(run.stages(SITES), {site: silent(site) for site in SITES})
    assert caught.value.code == "E402"
    for site in SITES:
        assert [c.round for c in federation.ledgers[site].charges.values()] == [1]


def test_a_site_restarted_before_the_shares_are_revealed_reveals_nothing(
    federation: Federation,
) -> None:
    handles = federation.handles()

    def forgetful(wire: bytes) -> bytes:
        if messages.unpack(wire).header.kind == "reveal":
            federation.restart("west")
        return federation.workers["west"].handle(wire)

    seen: list[tuple[str, Message]] = []
    run = federation.run()
    facts = drive_round(run.stages(SITES), recorded(handles | {"west": forgetful}, seen))
    said = {m.header.kind: m.header for s, m in seen if s == "west"}
    assert isinstance(said["refusal"], Refusal)
    assert said["refusal"].code == "E506"
    assert "west" in facts.sites  # its masked update was there, and the others opened the sum


# A server that cheats


def test_a_site_that_is_asked_from_another_adapter_alone_is_not_laid_open(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a server gives all others an adapter of which it knows the updates (Pasquini et al.)."""
    run, handles = federation.run(), federation.handles()
    # An honest server would see that the update answers something else.
    monkeypatch.setattr(run.gate, "check", lambda message, *_: message.header)

    def elsewhere(wire: bytes) -> bytes:
        asked = messages.unpack(wire)
        if asked.header.kind == "train":
            moved = {name: array + 1 for name, array in asked.arrays.items()}
            wire = messages.pack(Message(asked.header, moved, asked.blobs))
        return handles["west"](wire)

    with pytest.raises(RunError) as caught:
        drive_round(run.stages(SITES), handles | {"west": elsewhere})
    assert caught.value.code == "E505"  # the masks with west did not cancel
    assert not run.registry.rounds()


# What a site refuses


def first_requests(federation: Federation, run: FederatedRun) -> dict[str, bytes]:
    """The first round's training requests, after an honest agreement."""
    stages, handles = run.stages(SITES), federation.handles()
    wires = next(stages)
    for _ in range(2):
        wires = stages.send({s: handles[s](w) for s, w in wires.items()})
    return dict(wires)


def refusal(worker: Worker, wire: bytes) -> str:
    header = messages.unpack(worker.handle(wire)).header
    assert isinstance(header, Refusal), header
    return header.code


def altered(wire: bytes, **changes: Any) -> bytes:
    message = messages.unpack(wire)
    blobs = changes.pop("blobs", message.blobs)
    header = message.header.model_copy(update=changes)
    return messages.pack(Message(header, message.arrays, blobs))


def test_nothing_is_charged_for_a_request_that_cannot_be_masked(federation: Federation) -> None:
    wire = first_requests(federation, federation.run())["north"]
    north = federation.workers["north"]
    blobs = messages.unpack(wire).blobs
    swapped = dict(zip(blobs, reversed(blobs.values()), strict=True))
    for bad, code in (
        (altered(wire, agreement=None), "E506"),
        (altered(wire, agreement="0" * 64), "E506"),
        (altered(wire, run="run-2"), "E504"),
        (altered(wire, blobs={}), "E504"),
        (altered(wire, blobs=swapped), "E507"),
        (altered(wire, blobs=blobs | {"north": b""}), "E504"),
        (altered(wire, blobs={s: b[:-1] for s, b in blobs.items()}), "E507"),
    ):
        assert refusal(north, bad) == code
    assert not federation.ledgers["north"].charges
    assert isinstance(messages.unpack(north.handle(wire)).header, Masked)


def test_the_same_request_gets_the_same_masked_bytes_and_one_charge(
    federation: Federation,
) -> None:
    wire = first_requests(federation, federation.run())["north"]
    north = federation.workers["north"]
    reply = north.handle(wire)
    assert north.handle(wire) == reply
    assert north.handle(altered(wire, blobs={})) == reply
    assert len(federation.ledgers["north"].charges) == 1


def test_another_attempt_at_a_round_is_refused_and_not_charged(federation: Federation) -> None:
    wire = first_requests(federation, federation.run())["north"]
    north = federation.workers["north"]
    north.handle(wire)
    assert refusal(north, altered(wire, attempt=2)) == "E204"
    assert len(federation.ledgers["north"].charges) == 1


def test_after_a_restart_a_known_request_still_gets_its_masked_bytes(
    federation: Federation,
) -> None:
    """It was durable before it left, and without secrets there is nothing to add to it."""
    wire = first_requests(federation, federation.run())["north"]
    reply = federation.workers["north"].handle(wire)
    federation.restart("north")
    assert federation.workers["north"].handle(wire) == reply
    assert refusal(federation.workers["north"], altered(wire, round=2)) == "E506"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 4.0001, -1e30])
def test_an_update_beyond_the_bound_is_held_to_it_and_nobody_else_is_told(
    federation: Federation,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A refusal would say, beside the masks, something of this site's update alone."""
    real = workers.train_round

    def spoilt(*arguments: Any) -> Any:
        change, metrics = real(*arguments)
        change["head.bias"][0] = value
        return change, metrics

    plain = federation.run("plain")
    drive_round(plain.stages(SITES), federation.handles())
    for site in SITES:
        federation.forget(site)
    monkeypatch.setattr(workers, "train_round", spoilt)
    run = federation.run("spoilt")
    facts = drive_round(run.stages(SITES), federation.handles())
    assert facts.sites == tuple(sorted(SITES))
    held = 0.0 if np.isnan(value) else np.copysign(4.0, value)
    assert run.adapter["head.bias"][0] == pytest.approx(held, abs=1e-4)
    np.testing.assert_allclose(run.adapter["head.weight"], plain.adapter["head.weight"], atol=1e-5)
    assert "1 entries of the update were beyond" in caplog.text


def test_requests_of_secure_aggregation_mean_nothing_under_a_plain_contract(
    table_contract: Contract,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    make_worker: Callable[..., Worker],
) -> None:
    worker = make_worker(table_contract, write_rows(tmp_path / "rows.csv", 60))
    ask = Agree(contract=table_contract.hash, run="run-1", round=1, attempt=1)
    assert refusal(worker, messages.pack(Message(ask))) == "E501"
    arrays = build(table_contract, None).initial_arrays()
    train = Train(contract=table_contract.hash, run="run-1", round=1, agreement="0" * 64)
    assert refusal(worker, messages.pack(Message(train, arrays))) == "E202"
    blobs = {"south": b"x"}
    train = Train(contract=table_contract.hash, run="run-1", round=1)
    assert refusal(worker, messages.pack(Message(train, arrays, blobs))) == "E202"
    assert not worker.ledger.charges


def test_asking_for_keys_again_and_again_takes_no_more_memory(federation: Federation) -> None:
    north = federation.workers["north"]
    assert north.masking is not None

    def ask(attempt: int) -> Message:
        request = Agree(contract=federation.contract.hash, run="run-1", round=1, attempt=attempt)
        return messages.unpack(north.handle(messages.pack(Message(request))))

    first = ask(1)
    assert isinstance(first.header, PublicKeys)
    assert ask(1) == first
    for attempt in range(2, 20):
        assert ask(attempt).blobs != first.blobs
    assert len(north.masking._members) == MOST_AGREEMENTS
    assert ask(1).blobs != first.blobs  # forgotten, so new ones: never the same keys twice
    beyond = Agree(contract=federation.contract.hash, run="run-1", round=4, attempt=1)
    assert refusal(north, messages.pack(Message(beyond))) == "E202"


def test_another_runs_keys_do_not_end_a_round_that_was_charged(federation: Federation) -> None:
    """Between the masked updates and the opening of their sum another run asks for keys."""
    run, handles = federation.run("run-1"), federation.handles()

    def disturbed(site: str) -> Answer:
        def answer(wire: bytes) -> bytes:
            if isinstance(messages.unpack(wire).header, Reveal):
                for attempt in range(1, 2 * MOST_AGREEMENTS):
                    ask = Agree(contract=run.contract.hash, run="run-2", round=1, attempt=attempt)
                    assert (
                        messages.unpack(handles[site](messages.pack(Message(ask)))).header.kind
                        == "keys"
                    )
            return handles[site](wire)

        return answer

    facts = drive_round(run.stages(SITES), {site: disturbed(site) for site in SITES})
    assert set(facts.sites) == set(SITES)
    masking = federation.workers["north"].masking
    assert masking is not None
    assert len(masking._members) == MOST_AGREEMENTS


@pytest.mark.parametrize("known", [False, True], ids=["no agreement", "another agreement"])
def test_every_stage_of_an_unknown_agreement_is_refused(
    federation: Federation, known: bool
) -> None:
    """A site that was started again has no secrets, and says so by a code of its own."""
    wire = first_requests(federation, federation.run())["north"]
    federation.workers["north"].handle(wire)
    if not known:
        federation.restart("north")
    north, contract = federation.workers["north"], federation.contract.hash
    survivors = tuple(sorted(SITES))
    other = "0" * 64
    for header in (
        Share(contract=contract, run="run-1", round=1, attempt=10**6),
        Share(contract=contract, run="run-2", round=1, attempt=1),
        Endorse(contract=contract, agreement=other, round=1, survivors=survivors),
        Reveal(contract=contract, agreement=other, round=1, survivors=survivors),
    ):
        assert refusal(north, messages.pack(Message(header))) == "E506", header
    assert refusal(north, altered(wire, agreement=other, round=2)) == "E506"
    assert not federation.ledgers["north"].settled


# What a contract and a policy may say


def test_the_roster_must_have_the_sites_own_key(federation: Federation) -> None:
    policy = permissive_policy(federation.contract, "north", federation.files["north"], None)
    with pytest.raises(RefusalError, match="names another key"):
        Worker(policy, federation.contract, PrivacyLedger.in_memory("north", Keys.in_memory()))
    with pytest.raises(RefusalError, match="not in the contract's roster"):
        Worker(policy, federation.contract, PrivacyLedger.in_memory("north"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sites": 2}, "it needs 3 to 128 sites, not 2"),
        (
            {"threshold": 1},
            "2 × threshold must exceed sites + max_colluding_sites, and 2 × 1 does not exceed 4",
        ),
        ({"threshold": 2}, "2 × 2 does not exceed 4 + 0"),
        ({"threshold": 3, "max_colluding_sites": 2}, "2 × 3 does not exceed 4 + 2"),
        ({"threshold": 4, "max_colluding_sites": 3}, "does not hide one update among at least two"),
        ({"threshold": 5}, "a threshold of 5 is more than the 4 sites"),
        ({"quorum": 2}, "quorum is 2, but 3 sites must answer for a masked sum to open"),
        ({"weights": (1.0, 1.0, 1.0, 10.1)}, "a weight may be at most 10 times another"),
        ({"keys": None}, "needs a public_key of each site's own"),
        ({"keys": "same"}, "needs a public_key of each site's own"),
        ({"bound": 0.0}, "'secure_aggregation.bound'"),
        ({"max_colluding_sites": -1}, "'secure_aggregation.max_colluding_sites'"),
    ],
)
def test_a_contract_that_would_not_hide_an_update_is_none(
    table_contract: Contract, changes: dict[str, Any], says: str
) -> None:
    keys = {s: Keys.in_memory().public for s in SITES[: changes.get("sites", 4)]}
    kind, weights = changes.get("keys", "own"), changes.get("weights", (1.0,) * 4)
    with pytest.raises(ContractError) as caught:
        table_contract.changed(
            sites=[
                {
                    "name": s,
                    "public_key": {"own": k, "same": "0" * 64, None: None}[kind],
                    "weight": w,
                }
                for (s, k), w in zip(keys.items(), weights, strict=False)
            ],
            quorum=changes.get("quorum", min(3, len(keys))),
            secure_aggregation={
                k: v
                for k, v in changes.items()
                if k in ("threshold", "max_colluding_sites", "bound")
            },
        )
    assert any(says in problem for problem in caught.value.problems), caught.value.problems


def test_the_owner_can_ask_for_masks_and_for_more_colluders(federation: Federation) -> None:
    def refusals(contract: Contract, **permits: Any) -> list[str]:
        policy = permissive_policy(contract, "north", federation.files["north"], None)
        narrower = policy.permits.model_copy(update=permits)
        return [str(r) for r in policy.model_copy(update={"permits": narrower}).refusals(contract)]

    plain = federation.contract.changed(secure_aggregation=None)
    assert not refusals(plain)
    assert not refusals(federation.contract, masked_only=True)
    assert "has no [secure_aggregation]" in refusals(plain, masked_only=True)[0]
    two = with_keys(federation.contract, federation.keys, threshold=4, max_colluding_sites=2)
    assert not refusals(two, max_colluding_sites=2)
    assert (
        "max_colluding_sites = 0 is below permits.max_colluding_sites = 1"
        in refusals(federation.contract, max_colluding_sites=1)[0]
    )


def test_a_plan_whose_updates_may_exceed_the_bound_does_not_start(federation: Federation) -> None:
    contract = federation.contract
    plan = accountant.plan(contract, contract.target_of("north"))
    check_bound(contract, plan)
    tight = contract.changed(secure_aggregation={"bound": 0.01})
    for bound in (0.01, 1e5):
        with pytest.raises(RefusalError, match=r"must be between 0.62 and 1.5e\+03"):
            check_bound(contract.changed(secure_aggregation={"bound": bound}), plan)
    check_bound(tight.changed(privacy={"mode": "none"}), plan)
    adam = contract.changed(
        phases=[{**contract.phases[0].model_dump(exclude_none=True), "adam": {"floor": 1e-3}}]
    )
    with pytest.raises(RefusalError, match="must be between"):
        check_bound(adam, plan)
    policy = permissive_policy(tight, "north", federation.files["north"], None)
    with pytest.raises(RefusalError, match="does not fit"):
        Worker(policy, tight, PrivacyLedger.in_memory("north", federation.keys["north"]))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"drift_correction": "scaffold"},
        {"adam": {"floor": 0.05}},
    ],
    ids=["sgd", "control", "adam"],
)
def test_the_bound_must_hold_the_steps_and_eight_deviations_of_their_noise(
    federation: Federation, more: dict[str, Any]
) -> None:
    """The smallest bound, by hand: of the second phase, which moves most."""
    plain = {"trains": "head", "sampling_rate": 0.5, "budget_share": 0.5}
    contract = federation.contract.changed(
        privacy={"clip_norm": 0.5},
        releases=[{"metric": "loss", "share": 0.2}],
        phases=[
            plain | {"rounds": 2, "head_lr": 0.01},
            plain | {"rounds": 3, "local_steps": 4, "head_lr": 0.3} | more,
        ],
    )
    plan = accountant.plan(contract, contract.target_of("north"))
    second = plan[1].noise_multiplier / np.sqrt(0.8) * 0.5 / (50 * 0.5)
    if "adam" in more:
        most = 0.3 * 4 * (1 + 8 * second / 0.05)
    else:
        most = 0.3 * (4 * 0.5 + 8 * 2 * second) * (3 if more else 1)
    too_small = contract.changed(secure_aggregation={"bound": 0.99 * most})
    with pytest.raises(RefusalError, match=f"must be between {most:.2g} and") as caught:
        check_bound(too_small, plan)
    assert caught.value.code == "E205"
    check_bound(contract.changed(secure_aggregation={"bound": 1.01 * most}), plan)


def test_the_bound_must_hold_the_first_and_noisiest_round_of_a_phase_with_noise_decay(
    federation: Federation,
) -> None:
    phase = {"trains": "head", "rounds": 4, "sampling_rate": 0.5, "head_lr": 0.01}
    contract = federation.contract.changed(
        privacy={"clip_norm": 0.5}, phases=[phase | {"noise_decay": 0.5}]
    )
    plan = accountant.plan(contract, contract.target_of("north"))
    first, second = (
        0.01 * (0.5 + 8 * mechanism.noise_multiplier * 0.5 / (50 * 0.5)) for mechanism in plan[:2]
    )
    assert first > 1.1 * second
    for bound in (1.01 * second, 0.99 * first):
        with pytest.raises(RefusalError, match=f"must be between {first:.2g} and"):
            check_bound(contract.changed(secure_aggregation={"bound": bound}), plan)
    check_bound(contract.changed(secure_aggregation={"bound": 1.01 * first}), plan)


def test_an_older_contract_keeps_its_hash(table_contract: Contract) -> None:
    """None is no part of it: a setting that was added changes no contract without it."""
    assert "secure" not in table_contract.model_dump_json(exclude_none=True)


def test_three_bytes_an_entry_and_at_least_sixteen_bits(federation: Federation) -> None:
    contract = federation.contract
    levels = (
        2
        * contract.secure_aggregation.bound
        * packing.factor(  # type: ignore[union-attr]
            contract, contract.weight_share("north")
        )
    )
    assert levels > 2**16
    assert fixed_point.WIDTH == 3


def test_site_check_says_what_the_masks_hide(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(contract: Contract) -> preflight.Check:
        file = tmp_path / "contract.json"
        file.write_text(contract.model_dump_json())
        policy = permissive_policy(contract, "north", federation.files["north"], None)
        monkeypatch.setattr(preflight.policies, "load", lambda path: policy)
        checks = preflight.check(SiteFolder(tmp_path / "site.toml"), file)
        return next(check for check in checks if check.name == "masks")

    found = row(with_keys(federation.contract, federation.keys, max_colluding_sites=1))
    assert (found.state, found.result) == (
        "ok",
        "the server sees sums of at least 3 of 4 sites, also with the help of 1 of them; "
        "3 open one",
    )
    assert row(federation.contract.changed(secure_aggregation={"bound": 0.01})).code == "E205"
    plain = row(federation.contract.changed(secure_aggregation=None))
    assert (plain.state, plain.result) == (
        "warning",
        "none: the server sees each site's update by itself",
    )
