"""What a masked sum costs: `make bench-secagg` writes results/secagg.json.

Beside it, on the same updates and in turns within one run, Flower's SecAgg+: its client mod and its
server workflow as they are, over a network that is a function call. Both have the complete graph,
the same threshold, and at least 16 bits an entry; every mean is compared with that in the clear.

Counted is all that a site does in a round, from making keys to the reveal, and all that the server
does. This protocol may agree on keys for many rounds, so its figures stand twice: `client` has an
agreement made for this one round, its worst case and what SecAgg+ does; `client-of-30` a thirtieth
of one for thirty. Sites drop after dealing their shares and before their masked update, so the
others' updates do not depend on it: SecAgg+'s, which take minutes, serve the cells with and without
drops. On neither side counted: the wire's encoding, the model on its way to the sites, training.

Seconds are the sum over a side's stages of the median, over repetitions and clients. Bytes are the
contents of all messages that a surviving client sends and gets, SecAgg+'s without names of fields.
Memory: by how many times its float32 update a process grows in which one of ten clients masks.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from subprocess import check_output
from types import SimpleNamespace
from typing import Any, cast

import flwr.common as fl
import flwr.server.workflow.secure_aggregation.secaggplus_workflow as secaggplus
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod.secure_aggregation.secaggplus_mod import secaggplus_mod
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from silotune.common.protocol import messages
from silotune.common.secagg import fixed_point
from silotune.common.secagg.aggregator import SecAggAggregator
from silotune.common.secagg.key_agreement import Agreement, Terms, default_threshold
from silotune.common.secagg.participant import SecAggParticipant
from silotune.simulations.benchmarks import command_line

RESULTS = Path("simulations/benchmarks/results")
SIZES = {100_000: "0.1M", 1_000_000: "1M", 10_000_000: "10M"}
SITES, SPREAD = (3, 10, 50), 30  # SPREAD: rounds of the agreement beside the worst case
OURS, OF_30, RIVAL = "ours", "ours_of_30", "secagg_plus"
BOUND, WEIGHT = 8.0, 1000  # SecAgg+'s own clipping_range and max_weight; all weigh the same
LEVELS = 1 << 16  # of SecAgg+'s quantisation
COLLECT = Stage.COLLECT_MASKED_VECTORS
Seconds = defaultdict[str, list[float]]  # "client/STAGE", of each client; "server/STAGE"
Updates = list[NDArray[np.float32]]  # of all sites


def timed(found: list[float], call: Callable[..., Any], *args: Any) -> Any:
    began = time.perf_counter()
    result = call(*args)
    found.append(time.perf_counter() - began)
    return result


def length(content: object) -> int:
    """Bytes of what a message carries; a number has 8."""
    if isinstance(content, Mapping):
        return length(list(content)) + length(list(content.values()))
    if isinstance(content, list | tuple):
        return sum(map(length, content))
    return len(content) if isinstance(content, bytes | str) else 8


def windows(size: int, sites: int) -> Updates:
    """The sites' updates: views of one array, or fifty of 10M would fill the memory."""
    drawn = np.random.default_rng(0).standard_normal(size + 997 * sites, dtype=np.float32)
    return [drawn[997 * at : 997 * at + size] for at in range(sites)]


def error(mean: NDArray[Any], updates: Updates, allowed: float) -> float:
    """The largest error of these updates' mean: the time of a wrong sum is worth nothing."""
    right: Any = sum(update.astype(float) for update in updates)
    found = float(np.abs(mean - right / len(updates)).max())
    if not found <= 1.01 * allowed + 1e-6:  # float32 is not exact either
        raise ValueError(f"the mean is off by {found}, rounding gives {allowed} at most")
    return found


