"""Faults, each done to a running federation: what breaks, what must hold, and what was seen.

A fault is survived if the run ends with the adapter of the uninterrupted run (noise off, bit for
bit; masked: to the masks' precision), by itself or resumed as an operator would, and no site has
computed what its ledger did not charge. Where the fault calls for a refusal instead, that is what
must be seen. `soak.py` does them all and prints the table, test_faults.py some.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from safetensors.numpy import save

from silotune.client.relay import transport
from silotune.common.contract.contract import Contract, parse
from silotune.common.protocol import messages, packing
from silotune.common.protocol.messages import MAX_WIRE, Message, Refusal
from tests.conftest import TABLE_CONTRACT
from tests.system.deployment import BIN, Deployment, Member, Service, free_ports, wait_for
from tests.system.faulty_worker import POINTS, STAGES

KILLED = ("worker", "relay", "SuperNode", "ServerApp", "SuperLink")
ON_THE_SERVER = ("committing", "committed")
DEADLINE = 15.0
FUZZED = 7_000  # inputs of each kind: contracts, policies and messages are more than 20,000


class Fault(NamedTuple):
    """kind: of the federation that it is done to; "own": one of its own, in the folder it gets.
    parts: names of what `do` tells apart, a line of what was seen for each."""

    name: str
    kind: str
    do: Callable[[Any], str]
    parts: tuple[str, ...] = ("",)


def plain(keys: dict[str, str]) -> Contract:
    """Noise off and every record in every step: what a site computes is always the same."""
    return parse(TABLE_CONTRACT).changed(
        sites=[{"name": name, "public_key": key} for name, key in keys.items()],
        quorum=len(keys),
        privacy={"mode": "none"},
        deadline_seconds=DEADLINE,
        phases=[{"trains": "head", "rounds": 2, "sampling_rate": 1.0, "head_lr": 0.5}],
    )


def masked(keys: dict[str, str]) -> Contract:
    return plain(keys).changed(
        quorum=3,
        secure_aggregation={"threshold": 3, "bound": 4.0},
        phases=[{"trains": "head", "rounds": 1, "sampling_rate": 1.0, "head_lr": 0.5}],
    )


SITES = {"plain": ("north", "south"), "masked": ("north", "south", "east", "west")}
CONTRACTS = {"plain": plain, "masked": masked}


@contextlib.contextmanager
def federation(folder: Path, kind: str, **more: Any) -> Iterator[Deployment]:
    found = Deployment(folder, SITES[kind], contract=CONTRACTS[kind], **more)
    try:
        found.start()
        yield found
    finally:
        found.end()


def first(d: Deployment) -> Member:
    return next(iter(d.members.values()))


# kill -9


def kill(d: Deployment, process: str) -> int:
    """SIGKILL for one process; how many it was."""
    site = first(d)
    if process == "worker":
        assert site.worker.process is not None
        site.worker.process.kill()
        return 1
    if process == "SuperNode":
        assert site.node.process is not None
        site.node.process.kill()
        return 1
    service, word = {
        "relay": (site.node, "flwr-clientapp"),
        "ServerApp": (d.link_service, "flwr-serverapp"),
        "SuperLink": (d.link_service, "flower-superlink"),
    }[process]
    found = service.tree(word)
    for one in found:
        with contextlib.suppress(Exception):
            one.kill()
    return len(found)


def killed_at(process: str, point: str, number: int) -> Callable[[Deployment], str]:
    def do(d: Deployment) -> str:
        d.use()
        first(d).stop_at(point, number)
        other = list(d.members.values())[-1]
        if point == "endorse":  # a stage only if a site is missing
            d.use(phases=[{"trains": "head", "rounds": 2, "sampling_rate": 1.0, "head_lr": 0.5}])
            other.stop_at("asked", number)
        name, run = d.begin()
        wait_for(first(d).stopped, f"round {number}, {point}", 150)
        assert kill(d, process), f"no {process} was there"
        first(d).go_on()
        other.go_on()
        return ended(d, name, run)

    return do


def killed_through(process: str) -> Callable[[Deployment], str]:
    """One run in which the process is killed at each point, a round further each time."""

    def do(d: Deployment) -> str:
        d.use(
            phases=[
                {
                    "trains": "head",
                    "rounds": len(POINTS) - 1,
                    "sampling_rate": 1.0,
                    "head_lr": 0.5,
                }
            ]
        )
        site, seen = first(d), list[str]()
        site.stop_at(POINTS[0], "any")
        name, run = d.begin()
        for at, point in enumerate(POINTS):
            wait_for(site.stopped, f"{point} after {seen}", 60)
            assert kill(d, process), f"no {process} was there"
            if point == POINTS[-1]:
                break
            site.stop_at(POINTS[at + 1], at + 1)
            why = ""
            end = time.monotonic() + 240
            while not site.stopped():
                assert time.monotonic() < end, f"{POINTS[at + 1]} did not come: {seen} {why}"
                if run.poll() is not None:
                    assert run.returncode, "it ended too early"
                    why, run = d.take_up(name, run)
                time.sleep(0.05)
            seen.append(f"resumed: {why}" if why else "the run went on by itself")
        site.go_on()
        seen.append(ended(d, name, run))
        return "\n".join(seen)

    return do


def joined_while_away(d: Deployment) -> str:
    """Three of four sites agree on keys, the server is killed before it has their masked updates,
    the fourth comes, and the run is resumed twice. The round is that of the three, at one charge
    each; the fourth joins at the next."""
    d.use(
        deadline_seconds=45.0,
        phases=[{"trains": "head", "rounds": 2, "sampling_rate": 1.0, "head_lr": 0.5}],
    )
    *three, fourth = d.members.values()
    for service in (fourth.node, fourth.worker):
        service.end(signal.SIGKILL)
    three[0].stop_at("asked", 1)
    name, run = d.begin()
    wait_for(three[0].stopped, "the first request to train", 240)
    assert kill(d, "ServerApp")
    three[0].go_on()
    wait_for(lambda: all(d.computed(name)[m.name] for m in three), "three updates", 120)
    fourth.start()
    d.wait_until_ready()
    three[0].stop_at("asked", 1)
    first_why, run = d.take_up(name, run)
    wait_for(three[0].stopped, "the same request again", 240)
    assert kill(d, "ServerApp")
    three[0].go_on()
    why, run = d.take_up(name, run)
    seen = ended(d, name, run)
    sites = [f["sites"] for f in d.registry(name).rounds()]
    assert sites == [sorted(m.name for m in three), sorted(d.members)], sites
    charged = {
        m.name: len([c for c in m.ledger().charges.values() if c.run == name])
        for m in d.members.values()
    }
    assert charged == {m.name: 2 for m in three} | {fourth.name: 1}, charged
    return (
        f"stopped: {first_why} / {why}; 3 sites in round 1, 4 in round 2, no second charge; {seen}"
    )


def killed_while(process: str, moment: str) -> Callable[[Deployment], str]:
    """Just before the first round gets its name, or just after."""

    def do(d: Deployment) -> str:
        d.use()
        pause, there = d.folder / "pause", d.folder / "there"
        there.unlink(missing_ok=True)
        if moment == "committing":
            pause.touch()
        name, run = d.begin()
        rounds = d.server / "runs" / name / "rounds"
        wait_for(
            there.exists if moment == "committing" else (rounds / "0001").is_dir,
            "the first round",
            90,
        )
        assert kill(d, process)
        pause.unlink(missing_ok=True)
        found = sorted(os.listdir(rounds))
        assert (".half" in found) == (moment == "committing"), found
        return f"killed with {', '.join(found)}; " + ended(d, name, run)

    return do


def ended(d: Deployment, name: str, run: subprocess.Popen[str], *, all_sites: bool = True) -> str:
    """What was seen of a run that must come to the adapter of the uninterrupted one."""
    began = time.monotonic()
    why = d.finish(name, run)
    rounds = d.registry(name).rounds()
    secure = d.current is not None and d.current.secure_aggregation is not None
    tolerance = 0.0
    if d.current is not None and secure:
        tolerance = 8 * len(rounds) / packing.factor(d.current, 1.0)
        all_sites = False
    problems = d.problems_of(name, tolerance)
    missing = [f["round"] for f in rounds if len(f["sites"]) < len(d.members)]
    if all_sites and missing:
        problems.append(f"sites are missing in rounds {missing}")
    if problems:
        raise AssertionError("; ".join(problems))
    seen = [f"resumed {len(why)} time(s): {' / '.join(why)}" if why else "not interrupted"]
    if missing:
        counts = ", ".join(str(len(f["sites"])) for f in rounds)
        seen.append(f"{counts} of {len(d.members)} sites counted")
    again = [
        key for key in {e.get("site") for e in d.events(name) if e.get("code") == "E204"} if key
    ]
    if again:
        seen.append(f"{', '.join(again)} was charged again for a lost reply")
    return f"{'; '.join(seen)}; {time.monotonic() - began:.0f} s"


# Sites that do not answer, or late


def silent(d: Deployment) -> str:
    """A site stops in the middle of a round; below the quorum the run stops at the deadline."""
    d.use(deadline_seconds=15.0)
    first(d).stop_at("charged", 1)
    name, run = d.begin()
    wait_for(first(d).stopped, "round 1", 90)
    began = time.monotonic()
    said, _ = run.communicate(timeout=60)
    waited = time.monotonic() - began
    assert run.returncode == 1, said
    assert "E402" in said, said
    assert "silotune server resume" in said, said
    assert waited < 30, waited
    assert not (d.server / "runs" / name / "adapter.safetensors").exists()
    first(d).go_on()
    return f"stopped with E402 after {waited:.0f} s; " + ended(d, name, d.resuming(name))


def late(d: Deployment) -> str:
    """Its reply comes when the next round is under way: it counts in neither round's place."""
    d.use(
        deadline_seconds=15.0,
        quorum=1,
        phases=[{"trains": "head", "rounds": 4, "sampling_rate": 1.0, "head_lr": 0.5}],
    )
    first(d).stop_at("answered", 1)
    name, run = d.begin()
    wait_for(first(d).stopped, "round 1", 60)
    wait_for((d.server / "runs" / name / "rounds" / "0001").is_dir, "the first round", 60)
    first(d).go_on()
    seen = ended(d, name, run, all_sites=False)
    sites = [len(f["sites"]) for f in d.registry(name).rounds()]
    assert sites[0] == 1, sites
    assert sites[-1] == 2, sites
    return seen


