"""Flower's messages in, the run's rounds out: who is who, who is missing, and when to stop."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from silotune.common.contract.contract import Contract
from silotune.common.errors import PeerError, RunError, UsageError
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Description, Refusal, Train, Update
from silotune.server.flower import strategy as module
from silotune.server.flower.strategy import SilotuneStrategy
from silotune.server.rounds.run import FederatedRun
from silotune.server.storage.run_store import RunStore

SHAPES = {"head.bias": (2,), "head.weight": (2, 6)}
# What a node makes of request bytes: reply bytes, a whole record, a Flower error, or silence.
Node = Callable[[bytes], bytes | RecordDict | Error | None]


class Clock:
    """Time that passes only in `sleep`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeGrid:
    """Nodes in memory. `joins` says after how many looks at the node list a node is there;
    `also` are replies that answer no request."""

    def __init__(self, nodes: dict[int, Node], joins: dict[int, int] | None = None) -> None:
        self.nodes, self.joins = nodes, joins or {}
        self.looks = 0
        self.received: list[tuple[int, bytes]] = []
        self.exchanges = 0
        self._waiting: list[Message] = []
        self.also: list[Message] = []
        self.backwards = False
        self._ids = count(1)

    def get_node_ids(self) -> list[int]:
        self.looks += 1
        return [node for node in self.nodes if self.joins.get(node, 0) < self.looks]

    def push_messages(self, requests: Iterable[Message]) -> list[str]:
        self._waiting = list(self.also)
        self.exchanges += 1
        for request in requests:
            request.metadata.__dict__["_message_id"] = f"m{next(self._ids)}"
            wire = cast(bytes, request.content["silotune"]["wire"])
            node = request.metadata.dst_node_id
            self.received.append((node, wire))
            made = self.nodes[node](wire)
            if isinstance(made, bytes):
                made = RecordDict({"silotune": ConfigRecord({"wire": made})})
            if made is not None:
                reply = Message(made, reply_to=request)
                if isinstance(made, Error):
                    # The SuperLink makes errors, so they come in its name.
                    reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
                self._waiting.append(reply)
        return []

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """What there is at the first look; nothing comes later."""
        replies, self._waiting = self._waiting, []
        return replies[::-1] if self.backwards else replies


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    monkeypatch.setattr(TaskIdentity, "_task_id", 1)
    monkeypatch.setattr(TaskIdentity, "_run_id", 1)
    monkeypatch.setattr(TaskIdentity, "_node_id", SUPERLINK_NODE_ID)
    return found


@pytest.fixture
def start(tmp_path: Path, table_contract: Contract) -> Callable[..., SilotuneStrategy]:
    """start(**changes) -> a strategy on a fresh run of the contract with these changes."""

    def new(**changes: Any) -> SilotuneStrategy:
        contract = table_contract.changed(**{"deadline_seconds": 5.0, **changes})
        registry = RunStore.create(tmp_path / "run", contract)
        zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        return SilotuneStrategy(FederatedRun(contract, registry, "run-1", zeros))

    return new


def site(name: str, value: float = 1.0, **changes: Any) -> Node:
    """An honest site whose update is `value` everywhere; `changes` replaces header fields."""

    def answer(wire: bytes) -> bytes:
        request = messages.unpack(wire)
        fields: dict[str, Any] = {"contract": request.header.contract, "site": name}
        if not isinstance(request.header, Train):
            return messages.pack(messages.Message(Description(**fields, signature="0" * 128)))
        fields |= {
            "run": request.header.run,
            "round": request.header.round,
            "attempt": 1,
            "request": messages.digest(request.header, request.arrays),
            "epsilon": 1.0,
            "metrics": {},
            "receipt": {"sequence": request.header.round, "head": "0" * 64, "signature": "0" * 128},
        }
        arrays = {n: np.full(a.shape, value, np.float32) for n, a in request.arrays.items()}
        return messages.pack(messages.Message(Update(**(fields | changes)), arrays))

    return answer