class Ours:
    """This protocol's sites and server, stage by stage; made with an agreement on keys."""

    def __init__(self, sites: int, rounds: int, seconds: Seconds) -> None:
        keys = {f"site-{i:02d}": Ed25519PrivateKey.generate() for i in range(sites)}
        roster = {name: key.public_key().public_bytes_raw().hex() for name, key in keys.items()}
        terms = Terms("0" * 64, roster, "bench", 1, 1, rounds, default_threshold(sites))
        spent = seconds["client/keys"]
        self.members = {
            n: timed(spent, SecAggParticipant, terms, n, key.sign) for n, key in keys.items()
        }
        public, members = {n: m.keys for n, m in self.members.items()}, self.members.items()
        sealed = {n: timed(seconds["client/shares"], m.shares, public) for n, m in members}
        for name, member in members:
            got = {other: sealed[other][name] for other in sealed if other != name}
            timed(seconds["client/receive"], member.receive, got)
        self.agreement = timed(seconds["server/agreement"], Agreement, terms, public)
        # The terms are counted whole, though their roster is in the contract that the sites have.
        self.bytes = length([vars(terms), public[name], public, sealed[name], got])

    def round(self, updates: Updates, dropped: int, seconds: Seconds) -> tuple[NDArray[Any], int]:
        """The mean without the first `dropped` sites; the round's bytes of one of the others."""
        sites, alive = len(self.members), list(self.members)[dropped:]
        factor, adding = fixed_point.factor(BOUND, 1 / sites, sites), list[float]()
        # Masks depend on a digest of what was asked: a model as large as the update.
        asked = messages.Train(contract="0" * 64, run="bench", round=1), {"model": updates[0]}
        digest = bytes.fromhex(timed(adding, messages.digest, *asked))
        total = timed(adding, SecAggAggregator, self.agreement, 1, len(updates[0]), digest)
        for at, name in enumerate(alive, start=dropped):
            timed(seconds["client/digest"], messages.digest, *asked)
            what = 1, updates[at], factor, BOUND, digest
            masked = timed(seconds["client/mask"], self.members[name].mask, *what)
            timed(adding, total.add, name, masked)
        seconds["server/add"].append(sum(adding))
        m, named = self.members, alive if dropped else []
        signed = {n: timed(seconds["client/endorse"], m[n].endorse, 1, alive) for n in named}
        reveals = {n: timed(seconds["client/reveal"], m[n].reveal, 1, alive, signed) for n in alive}
        one = fixed_point.factor(BOUND, len(alive) / sites, sites)
        mean = timed(seconds["server/open"], total.open, reveals, one)
        return mean, length([masked, signed.get(name, b""), reveals[name], alive, named, signed])


class Network:
    """Flower's grid with the clients in this process: its time is theirs, not the server's. Their
    stages start from a copy of what the last one left, so that they can be repeated."""

    def __init__(self, sites: int) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # a message asks
        self.ids: list[int] = np.random.default_rng(0).integers(1 << 62, size=sites).tolist()
        self.seconds, self.away, self.dropped = Seconds(list), 0.0, set[int]()
        self.bytes = defaultdict[str, list[int]](list)  # by stage, of each client that answered
        self.updates: Updates = []
        self.kept = dict[tuple[str, int], tuple[Message, float]]()  # replies, and what they took
        self._contexts: dict[tuple[str, int], Context] = {}

    def send_and_receive(self, messages: Iterable[Message], **_: object) -> list[Message]:
        began, replies = time.perf_counter(), []
        for message in messages:
            node, record = message.metadata.dst_node_id, message.content[RECORD_KEY_CONFIGS]
            # A copy, as from a wire: the mod takes fields out of a record that clients share.
            asked = ConfigRecord(cast(Any, dict(record)))
            at, received = (str(asked[Key.STAGE]), node), length(list(asked.values()))
            if at[0] == COLLECT and node in self.dropped:
                continue
            if at[0] != COLLECT or at not in self.kept:
                arguments, spent = self.prepare(node, asked), list[float]()
                self.kept[at] = timed(spent, secaggplus_mod, *arguments), spent[0]
                self._contexts[at] = arguments[1]
            reply, took = self.kept[at]
            self.seconds[f"client/{at[0]}"].append(took)
            sent = cast(ConfigRecord, reply.content[RECORD_KEY_CONFIGS]).values()
            self.bytes[at[0]].append(received + length(list(sent)))
            replies.append(reply)
        self.away += time.perf_counter() - began
        return replies

    def prepare(self, node: int, asked: ConfigRecord) -> tuple[Message, Context, Any]:
        """The mod's arguments; the trained update is there already, so call_next takes no time."""
        stages, stage, result = Stage.all(), str(asked[Key.STAGE]), RecordDict()
        left = self._contexts.get((stages[stages.index(stage) - 1], node))
        request = Message(RecordDict({RECORD_KEY_CONFIGS: asked}), node, "train")
        if stage == COLLECT:
            update = fl.ndarrays_to_parameters([self.updates[self.ids.index(node)]])
            fitted = fl.FitRes(fl.Status(fl.Code.OK, ""), update, WEIGHT, {})
            result = fitres_to_recorddict(fitted, keep_input=False)
        trained = Message(result, reply_to=request)
        context = copy.deepcopy(left) or Context(1, node, {}, RecordDict(), {})
        return request, context, lambda _message, _context: trained


