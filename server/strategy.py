"""The Flower Strategy: carries the bytes of server/rounds.py to the sites and back.

What Flower's own loop lacks and this one has: a wait for the roster that ends, a quorum, errors
mapped to site names, replies that are validated, rounds that are committed. No weight, count or
metric of a client's claim is read.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from silotune.common.errors import PeerError, ProtocolError
from silotune.common.messages import RECORD, WIRE
from silotune.server.replies import BROKEN, Reply, Stages
from silotune.server.rounds import RoundFacts, Run

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.2  # between two looks at which nodes are there
DESCRIBE_SECONDS = 20.0
SOONEST, LATEST = 0.05, 3.0  # seconds between two looks for replies; a twentieth of what has passed


class SilotuneStrategy(Strategy):
    """Sums of private updates, round by round, until the contract's plan is done."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.nodes: dict[int, str] = {}
        self._asked: dict[str, int] = {}
        self._stages: Stages[RoundFacts] | None = None  # of the open round
        self._requests: Mapping[str, bytes] = {}

    def summary(self) -> None:
        """Log what will run."""
        contract = self.run.contract
        log.info(
            "contract %s (%s…), %d rounds, quorum %d of %d",
            contract.name, contract.hash[:12], contract.rounds, contract.quorum,
            len(contract.sites),
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The next stage's message to each node that it asks; training is one stage of a round."""
        if self._stages is None:
            self._stages = self.run.stages(list(self.nodes.values()))
            self._requests = next(self._stages)
        nodes = {site: node for node, site in self.nodes.items()}
        return [self._message(wire, nodes[site]) for site, wire in self._requests.items()]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Give the stage its replies; the round's last one commits it. RunError below the quorum.
        """
        assert self._stages is not None
        came: dict[str, Reply] = {}
        for reply in replies:
            # An error's own source is the SuperLink; only the request it answers names the node.
            site = self.nodes.get(self._node_of(reply))
            if site is not None:
                came.setdefault(site, BROKEN if reply.has_error() else _wire(reply))
        try:
            self._requests = self._stages.send(came)
        except StopIteration:
            self._stages = None
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: what is measured at a site would cost privacy; the operator uses public rows."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        return None

    def start(self, grid: Grid, *_: Any, **__: Any) -> Result:
        """Find the roster, then run every round of the contract. Raises RunError, PeerError."""
        self.summary()
        if self.run.done:
            return Result()
        self.nodes = self._find_sites(grid)
        while not self.run.done:
            requests = self.configure_train(
                self.run.number, ArrayRecord(), ConfigRecord(), grid
            )
            self.aggregate_train(self.run.number, self._exchange(grid, list(requests)))
        return Result()

    def _exchange(
        self, grid: Grid, requests: list[Message], seconds: float = math.inf
    ) -> Iterable[Message]:
        """Send, and collect what comes until the deadline, or for `seconds`. (Flower's own loop
        looks every three seconds, which is most of a short round.)"""
        grid.push_messages(requests)
        # Flower gives a message its id when it sends it.
        self._asked = {m.metadata.message_id: m.metadata.dst_node_id for m in requests}
        waited_for, replies = set(self._asked), list[Message]()
        began, most = time.monotonic(), min(self.run.contract.deadline_seconds, seconds)
        while waited_for:
            came = list(grid.pull_messages(waited_for))
            replies += came
            waited_for -= {reply.metadata.reply_to_message_id for reply in came}
            passed = time.monotonic() - began
            if not waited_for or passed >= most:
                break
            time.sleep(min(max(passed / 20, SOONEST), LATEST, most - passed))
        return replies

    def _node_of(self, reply: Message) -> int:
        return self._asked.get(reply.metadata.reply_to_message_id, -1)

    def _message(self, wire: bytes, node: int) -> Message:
        content = RecordDict({RECORD: ConfigRecord({WIRE: wire})})
        return Message(content, dst_node_id=node, message_type=MessageType.TRAIN)

    def _find_sites(self, grid: Grid) -> dict[int, str]:
        """Ask new nodes who they are until the whole roster is there or the deadline has passed.

        PeerError when fewer than the quorum showed up.
        """
        roster = set(self.run.contract.weights())
        end = time.monotonic() + self.run.contract.deadline_seconds
        found: dict[int, str] = {}
        strangers: set[int] = set()
        while set(found.values()) != roster and time.monotonic() < end:
            new = set(grid.get_node_ids()) - set(found) - strangers
            if not new:
                time.sleep(WAIT_SECONDS)
                continue
            asked = [self._message(self.run.describe(), node) for node in new]
            # Who says nothing is asked again, with those who have come since.
            for reply in self._exchange(grid, asked, DESCRIBE_SECONDS):
                node = self._node_of(reply)
                try:
                    site = "" if reply.has_error() else self.run.identify(_wire(reply))
                except ProtocolError as error:
                    log.warning("a node does not take part yet: %s", error)
                    continue  # its worker may still be starting: it is asked again
                if site in roster and site not in found.values():
                    found[node] = site
                elif site:
                    strangers.add(node)
            if set(found.values()) != roster:
                time.sleep(WAIT_SECONDS)
        if len(found) < self.run.contract.quorum:
            absent = ", ".join(sorted(roster - set(found.values())))
            raise PeerError(
                f"{len(found)} of {len(roster)} sites answered, the quorum is "
                f"{self.run.contract.quorum}. No answer from: {absent}.",
                code="E402",
            )
        return found


def _wire(reply: Message) -> bytes:
    """The bytes in a reply, b'' when they are not where they belong (rejected as unreadable)."""
    try:
        wire = reply.content[RECORD][WIRE]
    except (KeyError, TypeError):
        return b""
    return wire if isinstance(wire, bytes) else b""