def only_describes(name: str, then: bytes | RecordDict | Error | None) -> Node:
    """A site that is there, and answers every training request with `then`."""
    honest = site(name)

    def answer(wire: bytes) -> bytes | RecordDict | Error | None:
        training = isinstance(messages.unpack(wire).header, Train)
        return then if training else honest(wire)

    return answer


def always(reply: bytes | RecordDict | Error | None) -> Node:
    return lambda wire: reply


def run_on(strategy: SilotuneStrategy, grid: FakeGrid) -> SilotuneStrategy:
    strategy.start(cast(Grid, grid))
    return strategy


def committed(strategy: SilotuneStrategy) -> list[list[str]]:
    return [facts["sites"] for facts in strategy.run.registry.rounds()]


Begin = Callable[..., SilotuneStrategy]


def test_all_rounds_of_the_contract(start: Begin) -> None:
    grid = FakeGrid({11: site("north", 1.0), 22: site("south", 3.0)})
    strategy = run_on(start(aggregation={"server_momentum": 0.0, "averaging_start": 0.9}), grid)
    assert strategy.run.done
    assert strategy.nodes == {11: "north", 22: "south"}
    assert committed(strategy) == [["north", "south"]] * 3
    np.testing.assert_array_equal(strategy.run.registry.adapter()["head.bias"], [6.0, 6.0])
    assert grid.exchanges == 4  # one description and three rounds


def test_the_result_has_the_adapter_and_the_metrics_of_each_round(start: Begin) -> None:
    strategy = start()
    run, losses = strategy.run, iter([0.5, 0.4, 0.3])
    run._evaluate = lambda adapter, adapter_active: {"loss": next(losses), "auc": None}
    grid = FakeGrid({11: site("north", 1.0, epsilon=0.5), 22: site("south", 3.0, epsilon=0.75)})
    result = strategy.start(
        cast(Grid, grid),
        evaluate_fn=lambda number, arrays: MetricRecord(
            {"number": number, "bias": float(arrays["head.bias"].numpy()[0])}
        ),
    )
    released = run.registry.adapter()
    assert set(result.arrays) == set(released) == set(SHAPES)
    for name, array in released.items():
        np.testing.assert_array_equal(result.arrays[name].numpy(), array)
    assert {n: dict(m) for n, m in result.train_metrics_clientapp.items()} == {
        number: {"sites": 2, "epsilon": 0.75, "epsilon.north": 0.5, "epsilon.south": 0.75}
        for number in (1, 2, 3)
    }
    on_public_rows = result.evaluate_metrics_serverapp
    assert [(n, m["loss"], m["number"]) for n, m in on_public_rows.items()] == [
        (1, 0.5, 1),
        (2, 0.4, 2),
        (3, 0.3, 3),
    ]
    assert on_public_rows[3]["bias"] == released["head.bias"][0]
    assert "auc" not in on_public_rows[1]
    assert result.evaluate_metrics_clientapp == {}


def test_released_metrics_of_the_sites_are_in_the_result(start: Begin) -> None:
    strategy = start(releases=[{"metric": "loss", "share": 0.1}])
    sites = {
        11: site("north", metrics={"loss": 0.25}),
        22: site("south", metrics={"loss": 0.75}),
    }
    result = strategy.start(cast(Grid, FakeGrid(sites)))
    assert [m["loss"] for m in result.train_metrics_clientapp.values()] == [0.5] * 3


def test_the_result_of_a_finished_run_has_its_adapter(start: Begin) -> None:
    strategy = run_on(start(), FakeGrid({11: site("north"), 22: site("south")}))
    result = strategy.start(cast(Grid, FakeGrid({})))
    np.testing.assert_array_equal(
        result.arrays["head.bias"].numpy(), strategy.run.registry.adapter()["head.bias"]
    )
    assert result.train_metrics_clientapp == {}