def replayed(d: Deployment) -> str:
    """What was asked before is asked again, as it was and changed."""
    d.use()
    name, run = d.begin()
    ended(d, name, run)
    site = first(d)
    asked = (site.faults / "last").read_bytes()
    charges = len(site.ledger().charges)
    answers = {transport.ask(site.socket, asked, 60) for _ in range(20)}
    assert len(answers) == 1, "a repeated request got another reply"
    message = messages.unpack(asked)
    other = {n: a + np.float32(1) for n, a in message.arrays.items()}
    changed = messages.unpack(
        transport.ask(site.socket, messages.pack(Message(message.header, other)), 60)
    ).header
    assert isinstance(changed, Refusal)
    assert changed.code == "E202", changed
    assert len(site.ledger().charges) == charges
    return "20 replays: the same bytes, no charge; with other weights: E202"


# Networks and clocks


def partitioned(folder: Path) -> str:
    """A site in a network of its own, whose cable is pulled for 20 s in the middle of a round."""
    number = os.getpid() % 200
    space, near, far = f"silotune{number}", f"sn{number}", f"sf{number}"
    here, there = f"10.213.{number}.1", f"10.213.{number}.2"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    ip("netns", "add", space)
    try:
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", space)
        ip("addr", "add", f"{here}/30", "dev", near)
        ip("link", "set", near, "up")
        ip("-n", space, "addr", "add", f"{there}/30", "dev", far)
        ip("-n", space, "link", "set", far, "up")
        ip("-n", space, "link", "set", "lo", "up")
        d = Deployment(folder, SITES["plain"], contract=plain, host=here)
        first(d).node.prefix = ["ip", "netns", "exec", space]
        try:
            d.start()
            d.use(deadline_seconds=60.0)
            first(d).stop_at("charged", 1)
            name, run = d.begin()
            wait_for(first(d).stopped, "round 1", 90)
            ip("link", "set", near, "down")
            first(d).go_on()
            end = time.monotonic() + 20
            wait_for(lambda: time.monotonic() > end, "the partition", 30)
            ip("link", "set", near, "up")
            return "20 s without a network; " + ended(d, name, run)
        finally:
            d.end()
    finally:
        ip("netns", "del", space)


