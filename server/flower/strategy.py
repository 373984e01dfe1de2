"""The Flower Strategy: carries the bytes of server/rounds/run.py to the sites and back.

What Flower's own loop lacks and this one has: a wait for the roster that ends, a quorum, errors
mapped to site names, replies that are validated, rounds that are committed. No weight, count or
metric of a client's claim is read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from silotune.common.errors import PeerError, ProtocolError
from silotune.common.protocol.messages import RECORD, WIRE
from silotune.server.rounds import exchange
from silotune.server.rounds.arrivals import Arrivals
from silotune.server.rounds.exchange import Reply, RoundProtocol
from silotune.server.rounds.run import RoundRecord, Run

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.2  # between two looks at which nodes are there
DESCRIBE_SECONDS = 20.0  # after which a node that said nothing is asked again
SOON_SECONDS = 10.0  # until a connected node has usually said which site it is
SOONEST, LATEST = 0.05, 3.0  # seconds between two looks for replies; a twentieth of what has passed


class SilotuneStrategy(Strategy):
    """Sums of private updates, round by round, until the contract's plan is done."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.nodes: dict[int, str] = {}
        self._asked: dict[str, int] = {}
        self._stages: RoundProtocol[RoundRecord] | None = None  # of the open round
        self._requests: Mapping[str, bytes] = {}

    def summary(self) -> None:
        """Log what will run."""
        contract = self.run.contract
        log.info(
            "contract %s (%s…), %d rounds, quorum %d of %d",
            contract.name,
            contract.hash[:12],
            contract.rounds,
            contract.quorum,
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
        """Give the stage its replies; the last stage commits the round. RunError below quorum."""
        assert self._stages is not None
        came: dict[str, Reply] = {}
        for reply in replies:
            # An error's own source is the SuperLink; only the request it answers names the node.
            site = self.nodes.get(self._node_of(reply))
            if site is not None:
                came.setdefault(site, _wire(reply))
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
                self.run.server_round, ArrayRecord(), ConfigRecord(), grid
            )
            self.aggregate_train(self.run.server_round, self._exchange(grid, list(requests)))
        return Result()

    def _exchange(self, grid: Grid, requests: list[Message]) -> Iterable[Message]:
        """Send, and collect what comes until the deadline. (Flower's own loop looks every three
        seconds, which is most of a short round.)"""
        grid.push_messages(requests)
        # Flower gives a message its id when it sends it.
        self._asked = {m.metadata.message_id: m.metadata.dst_node_id for m in requests}
        waited_for, replies = set(self._asked), list[Message]()
        began, most = time.monotonic(), self.run.contract.deadline_seconds
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
        """Ask each node who it is until the whole roster is there or the deadline has passed. An
        event names the missing sites at once, whenever that changes, and every few seconds.

        PeerError when fewer than the quorum showed up.
        """
        contract = self.run.contract
        found, began = Arrivals(contract.weights()), time.monotonic()
        asked: dict[str, int] = {}  # message -> node
        since: dict[int, float] = {}  # node -> when it was asked last, unless it failed since
        while found.missing and (passed := time.monotonic() - began) < contract.deadline_seconds:
            new = [
                self._message(self.run.describe(), node)
                for node in grid.get_node_ids()
                if passed >= since.get(node, -DESCRIBE_SECONDS) + DESCRIBE_SECONDS
            ]
            if new:
                grid.push_messages(new)
                asked |= {m.metadata.message_id: m.metadata.dst_node_id for m in new}
                since |= {m.metadata.dst_node_id: passed for m in new}
            for reply in grid.pull_messages(set(asked)) if asked else ():
                node = asked.pop(reply.metadata.reply_to_message_id, None)
                if node is not None and self._has_said(node, _wire(reply), found):
                    since[node] = contract.deadline_seconds  # is not asked again
                elif node is not None:
                    since.pop(node)  # its worker may still be starting: it is asked again
            if (not asked or passed >= SOON_SECONDS) and (facts := found.to_say(passed)):
                self.run.registry.event(
                    "waiting", **facts, seconds=round(passed), of=round(contract.deadline_seconds)
                )
            if found.missing:
                time.sleep(WAIT_SECONDS)
        if len(found.nodes) < contract.quorum:
            raise PeerError(
                f"{len(found.nodes)} of {len(contract.sites)} sites answered, the quorum is "
                f"{contract.quorum}. Missing: {found.missing_in_words(exchange.ABSENT)}.",
                code="E402",
            )
        self.run.exchange.absent = found.absent(exchange.ABSENT)
        if found.missing:
            self.run.registry.event("absent", sites=self.run.exchange.absent)
        return found.nodes

    def _has_said(self, node: int, reply: Reply, found: Arrivals) -> bool:
        """Whether a node has said which site it is; otherwise the code of its answer is noted."""
        try:
            found.here(node, self.run.identify(reply))
        except ProtocolError as error:
            site, code = self.run.refused(reply) or (None, error.code)
            found.failed(node, site, code)
            log.warning("a node does not take part yet: %s (%s)", error, code)
            return False
        return True


def _wire(reply: Message) -> Reply:
    """The bytes in a reply, or the code that says why there are none."""
    if reply.has_error():
        offline = reply.error.code == ErrorCode.NODE_UNAVAILABLE
        return exchange.OFFLINE if offline else exchange.BROKEN
    try:
        wire = reply.content[RECORD][WIRE]
    except (KeyError, TypeError):
        return "E501"
    return wire if isinstance(wire, bytes) else "E501"
