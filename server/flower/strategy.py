"""The Flower Strategy: carries the bytes of server/rounds/run.py to the sites and back.

What Flower's own loop lacks and this one has: a wait for the roster that ends, a quorum, errors
mapped to site names, replies that are validated, rounds that are committed. No weight, count or
metric of a client's claim is read: what stands in the Result was released under the contract.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import ErrorCode as FlowerErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from silotune.common.errors import ErrorCode, PeerError, ProtocolError, UsageError
from silotune.common.protocol.messages import RECORD, WIRE, Arrays
from silotune.server.aggregation.mean import mean_figures
from silotune.server.rounds.arrivals import Arrivals
from silotune.server.rounds.exchange import NoReply, Reply, RoundProtocol
from silotune.server.rounds.run import FederatedRun, RoundRecord

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.2  # between two looks at which nodes are there
DESCRIBE_SECONDS = 20.0  # after which a node that said nothing is asked again
SOON_SECONDS = 10.0  # until a connected node has usually said which site it is
SOONEST, LATEST = 0.05, 3.0  # seconds between two looks for replies; a twentieth of what has passed


class SilotuneStrategy(Strategy):
    """Sums of private updates, round by round, until the contract's plan is done.

    Args:
        run: The run, with its contract, its folder and the adapter that it begins with.
    """

    def __init__(self, run: FederatedRun) -> None:
        self.run = run
        self.nodes: dict[int, str] = {}
        self._asked: dict[str, int] = {}
        self._stages: RoundProtocol[RoundRecord] | None = None  # of the open round
        self._requests: Mapping[str, bytes] = {}
        self._facts: RoundRecord | None = None  # of the round that was committed last

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
        """Give the stage its replies; the last stage commits the round.

        Returns:
            The adapter and the round's metrics after the last stage of a round; before it None.

        Raises:
            RunError: If fewer sites than the quorum count.
        """
        assert self._stages is not None
        came: dict[str, Reply] = {}
        for reply in replies:
            # An error's own source is the SuperLink; only the request it answers names the node.
            site = self.nodes.get(self._node_of(reply))
            if site is not None:
                came.setdefault(site, _wire(reply))
        try:
            self._requests = self._stages.send(came)
        except StopIteration as end:
            self._stages, self._facts = None, end.value
            return array_record(self.run.released()), self._train_metrics(end.value)
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

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Find the roster, then run every round of the contract.

        Args:
            grid: Flower's grid.
            initial_arrays: The adapter that the run begins with, if given: the run has it already.
            num_rounds: The contract's number of rounds, if given.
            timeout: The contract's `deadline_seconds`, if given.
            train_config: Empty, if given: sites train by the contract.
            evaluate_config: Empty, if given: nothing is evaluated at a site.
            evaluate_fn: Is called with the number and the adapter of each round that this call
                carries out, beside what the run itself evaluates.

        Returns:
            The final adapter; for each round of this call the largest ε of a site (`epsilon`), that
            of each (`epsilon.SITE`), the number of `sites` that count and the metrics that the
            contract releases; and the metrics on the operator's public rows. Metrics of an
            evaluation at the sites stay empty.

        Raises:
            UsageError: If an argument says something else than the contract or the run.
            PeerError: If fewer sites than the quorum are there.
            RunError: If a round cannot be completed.
        """
        self._check(initial_arrays, num_rounds, timeout, train_config, evaluate_config)
        self.summary()
        result = Result()
        if not self.run.done:
            self.nodes = self._find_sites(grid)
        while not self.run.done:
            number = self.run.server_round
            arrays, metrics = None, None
            while metrics is None:  # one stage of the round after the other
                requests = self.configure_train(number, ArrayRecord(), ConfigRecord(), grid)
                arrays, metrics = self.aggregate_train(number, self._exchange(grid, list(requests)))
            assert self._facts is not None
            result.train_metrics_clientapp[number] = metrics
            measured = MetricRecord(
                {name: value for name, value in self._facts.metrics.items() if value is not None}
            )
            if evaluate_fn is not None and arrays is not None:
                measured.update(evaluate_fn(number, arrays) or {})
            if measured:
                result.evaluate_metrics_serverapp[number] = measured
        result.arrays = array_record(self.run.released())
        return result

    def _check(
        self,
        initial_arrays: ArrayRecord | None,
        num_rounds: int | None,
        timeout: float | None,
        train_config: ConfigRecord | None,
        evaluate_config: ConfigRecord | None,
    ) -> None:
        """UsageError where an argument of `start` says something else than the contract or run."""
        contract = self.run.contract
        for argument, value, key, own in (
            ("num_rounds", num_rounds, "rounds", contract.rounds),
            ("timeout", timeout, "deadline_seconds", contract.deadline_seconds),
        ):
            if value is not None and value != own:
                raise UsageError(
                    f"{argument} = {value:g}, and the contract has {key} = {own:g}. Leave "
                    f"{argument} out, or change the contract."
                )
        for argument, config in (
            ("train_config", train_config),
            ("evaluate_config", evaluate_config),
        ):
            for name, setting in (config or {}).items():
                raise UsageError(
                    f"{argument} has {name} = {setting!r}, and sites do what contract "
                    f"{contract.name} says and nothing else. Leave {argument} out; the contract "
                    "has its own keys for how a site trains."
                )
        if initial_arrays is not None:
            _check_equal(initial_arrays, self.run.adapter)

    def _train_metrics(self, facts: RoundRecord) -> MetricRecord:
        """What is known of a round: a site's own figures only where the contract has no masks."""
        found = MetricRecord({"sites": len(facts.sites)})
        spent = {site: e for site, e in sorted(facts.epsilon.items()) if e is not None}
        if spent:
            found["epsilon"] = max(spent.values())
            found.update({f"epsilon.{site}": epsilon for site, epsilon in spent.items()})
        contract = self.run.contract
        figures = facts.released.get("")  # the mean of masked figures
        if figures is None and facts.released:
            weights, ranges = contract.weights(), contract.metric_ranges
            figures = mean_figures(facts.released, weights, ranges)
        found.update({str(metric): figure for metric, figure in (figures or {}).items()})
        return found

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
                f"{contract.quorum}. Missing: {found.missing_in_words(ErrorCode.SITE_ABSENT)}.",
                code=ErrorCode.NO_ANSWER,
            )
        self.run.exchange.absent = found.absent(ErrorCode.SITE_ABSENT)
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