def clock(minutes: int) -> Callable[[Deployment], str]:
    """Of a site's SuperNode, which signs the time; `site check` compares it with the server's."""

    def do(d: Deployment) -> str:
        if shutil.which("faketime") is None:
            raise AssertionError("faketime is not installed (apt-get install faketime)")
        site = first(d)
        d.use(deadline_seconds=20.0)
        shift: list[str | Path] = ["faketime", "-f", f"{60 * minutes:+d}s"]
        site.node.prefix = shift
        site.node.start()
        checked = subprocess.run(
            [
                *map(str, shift),
                BIN / "silotune",
                "site",
                "check",
                d.contract,
                "--config",
                site.config,
            ],
            env=d.env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        ).stdout
        told = [line for line in checked.splitlines() if "handshake" in line]
        assert told, checked
        assert "5 min" in told[0], told
        name, run = d.begin()
        try:
            said, _ = run.communicate(timeout=120)
        finally:
            site.node.prefix = []
            site.node.start()
        wait_for(lambda: "SuperNode ID" in site.node.said() or site.node.tree(), "the node", 30)
        if run.returncode == 0:
            return f"accepted; site check: {' '.join(told[0].split())}"
        assert site.name in said, said
        seen = ended(d, name, d.begin(name)[1] if not d.events(name) else d.resuming(name))
        return f"refused, and site check says why; with the right time: {seen}"

    return do