def arrays(**changed: np.ndarray) -> ArrayRecord:
    own = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    return ArrayRecord({name: Array(value) for name, value in (own | changed).items()})


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"num_rounds": 5}, "num_rounds = 5, and the contract has rounds = 3"),
    ({"timeout": 60.0}, "timeout = 60, and the contract has deadline_seconds = 5"),
    ({"train_config": ConfigRecord({"lr": 0.1})}, "train_config has lr = 0.1, and sites"),
    ({"evaluate_config": ConfigRecord({"k": 1})}, "evaluate_config has k = 1, and sites"),
    (
        {"initial_arrays": ArrayRecord({"w": Array(np.zeros(2))})},
        "initial_arrays has w, and the run has head.bias, head.weight",
    ),
    (
        {"initial_arrays": arrays(**{"head.bias": np.zeros(3)})},
        r"head.bias of shape \(3,\), and the run has shape \(2,\)",
    ),
    (
        {"initial_arrays": arrays(**{"head.bias": np.ones(2)})},
        "head.bias with other values than the run .mean 1 and 0.",
    ),
]


@pytest.mark.parametrize(("given", "said"), CONTRADICTIONS)
def test_an_argument_that_contradicts_the_contract_is_refused(
    start: Begin, given: dict[str, Any], said: str
) -> None:
    grid = FakeGrid({11: site("north"), 22: site("south")})
    with pytest.raises(UsageError, match=said):
        start().start(cast(Grid, grid), **given)
    assert grid.received == []


def test_arguments_that_agree_with_the_contract_are_taken(start: Begin) -> None:
    grid = FakeGrid({11: site("north"), 22: site("south")})
    strategy = start()
    strategy.start(cast(Grid, grid), arrays(), 3, 5.0, ConfigRecord(), ConfigRecord())
    assert strategy.run.done


@pytest.mark.parametrize("silent_for", [1, 2, 3])
def test_each_exchange_has_the_deadline(start: Begin, clock: Clock, silent_for: int) -> None:
    """A round waits for a silent site until the deadline, and no longer."""
    took: list[float] = []

    class Timed(FakeGrid):
        def push_messages(self, requests: Iterable[Message]) -> list[str]:
            took.append(clock.now)
            return super().push_messages(requests)

    silent = {r: r <= silent_for for r in (1, 2, 3)}
    honest = site("south")

    def sometimes(wire: bytes) -> bytes | RecordDict | Error | None:
        header = messages.unpack(wire).header
        return None if isinstance(header, Train) and silent[header.round] else honest(wire)

    run_on(start(quorum=1), Timed({11: site("north"), 22: sometimes}))
    took.append(clock.now)
    rounds = np.diff(took[1:])
    np.testing.assert_allclose(rounds[:silent_for], 5.0)
    assert (rounds[silent_for:] == 0).all()


def test_bytes_pass_unchanged_both_ways(start: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, bytes]] = []
    asked: list[bytes] = []
    taken: list[tuple[str, int, bytes]] = []

    def spying(name: str) -> Node:
        honest = site(name)

        def answer(wire: bytes) -> bytes | RecordDict | Error | None:
            reply = honest(wire)
            if isinstance(messages.unpack(wire).header, Train):
                assert isinstance(reply, bytes)
                sent.append((name, reply))
            return reply

        return answer

    grid = FakeGrid({11: spying("north"), 22: spying("south")})
    strategy = start()
    request, accept = strategy.run.request, strategy.run.accept

    def spy_request(name: str, attempt: int) -> bytes:
        asked.append(request(name, attempt))
        return asked[-1]

    def spy_accept(name: str, size: int, wire: bytes, attempt: int) -> None:
        taken.append((name, size, wire))
        accept(name, size, wire, attempt)

    monkeypatch.setattr(strategy.run, "request", spy_request)
    monkeypatch.setattr(strategy.run, "accept", spy_accept)
    run_on(strategy, grid)
    assert [wire for _, wire in grid.received[2:]] == asked
    assert [(name, wire) for name, _, wire in taken] == sent
    assert {size for _, size, _ in taken} == {len(wire) for wire in asked}