class SecAggPlus:
    """Flower's workflow, with keys agreed; and its strategy, which takes the mean as it is."""

    def __init__(self, sites: int, seconds: Seconds) -> None:
        self.network, self.state = Network(sites), secaggplus.WorkflowState()
        self._workflow = secaggplus.SecAggPlusWorkflow(  # as fractions: 3 of 3 it takes as 1.0 only
            1.0, default_threshold(sites) / sites, clipping_range=BOUND, quantization_range=LEVELS
        )
        state: Any = {"config": ConfigRecord({"current_round": 1}), "parameters": ArrayRecord()}
        manager, state = SimpleNamespace(num_available=lambda: sites), RecordDict(state)
        self._context = SimpleNamespace(state=state, strategy=self, client_manager=manager)
        self.bytes = self._stages(self.state, seconds, Stage.SETUP, Stage.SHARE_KEYS)

    def round(self, updates: Updates, dropped: int, seconds: Seconds) -> tuple[NDArray[Any], int]:
        if self.network.updates is not updates:
            self.network.updates, self.network.kept = updates, {}
        self.network.dropped = set(self.network.ids[:dropped])
        moved = self._stages(copy.deepcopy(self.state), seconds, COLLECT, Stage.UNMASK)
        return fl.parameters_to_ndarrays(self._mean)[0], moved

    def _stages(self, state: secaggplus.WorkflowState, seconds: Seconds, *names: str) -> int:
        self.network.seconds = seconds
        self.network.bytes.clear()
        for name in names:
            stage, away = getattr(self._workflow, f"{name}_stage"), self.network.away
            spent = seconds[f"server/{name}"]
            if not timed(spent, stage, self.network, self._context, state):
                raise ValueError(f"SecAgg+ gave up at its stage {name}")
            spent[-1] -= self.network.away - away
        return sum(int(np.median(found)) for found in self.network.bytes.values())

    def configure_fit(self, *_: object) -> list[tuple[Any, fl.FitIns]]:
        ins = fl.FitIns(fl.Parameters([], ""), {})
        return [(SimpleNamespace(node_id=node), ins) for node in self.network.ids]

    def aggregate_fit(self, _round: int, results: Any, _failures: Any) -> tuple[None, None]:
        self._mean: fl.Parameters = results[0][1].parameters
        return None, None


def measure_peak(side: str, size: int) -> float:
    """By how many times the update's bytes this process grows while one of ten clients masks."""
    updates, call, arguments = windows(size, 10), cast(Any, secaggplus_mod), cast(Any, ())
    if side == OURS:
        call = Ours(10, 1, Seconds(list)).members["site-00"].mask
        arguments = 1, updates[0], fixed_point.factor(BOUND, 0.1, 10), BOUND, bytes(32)
    else:
        flower = SecAggPlus(10, Seconds(list))
        flower.network.updates, node = updates, flower.network.ids[0]
        arguments = flower.network.prepare(
            node,
            ConfigRecord(
                {
                    Key.STAGE: COLLECT,
                    Key.CIPHERTEXT_LIST: flower.state.forward_ciphertexts[node],
                    Key.SOURCE_LIST: flower.state.forward_srcs[node],
                }
            ),
        )
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    call(*arguments)
    high = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return (int(high) * 1024 - before) / (4 * size)


def keystream() -> float:
    """Seconds of a client's limit at 1M-10: ten masks of ChaCha20, added to one vector."""
    total, zeros, buffer = np.zeros((100, 10_000), "<u4"), bytes(40_000), bytearray(40_000)
    words, began = np.frombuffer(buffer, "<u4"), time.perf_counter()
    for key in range(10):
        stream = Cipher(ChaCha20(bytes([key] * 32), bytes(16)), mode=None).encryptor()
        for at in range(len(total)):
            stream.update_into(zeros, buffer)
            total[at] += words
    return time.perf_counter() - began


def cost(agreed: Seconds, rounds: Seconds, moved: tuple[int, int], share: int) -> dict[str, Any]:
    """What the agreement on keys costs, or a round's share of it, and what the round does."""
    medians = [{k: float(np.median(found)) for k, found in p.items()} for p in (agreed, rounds)]
    found = {"bytes": {"agreement": moved[0] / share, "round": moved[1]}}
    for who in ("client", "server"):
        key, each = (sum(s for k, s in part.items() if k.startswith(who)) for part in medians)
        found[who] = {"agreement": key / share, "round": each}
    return found | {"stages": medians[0] | medians[1]}