# Disks


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own for a folder, with what was in it."""
    kept = folder.with_name(f"{folder.name}.kept")
    folder.rename(kept)
    folder.mkdir(mode=0o700)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "tmpfs", folder], check=True
    )
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        yield folder
    finally:
        shutil.rmtree(kept)
        shutil.copytree(folder, kept)
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()
        kept.rename(folder)


def fill(folder: Path) -> Path:
    file = folder / "filling"
    for size in (1 << 20, 512):
        with contextlib.suppress(OSError), file.open("ab", buffering=0) as out:
            while out.write(bytes(size)):
                pass
    return file


def full_at_a_site(d: Deployment) -> str:
    """Nothing can be charged, so nothing is computed; when there is room again the run goes on."""
    d.use(deadline_seconds=15.0)
    site = first(d)
    site.worker.end(signal.SIGTERM)
    with small_disk(site.folder / "state", 260) as state:
        site.worker.start()
        d.wait_until_ready()
        first(d).stop_at("asked", 1)
        name, run = d.begin()
        wait_for(first(d).stopped, "round 1", 60)
        filling, before = fill(state), len(site.computed())
        first(d).go_on()
        said, _ = run.communicate(timeout=90)
        assert run.returncode == 1, said
        assert len(site.computed()) == before, "it computed without a charge"
        filling.unlink()
        seen = ended(d, name, d.resuming(name))
        site.worker.end(signal.SIGTERM)
    site.worker.start()
    d.wait_until_ready()
    return f"{said.strip().splitlines()[-2][:90]}; {seen}"


def full_at_the_server(d: Deployment) -> str:
    d.use()
    with small_disk(d.server / "runs", 4) as runs:
        first(d).stop_at("answered", 2)
        name, run = d.begin()
        wait_for(first(d).stopped, "round 2", 60)
        filling = fill(runs)
        first(d).go_on()
        said, _ = run.communicate(timeout=90)
        assert run.returncode == 1, said
        assert "✗ E604 The disk of" in said, said
        filling.unlink()
        seen = ended(d, name, d.resuming(name))
    told = [line for line in said.splitlines() if line.startswith("✗")]
    return f"{told[-1][:90]}; {seen}"


def corrupt(d: Deployment) -> str:
    """One bit of the last committed round: the round before is gone back to, and it is said."""
    d.use(phases=[{"trains": "head", "rounds": 3, "sampling_rate": 1.0, "head_lr": 0.5}])
    first(d).stop_at("asked", 3)
    name, run = d.begin()
    wait_for(first(d).stopped, "round 3", 90)
    kill(d, "ServerApp")
    run.communicate(timeout=60)
    file = d.server / "runs" / name / "rounds" / "0002" / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    first(d).go_on()
    seen = ended(d, name, d.resuming(name))
    damaged = [e["round"] for e in d.events(name) if e["event"] == "damaged"]
    after = [e["after"] for e in d.events(name) if e["event"] == "resumed"]
    assert (damaged, after[-1:]) == ([2], [1]), (damaged, after)
    return f"round 2 set aside, gone on from round 1; {seen}"


# Orders


def two_servers(d: Deployment) -> str:
    d.use(deadline_seconds=60.0)  # so long that the second has been refused before it passes
    first(d).stop_at("asked", 1)
    name, run = d.begin()
    wait_for(first(d).stopped, "round 1", 60)
    second = d.silotune("server", "resume", name, "--folder", d.server, ok=False)
    assert "E602" in second, second
    first(d).go_on()
    return f"the second: E602; the first: {ended(d, name, run)}"


def heed_interrupts() -> None:
    """In the main thread, before a fault is done: a shell has its background ignore SIGINT, and so
    does what is started there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(d: Deployment) -> str:
    """Ctrl-C on `server run` ends no run. It says so, and each command that it prints does what it
    says, pasted into another terminal."""
    d.use(deadline_seconds=60.0)
    first(d).stop_at("asked", 2)
    name, run = d.begin()
    wait_for(first(d).stopped, "round 2", 60)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert f"The run {name} continues: its sites train, and each round spends ε." in said
    lines = dict(re.findall(r"^(watch|stop|resume): +(.*?)(?:   \(.*)?$", said, re.M))
    assert set(lines) == {"watch", "stop", "resume"}, said
    assert f"{name}   1/2   running" in pasted(d, lines["watch"])
    pasted(d, lines["stop"])
    wait_for(lambda: "told to stop" in pasted(d, lines["watch"]), "the run's end", 60)
    assert d.events(name)[-1]["code"] == "E603"
    first(d).go_on()
    seen = ended(
        d,
        name,
        subprocess.Popen(
            ["bash", "-c", lines["resume"]],
            cwd=d.folder,
            env=d.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ),
    )
    return f"the run went on, was stopped as the message says, and resumed: {seen}"