def test_the_order_of_replies_changes_no_bit(start: Begin, tmp_path: Path) -> None:
    first = run_on(start(), FakeGrid({11: site("north", 0.1), 22: site("south", 0.7)}))
    released = (first.run.registry.folder / "adapter.safetensors").read_bytes()
    (tmp_path / "run").rename(tmp_path / "first")
    grid = FakeGrid({22: site("south", 0.7), 11: site("north", 0.1)})
    grid.backwards = True
    second = run_on(start(), grid)
    assert (second.run.registry.folder / "adapter.safetensors").read_bytes() == released


BAD: dict[str, tuple[bytes | RecordDict | Error | None, str]] = {
    "error": (Error(code=0, reason="Traceback: age=63"), "E500"),
    "silence": (None, "E402"),
    "offline": (Error(code=ErrorCode.NODE_UNAVAILABLE), "E404"),
    "empty": (b"", "E401"),
    "no record": (RecordDict({}), "E501"),
    "another record": (RecordDict({"other": ConfigRecord({"wire": b"x"})}), "E501"),
    "another key": (RecordDict({"silotune": ConfigRecord({"loss": 0.5})}), "E501"),
    "text": (RecordDict({"silotune": ConfigRecord({"wire": "text" * 9})}), "E501"),
    "number": (RecordDict({"silotune": ConfigRecord({"wire": 1.5})}), "E501"),
    "arrays": (RecordDict({"silotune": ArrayRecord()}), "E501"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_site_that_fails_is_noted_by_name(start: Begin, case: str) -> None:
    reply, code = BAD[case]
    grid = FakeGrid({11: only_describes("north", reply), 22: site("south")})
    strategy = run_on(start(quorum=1), grid)
    assert committed(strategy) == [["south"]] * 3
    assert [r["failed"] for r in strategy.run.registry.rounds()] == [{"north": code}] * 3
    told = (strategy.run.registry.folder / "events.jsonl").read_text()
    assert "age=63" not in told


@pytest.mark.parametrize("case", BAD)
def test_below_the_quorum_the_run_stops(start: Begin, case: str) -> None:
    reply, code = BAD[case]
    strategy = start()
    with pytest.raises(RunError, match=f"1 of 2 sites counted .north: {code}") as caught:
        run_on(strategy, FakeGrid({11: only_describes("north", reply), 22: site("south")}))
    assert caught.value.code == "E402"
    assert committed(strategy) == []
    assert not (strategy.run.registry.folder / "adapter.safetensors").exists()


def test_a_site_speaks_for_itself_only(start: Begin) -> None:
    """The node that said it is north sends an update in south's name."""
    grid = FakeGrid({11: site("north", 9.0, site="south"), 22: site("south")})
    strategy = run_on(start(quorum=1), grid)
    assert [r["failed"] for r in strategy.run.registry.rounds()] == [{"north": "E503"}] * 3
    assert committed(strategy) == [["south"]] * 3


def test_replies_from_nowhere_are_ignored(start: Begin) -> None:
    strategy = start()
    request = Message(RecordDict({}), 99, "train")
    request.metadata.__dict__["_message_id"] = "never sent"
    stray = [
        Message(RecordDict({"silotune": ConfigRecord({"wire": b"x"})}), reply_to=request),
        Message(Error(code=3, reason="node unavailable"), reply_to=request),
    ]
    grid = FakeGrid({11: site("north"), 22: site("south")})
    grid.also = stray
    run_on(strategy, grid)
    assert committed(strategy) == [["north", "south"]] * 3
    assert [r["failed"] for r in strategy.run.registry.rounds()] == [{}] * 3


def test_a_reply_that_comes_twice_counts_once(start: Begin) -> None:
    class Doubling(FakeGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return [reply for reply in super().pull_messages(message_ids) for _ in range(2)]

    strategy = run_on(start(), Doubling({11: site("north", 1.0), 22: site("south", 3.0)}))
    assert committed(strategy) == [["north", "south"]] * 3
    assert [r["failed"] for r in strategy.run.registry.rounds()] == [{}] * 3


def test_a_late_reply_neither_counts_for_the_next_round_nor_spoils_it(start: Begin) -> None:
    class Late(FakeGrid):
        held: Message | None = None

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            replies = super().pull_messages(message_ids)
            if self.exchanges == 2 and replies:
                self.held = replies.pop(0)
            elif self.held is not None and self.exchanges == 3:
                replies, self.held = [self.held, *replies], None
            return replies

    strategy = run_on(start(quorum=1), Late({11: site("north"), 22: site("south")}))
    assert committed(strategy) == [["south"], ["north", "south"], ["north", "south"]]


# The roster


def test_nodes_outside_the_roster_take_no_part(start: Begin) -> None:
    grid = FakeGrid(
        {
            5: site("west"),
            6: always(b"hello"),
            7: always(None),
            8: always(Error(code=0)),
            9: always(RecordDict({})),
            11: site("north"),
            22: site("south"),
        }
    )
    strategy = run_on(start(), grid)
    assert strategy.nodes == {11: "north", 22: "south"}
    assert {node for node, _ in grid.received[7:]} == {11, 22}


def test_a_site_that_refuses_takes_no_part(start: Begin, caplog: pytest.LogCaptureFixture) -> None:
    strategy = start(quorum=1)
    with caplog.at_level(logging.WARNING):
        run_on(strategy, FakeGrid({11: refusing("north"), 22: site("south")}))
    assert strategy.nodes == {22: "south"}
    assert "E201" in caplog.text


def refusing(name: str, code: str = "E201", contract: str = "") -> Node:
    return lambda wire: messages.pack(
        messages.Message(
            Refusal(
                contract=contract or messages.unpack(wire).header.contract,
                site=name,
                code=code,
                incident="ab" * 8,
            )
        )
    )


def told(strategy: SilotuneStrategy, kind: str) -> list[dict[str, Any]]:
    lines = (strategy.run.registry.folder / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def test_a_missing_site_is_named_at_once_and_until_it_comes(start: Begin, clock: Clock) -> None:
    grid = FakeGrid({11: site("north"), 22: site("south")}, joins={22: 200})
    strategy = run_on(start(deadline_seconds=60.0), grid)
    waiting = told(strategy, "waiting")
    assert [(e["sites"], e["seconds"], e["of"]) for e in waiting] == [
        (["south"], 0, 60),
        (["south"], 15, 60),
        (["south"], 30, 60),
    ]
    assert told(strategy, "absent") == []
    assert committed(strategy) == [["north", "south"]] * 3


def test_nobody_is_named_as_missing_while_connected_nodes_have_yet_to_answer(
    start: Begin, clock: Clock
) -> None:
    class Slow(FakeGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return super().pull_messages(message_ids) if clock.now > 2.0 else []

    strategy = run_on(start(), Slow({11: site("north"), 22: site("south")}))
    assert told(strategy, "waiting") == []
    assert committed(strategy) == [["north", "south"]] * 3


def test_the_code_a_site_answered_is_shown_while_it_is_waited_for_and_after(
    start: Begin, clock: Clock
) -> None:
    """Also of a worker that was started for another contract, whose refusals name that one."""
    strategy = run_on(
        start(quorum=1),
        FakeGrid(
            {
                11: refusing("north", contract="f" * 64),
                22: site("south"),
                33: always(b""),
                44: refusing("nobody of the roster", "E210"),
            }
        ),
    )
    (waiting, *_) = told(strategy, "waiting")
    assert waiting["sites"] == ["north"]
    assert waiting["refused"] == {"north": "E201"}
    assert waiting["nodes"] == {"E210": 1, "E401": 1}
    assert [e["sites"] for e in told(strategy, "absent")] == [{"north": "E201"}]
    assert [r["failed"] for r in strategy.run.registry.rounds()] == [{"north": "E201"}] * 3
    assert committed(strategy) == [["south"]] * 3


def test_below_the_quorum_each_missing_site_has_its_code(start: Begin, clock: Clock) -> None:
    strategy = start(quorum=2, sites=[{"name": n} for n in ("east", "north", "south")])
    with pytest.raises(PeerError) as caught:
        run_on(
            strategy, FakeGrid({11: refusing("north", "E213"), 22: site("south"), 33: always(b"")})
        )
    assert str(caught.value) == (
        "1 of 3 sites answered, the quorum is 2. Missing: east (E403), north (E213); "
        "1 connected node without a name (E401)."
    )


def test_an_absent_site_is_in_the_facts_of_every_round(start: Begin) -> None:
    strategy = run_on(start(quorum=1), FakeGrid({22: site("south")}))
    assert [r["failed"] for r in strategy.run.registry.rounds()] == [{"north": "E403"}] * 3


def test_two_nodes_of_one_name_are_one_site(start: Begin) -> None:
    grid = FakeGrid({11: site("north", 1.0), 12: site("north", 9.0), 22: site("south", 1.0)})
    strategy = run_on(start(aggregation={"server_momentum": 0.0, "averaging_start": 0.9}), grid)
    assert sorted(strategy.nodes.values()) == ["north", "south"]
    np.testing.assert_array_equal(strategy.run.registry.adapter()["head.bias"], [3.0, 3.0])


def test_two_nodes_of_one_name_are_no_quorum(start: Begin, clock: Clock) -> None:
    strategy = start()
    with pytest.raises(PeerError) as caught:
        run_on(strategy, FakeGrid({11: site("north"), 12: site("north")}))
    assert caught.value.code == "E402"
    assert str(caught.value) == ("1 of 2 sites answered, the quorum is 2. Missing: south (E403).")
    assert 5.0 <= clock.now < 6.0


def test_the_wait_for_nobody_ends(start: Begin, clock: Clock) -> None:
    strategy = start()
    with pytest.raises(PeerError, match=r"Missing: north .E403., south .E403."):
        run_on(strategy, FakeGrid({}))
    assert 5.0 <= clock.now < 6.0
    assert committed(strategy) == []


def test_a_site_that_comes_later_is_waited_for(start: Begin, clock: Clock) -> None:
    grid = FakeGrid({11: site("north"), 22: site("south")}, joins={22: 5})
    strategy = run_on(start(quorum=1), grid)
    assert committed(strategy) == [["north", "south"]] * 3
    assert clock.now < 5.0
    # Nodes that have said who they are are not asked again.
    assert [node for node, _ in grid.received[:2]] == [11, 22]


def test_a_quorum_goes_on_after_the_deadline(start: Begin, clock: Clock) -> None:
    strategy = run_on(start(quorum=1), FakeGrid({22: site("south")}))
    assert committed(strategy) == [["south"]] * 3
    assert 5.0 <= clock.now < 6.0


def test_a_site_that_was_not_ready_is_asked_again(start: Begin) -> None:
    """Its node is up before its worker is: an empty reply or an error, then a description."""
    tries = count()
    honest = site("north")
    slow: Node = lambda wire: b"" if next(tries) == 0 else honest(wire)  # noqa: E731
    strategy = run_on(start(), FakeGrid({11: slow, 22: site("south")}))
    assert committed(strategy) == [["north", "south"]] * 3


def test_sites_are_not_asked_to_evaluate(start: Begin) -> None:
    strategy = start()
    grid = cast(Grid, FakeGrid({}))
    assert list(strategy.configure_evaluate(1, ArrayRecord(), ConfigRecord(), grid)) == []
    assert strategy.aggregate_evaluate(1, []) is None