def array_record(arrays: Arrays) -> ArrayRecord:
    """The tensors of an adapter as Flower has them, by their names."""
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def _check_equal(given: ArrayRecord, own: Arrays) -> None:
    """UsageError unless the arrays that were given are those of the run."""
    remedy = (
        "A run begins with the arrays that it was made with: leave initial_arrays out, or make "
        "the run with these."
    )
    if set(given) != set(own):
        raise UsageError(
            f"initial_arrays has {', '.join(sorted(given)) or 'no tensors'}, and the run has "
            f"{', '.join(sorted(own))}. {remedy}"
        )
    for name, array in own.items():
        value = given[name].numpy()
        if value.shape != array.shape:
            raise UsageError(
                f"initial_arrays has {name} of shape {value.shape}, and the run has shape "
                f"{array.shape}. {remedy}"
            )
        if not np.array_equal(value, array):
            raise UsageError(
                f"initial_arrays has {name} with other values than the run "
                f"(mean {value.mean():.4g} and {array.mean():.4g}). {remedy}"
            )


def _wire(reply: Message) -> Reply:
    """The bytes in a reply, or the code that says why there are none."""
    if reply.has_error():
        offline = reply.error.code == FlowerErrorCode.NODE_UNAVAILABLE
        return NoReply(ErrorCode.CONNECTION_LOST if offline else ErrorCode.UNEXPECTED)
    try:
        wire = reply.content[RECORD][WIRE]
    except (KeyError, TypeError):
        wire = None
    return wire if isinstance(wire, bytes) else NoReply(ErrorCode.MESSAGE_UNREADABLE)