def pasted(d: Deployment, line: str) -> str:
    """What a command of a message says, without anything of Flower's in the environment."""
    env = {key: value for key, value in d.env.items() if not key.startswith("FLWR_")}
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=d.folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def absent(d: Deployment) -> str:
    """A site that is not there when a run begins is named at once, and is waited for."""
    d.use(deadline_seconds=60.0)
    gone = d.members["south"]
    gone.node.end(signal.SIGTERM)
    name, run = d.begin()

    def waiting() -> dict[str, Any] | None:
        found = [e for e in d.events(name) if e["event"] == "waiting"]
        return found[-1] if found and found[-1]["sites"] == ["south"] else None

    event = wait_for(waiting, "that south is named", 40)
    standing = d.silotune("server", "status", "--folder", d.server)
    assert "waiting for south" in standing, standing
    gone.node.start()
    return f"named after {event['seconds']} s of {event['of']}; {ended(d, name, run)}"


def worker_told_to_stop(d: Deployment) -> str:
    """SIGTERM in the middle of a round: what was charged is finished and kept."""
    d.use()
    site = first(d)
    site.stop_at("charged", 1)
    name, run = d.begin()
    wait_for(site.stopped, "round 1", 60)
    process = site.worker.process
    assert process is not None
    process.send_signal(signal.SIGTERM)
    site.go_on()
    assert process.wait(60) in (0, -signal.SIGTERM), process.returncode
    ledger = site.ledger()
    charge = next(c for c in ledger.charges.values() if c.run == name)
    assert charge.sequence in ledger.releases, "its reply was lost"
    seen = ended(d, name, run)
    assert d.computed(name)[site.name] == 2, d.computed(name)
    return f"the round in hand was finished; {seen}"


def server_told_to_stop(d: Deployment) -> str:
    d.use()
    first(d).stop_at("charged", 2)
    name, run = d.begin()
    wait_for(first(d).stopped, "round 2", 60)
    assert d.link_service.process is not None
    d.link_service.process.send_signal(signal.SIGTERM)
    first(d).go_on()
    code = d.link_service.process.wait(60)
    seen = ended(d, name, run)
    assert code == 0, code
    assert set(d.computed(name).values()) == {2}, d.computed(name)
    return f"ended with 0; {seen}"


# Strangers