def measure(sites: int, *, quick: bool) -> dict[str, Any]:
    """The cells of so many sites, by label; few times where SecAgg+ draws 2500 masks in one."""
    most = dict(zip(SIZES, (3, 3, 1) if sites == 50 else (7, 7, 3), strict=True))
    turns = {100_000: 1} if quick else most
    spent, cells = defaultdict[str, Seconds](lambda: Seconds(list)), dict[str, Any]()
    unit = {OURS: sites / 2 / fixed_point.factor(BOUND, 1.0, sites), RIVAL: 2 * BOUND / LEVELS}
    drops = [k for k in (0, round(0.2 * sites)) if sites - k >= default_threshold(sites)]
    for turn in range(max(turns.values())):
        flower, spread = SecAggPlus(sites, spent[RIVAL]), Ours(sites, SPREAD, spent[OF_30])
        for size in [size for size, often in turns.items() if turn < often]:
            updates = windows(size, sites)
            for dropped in drops:
                label = f"{SIZES[size]}-{sites}" + ("-20%" if dropped else "")
                cells[label] = cell = dict[str, Any](repetitions=turn + 1)
                for name, side in ((OURS, Ours(sites, 1, spent[OURS])), (RIVAL, flower)):
                    rounds = spent[f"{name} {label}"]
                    mean, moved = cast(Any, side).round(updates, dropped, rounds)
                    cell[name] = cost(spent[name], rounds, (side.bytes, moved), 1)
                    cell[name]["error"] = error(mean, updates[dropped:], unit[name])
                    if name == OURS:
                        cell[OF_30] = cost(spent[OF_30], rounds, (spread.bytes, moved), SPREAD)
    return cells


def main(*, quick: bool) -> None:
    """Measure, print the table and write the results; quick: little, once, nothing written."""
    cells, ratios, memory = dict[str, Any](), dict[str, float](), dict[str, float]()
    for sites in SITES[:2] if quick else SITES:
        cells |= measure(sites, quick=quick)
    for (label, cell), what in itertools.product(cells.items(), ("client", "server", "bytes")):
        ours, of_30, rival = (sum(cell[name][what].values()) for name in (OURS, OF_30, RIVAL))
        ratios[f"{what}/{RIVAL}/{label}"] = round(ours / rival, 4)
        ratios[f"{what}-of-30/{RIVAL}/{label}"] = round(of_30 / rival, 4)
        print(
            f"{label:10} {what:6}  ours {ours:10.5g}  of 30 {of_30:10.5g}  SecAgg+ {rival:10.5g}"
            f"  ratios {ours / rival:.3f} {of_30 / rival:.3f}"
        )
    for size, side in itertools.product([100_000] if quick else list(SIZES)[1:], (OURS, RIVAL)):
        words = [sys.executable, "-m", "silotune.simulations.benchmarks.secagg", "--peak"]
        grown = check_output([*words, side, str(size)], text=True)
        memory[f"{side}/{SIZES[size]}-10"] = round(float(grown), 2)
    print("memory, in updates:", memory)
    if quick:
        return
    own, limit = cells["1M-10"][OURS]["client"], float(np.median([keystream() for _ in range(7)]))
    results = {
        "commit": check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one used",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "repetitions": {label: cell["repetitions"] for label, cell in cells.items()},
        "ratios": ratios,
        "cells": cells,
        "memory": memory,
        "not_run": "3 sites with 20% drops: their threshold of 3 allows none",
        "limit": {
            "keystream_added": limit,
            "client/limit": round(sum(own.values()) / limit, 3),
            "client_round/limit": round(own["round"] / limit, 3),
        },
    }
    (RESULTS / "secagg.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("limit", results["limit"])


if __name__ == "__main__":
    parser = command_line.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="do little, and write no results")
    parser.add_argument(
        "--peak", nargs=2, metavar=("SIDE", "ENTRIES"), help="only the peak memory of a side"
    )
    asked = parser.parse_args()
    logging.disable()  # what Flower says of every round
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core
    if asked.peak:
        name, entries = asked.peak
        measure_peak(name, 1000)  # what is kept from the first use is not the update's
        print(measure_peak(name, int(entries)))
    else:
        main(quick=asked.quick)