def stranger(d: Deployment, *, ca: Path | None, key: Path | None) -> str:
    """A SuperNode that should not get in: what it says, and that the federation works beside it."""
    d.use()
    site = first(d)
    key = key or site.key
    node = Service(
        f"{d.folder}-stranger",
        lambda: [
            BIN / "flower-supernode",
            "--root-certificates",
            ca or site.ca,
            "--superlink",
            d.address,
            "--auth-supernode-private-key",
            key,
            "--port",
            str(free_ports(1)[0]),
            "--max-retries",
            "1",
        ],
        d.folder / f"stranger-{time.time_ns()}.log",
        d.env | {"FLWR_HOME": str(d.folder / "stranger")},
    )
    node.start()
    try:
        assert node.process is not None
        try:
            code = node.process.wait(60)
        except subprocess.TimeoutExpired:
            code = None
        said = node.said()
        assert code != 0, said
        assert "SuperNode ID" not in said, said
    finally:
        node.end(signal.SIGKILL)
    name, run = d.begin()
    seen = ended(d, name, run)
    words = [line for line in said.splitlines() if "ERROR" in line or "rror" in line]
    return f"{(words or ['it never got in'])[-1].strip()[:100]}; beside it: {seen}"


def wrong_ca(d: Deployment) -> str:
    folder = d.folder / f"other-{time.time_ns()}"
    d.silotune("server", "init", "--host", "127.0.0.1", "--folder", folder)
    site = first(d)
    d.use()
    text = site.config.read_text()
    (site.folder / "other.crt").write_bytes((folder / "ca.crt").read_bytes())
    site.config.write_text(text.replace('ca = "ca.crt"', 'ca = "other.crt"'))
    try:
        checked = d.silotune("site", "check", d.contract, "--config", site.config, ok=False)
    finally:
        site.config.write_text(text)
    told = next(line for line in checked.splitlines() if "handshake" in line)
    assert "phone the operator" in checked, checked
    return f"site check: {' '.join(told.split())[:120]}; " + stranger(
        d, ca=folder / "ca.crt", key=None
    )


def wrong_key(d: Deployment) -> str:
    key = d.folder / f"stranger-{time.time_ns()}.key"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", key], check=True
    )
    return stranger(d, ca=None, key=key)


def unregistered(d: Deployment) -> str:
    made = d.folder / f"hospital-x-{time.time_ns()}"
    d.silotune("site", "init", "--name", "hospital-x", "--folder", made)
    return stranger(d, ca=None, key=made / "relay" / "node.key")


# Bytes


def large(d: Deployment) -> str:
    """300 MB to nginx and to a worker: refused before it is held in memory, and all goes on."""
    d.use()
    trusted = ssl.create_default_context(cafile=str(d.server / "ca.crt"))
    seen = []

    def body() -> Iterator[bytes]:
        yield from itertools.repeat(bytes(1 << 20), 300)

    for announced in (True, False):
        headers = {"Content-Length": str(300 << 20)} if announced else {}
        with httpx.Client(verify=trusted, timeout=60) as client:
            try:
                reply = client.post(
                    f"https://{d.address}/v1/fleet/push-messages", content=body(), headers=headers
                )
                seen.append(str(reply.status_code))
            except httpx.HTTPError as error:  # the other side hung up
                seen.append(type(error).__name__)
    assert all(s in ("413", "WriteError", "ReadError", "RemoteProtocolError") for s in seen), seen
    site = first(d)
    assert site.worker.process is not None
    before = _memory(site.worker.process.pid)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(site.socket)), timeout=60) as client:
        try:
            seen.append(str(client.post("http://worker/message", content=body()).status_code))
        except httpx.HTTPError as error:
            seen.append(type(error).__name__)
    grown = (_memory(site.worker.process.pid) - before) >> 20
    assert grown < 2 * (MAX_WIRE >> 20), grown
    name, run = d.begin()
    return f"nginx {seen[0]}, {seen[1]}; worker {seen[2]}; then {ended(d, name, run)}"


def _memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def poisons(mark: Path) -> dict[str, bytes]:
    """What is no message: a pickle that makes a file, bombs, lengths that lie."""
    huge = b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}}'
    many = b'{"__metadata__":{"silotune":' + b'"[' + b"[" * 100_000 + b'"}}'
    return {
        "pickle": pickle.dumps(Touch(mark)),
        "zip bomb": zlib.compress(bytes(1 << 26), 9),
        "huge shape": len(huge).to_bytes(8, "little") + huge,
        "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
        "deep header": len(many).to_bytes(8, "little") + many,
        "no metadata": save({"a": np.zeros(3, np.float32)}),
    }


def poisoned(d: Deployment) -> str:
    """In place of a message: to the worker, and from a site to the server."""
    d.use()
    site, mark = first(d), d.folder / "made-by-a-pickle"
    for what, data in poisons(mark).items():
        reply = messages.unpack(transport.ask(site.socket, data, 60)).header
        assert isinstance(reply, Refusal), what
        assert reply.code == "E501", (what, reply)
    d.use(quorum=1, deadline_seconds=20.0)
    lies, seen = d.folder / "lies", []
    for what in ("pickle", "zip bomb"):
        lies.write_bytes(poisons(mark)[what])
        site.worker.end(signal.SIGTERM)
        site.worker.env["SILOTUNE_TEST_LIES"] = str(lies)
        try:
            site.worker.start()
            d.wait_until_ready()
            name, run = d.begin()
            seen.append(f"{what}: {ended(d, name, run, all_sites=False)}")
            codes = {e["code"] for e in d.events(name) if e["event"] == "rejected"}
            assert codes == {"E501"}, codes
        finally:
            del site.worker.env["SILOTUNE_TEST_LIES"]
            site.worker.end(signal.SIGTERM)
            site.worker.start()
            d.wait_until_ready()
    assert not mark.exists(), "a pickle was loaded"
    return f"to a worker: E501, six kinds; from a site E501: {'; '.join(seen)}"


# Tools of others


def testssl(d: Deployment) -> str:
    """testssl.sh against the running server: nothing above "low"."""
    program = shutil.which("testssl") or shutil.which("testssl.sh")
    if program is None:
        raise AssertionError("testssl is not installed (apt-get install testssl.sh)")
    out = d.folder / "testssl.json"
    done = subprocess.run(
        [
            program,
            "--quiet",
            "--color",
            "0",
            "--add-ca",
            str(d.server / "ca.crt"),
            "--jsonfile",
            str(out),
            "--warnings",
            "off",
            d.address,
        ],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert out.exists(), done.stdout[-2000:]
    found = json.loads(out.read_text())
    by = {
        s: [f["id"] for f in found if f["severity"] == s]
        for s in ("CRITICAL", "HIGH", "MEDIUM", "LOW", "WARN", "INFO", "OK")
    }
    assert len(found) > 50, found
    assert not by["CRITICAL"] + by["HIGH"] + by["MEDIUM"], by
    return f"{len(found)} findings, {len(by['LOW'])} low ({', '.join(by['LOW'])}), none above"


def fuzzed(folder: Path) -> str:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/common/protocol/test_fuzz.py",
        ],
        env=os.environ | {"SILOTUNE_FUZZ": str(FUZZED)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return f"{FUZZED:,} inputs of each kind: {done.stdout.strip().splitlines()[-1]}"


def faults() -> list[Fault]:
    """All of them, the longest first."""
    found = [
        Fault(f"kill -9 of {process}", "plain", killed_through(process), POINTS)
        for process in ("SuperNode", "SuperLink", "worker", "ServerApp", "relay")
    ]
    found += [
        Fault(f"kill -9 of {process}, {moment}", "plain", killed_while(process, moment))
        for process in ("ServerApp", "SuperLink")
        for moment in ON_THE_SERVER
    ]
    found += [
        Fault(f"masked: kill -9 of {process}, {stage}", "masked", killed_at(process, stage, 1))
        for process in ("worker", "ServerApp")
        for stage in STAGES
    ]
    found.append(
        Fault("masked: a site joins while the server is away", "masked", joined_while_away)
    )
    own = [
        Fault("partition that heals", "own", partitioned),
        Fault("fuzzed inputs", "own", fuzzed),
    ]
    rest: list[tuple[str, Callable[[Deployment], str]]] = [
        ("silent site", silent),
        ("late reply", late),
        ("replayed messages", replayed),
        ("clock 5 min ahead", clock(5)),
        ("clock 5 min behind", clock(-5)),
        ("disk full at a site", full_at_a_site),
        ("disk full at the server", full_at_the_server),
        ("corrupt checkpoint", corrupt),
        ("two servers, one run", two_servers),
        ("Ctrl-C on server run", interrupted),
        ("a site that is absent at the start", absent),
        ("SIGTERM to a worker", worker_told_to_stop),
        ("SIGTERM to the server", server_told_to_stop),
        ("wrong CA", wrong_ca),
        ("wrong key", wrong_key),
        ("unregistered site", unregistered),
        ("message of 300 MB", large),
        ("pickle, zip bomb", poisoned),
        ("testssl.sh", testssl),
    ]
    return [*own, *found, *(Fault(name, "plain", do) for name, do in rest)]
