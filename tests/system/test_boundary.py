"""A hostile Flower app in a real deployment: two users, one socket, and nothing else to be had.

Needs root, to be three users: root supervises, 61001 is the worker, 61002 the relay.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from silotune.client.privacy.keys import Keys
from silotune.client.privacy.ledger import PrivacyLedger
from silotune.client.privacy.ledger_entries import Charged, Released
from silotune.common.contract.contract import Contract
from silotune.common.models.factory import build
from silotune.common.protocol import messages
from silotune.common.protocol.messages import Describe, Message, Train
from silotune.server.flower.app_bundle import write_app

WORKER, RELAY = 61001, 61002
ROOT = Path(__file__).resolve().parents[2]
SECRET = "s3cret-of-root"
ROUNDS = 2

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes as two users"),
]

PYPROJECT = """[project]
name = "hostile"
version = "1.0.0"
description = "An attack"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "hostile"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["LICENSE", "README.md", "hostile/*", "silotune/*"]

[tool.flwr.app.components]
serverapp = "hostile.apps:server"
clientapp = "hostile.apps:client"

[tool.flwr.app.config]
records = "{records}"
out = "{out}"
"""


def way_in(folder: Path) -> list[str | Path]:
    """A command that runs another one where every user reaches the interpreter and the packages.

    Where they lie below a closed folder (an interpreter in /root), that folder is hidden behind an
    empty one with only them in it, in a mount namespace of the command's own.
    """
    needed = [Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), ROOT]
    outer = [p for p in needed if not any(p != o and p.is_relative_to(o) for o in needed)]
    lines, closed = [], dict[Path, list[Path]]()
    for path in dict.fromkeys(outer):
        for parent in reversed(path.parents):
            if not parent.stat().st_mode & 0o001:
                closed.setdefault(parent, []).append(path)
                break
    if not closed:
        return []
    hold = folder / "hold"
    for parent, paths in closed.items():
        names = [hold / str(len(lines) + i) for i in range(len(paths))]
        for name, path in zip(names, paths, strict=True):
            lines.append(f"mkdir -p '{name}' && mount --bind '{path}' '{name}'")
        lines.append(f"mount -t tmpfs -o mode=755 tmpfs '{parent}'")
        for name, path in zip(names, paths, strict=True):
            lines.append(f"mkdir -p '{path}' && mount --move '{name}' '{path}'")
    script = " && ".join([*lines, 'exec "$@"'])
    return ["unshare", "--mount", "--propagation", "private", "bash", "-c", script, "-"]


def as_user(user: int) -> list[str]:
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"]


class Deployment:
    """A SuperLink, and a site of two users: 'north', the contract's only one."""

    def __init__(self, federation: Any, contract: Contract, rows: Path) -> None:
        self.federation, self.contract = federation, contract
        self.folder: Path = federation.folder
        self.site = self.folder / "site"
        self.config = self.site / "site.toml"
        self.records = self.site / "records.csv"
        self.contract_file = self.folder / "contract.json"
        self.public = ""
        self.way = way_in(self.folder)
        self._rows = rows

    def run(self, *command: str | Path, user: int) -> None:
        done = subprocess.run(
            [str(word) for word in (*self.way, *as_user(user), *command)],
            check=False,
            env=self.federation.env,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def make(self) -> None:
        """Through the product: init, edit, sign; all as the worker's user."""
        tool = self.federation.bin / "silotune"
        self.site.mkdir()
        self.site.chmod(0o711)
        os.chown(self.site, WORKER, WORKER)
        self.run(tool, "site", "init", "--name", "north", "--folder", self.site, user=WORKER)
        # The operator puts the site's key into the contract.
        key = Ed25519PrivateKey.from_private_bytes((self.site / "keys" / "site.key").read_bytes())
        self.public = key.public_key().public_bytes_raw().hex()
        self.contract = self.contract.changed(sites=[{"name": "north", "public_key": self.public}])
        self.contract_file.write_text(self.contract.model_dump_json())
        text = self.config.read_text()
        for old, new in (
            ('duplicate_records = "refuse"', 'duplicate_records = "keep"'),
            ("epsilon = 8.0", "epsilon = 30.0"),
            ("contracts = []", f'contracts = ["{self.contract.hash}"]'),
            ("min_sites = 2", "min_sites = 1"),
            ("min_quorum = 2", "min_quorum = 1"),
            ("# [server]", "[server]"),
            ('# ca = "ca.crt"', f'ca = "{self.federation.ca}"'),
            ('# address = "server.example.org:8443"', f'address = "{self.federation.address}"'),
        ):
            assert old in text, old
            text = text.replace(old, new)
        self.config.write_text(text)
        shutil.copy(self._rows, self.records)
        os.chown(self.records, WORKER, WORKER)
        self.records.chmod(0o600)
        self.run(tool, "site", "sign", "--config", self.config, user=WORKER)

    def start(self, log: str) -> subprocess.Popen[bytes]:
        """`site start` as root, with a secret in the environment and the widest umask."""
        found: subprocess.Popen[bytes] = self.federation.start(
            *self.way,
            "bash",
            "-c",
            'umask 0; exec "$@"',
            "-",
            self.federation.bin / "silotune",
            "site",
            "start",
            self.contract_file,
            "--config",
            self.config,
            "--worker-user",
            str(WORKER),
            "--relay-user",
            str(RELAY),
            log=log,
            env=self.federation.env | {"SILOTUNE_TEST_SECRET": SECRET},
        )
        log_file = self.folder / log
        self.federation.wait_for(
            lambda: "relay is connecting" in log_file.read_text() or found.poll() is not None,
            60,
            "the site starting",
            log,
        )
        assert found.poll() is None, log_file.read_text()
        return found

    def processes(self, *words: str) -> list[int]:
        """The live processes of the two users whose command line has the words."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or entry.stat().st_uid not in (WORKER, RELAY):
                    continue
                line = (entry / "cmdline").read_text()
            except OSError:
                continue
            if line and all(word in line for word in words):
                found.append(int(entry.name))
        return found

    def relays(self) -> list[int]:
        return self.processes("flower-supernode")

    def worker(self) -> int:
        [found] = self.processes("site\0worker")
        return found

    @staticmethod
    def home(facts: dict[str, Any]) -> Path:
        """The relay's folder, as its processes have it."""
        [line] = [w for w in facts["relay_environment"][0].split("\0") if w.startswith("HOME=")]
        return Path(line.removeprefix("HOME="))

    def ledger(self) -> PrivacyLedger:
        codecs.lookup("ascii")  # its module lies where the worker's user may not read
        os.seteuid(WORKER)  # root is refused: what it wrote would be closed to the worker
        try:
            return PrivacyLedger.open(self.site / "state", Keys.load(self.site / "keys"))
        finally:
            os.seteuid(0)

    def charged(self) -> list[Charged]:
        return [entry for entry in self.ledger().entries if isinstance(entry, Charged)]

    def sweep(self) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def contract(table_contract: Contract) -> Contract:
    return table_contract.changed(
        quorum=1,
        sites=[{"name": "north"}],
        phases=[{"trains": "head", "rounds": ROUNDS, "sampling_rate": 0.5, "head_lr": 0.5}],
    )


@pytest.fixture
def deployed(
    contract: Contract, make_federation: Any, write_rows: Callable[..., Path], tmp_path: Path
) -> Iterator[Callable[..., Deployment]]:
    """deployed(superlink=True): a site that is made and not started; all ends with the test."""
    made: list[Deployment] = []

    def make(*, superlink: bool) -> Deployment:
        # Not tmp_path: only its owner passes through pytest's folders.
        folder = Path(tempfile.mkdtemp(prefix="silotune-"))
        folder.chmod(0o711)
        federation = make_federation(folder)
        found = Deployment(federation, contract, write_rows(tmp_path / "rows.csv", 120))
        made.append(found)
        try:
            found.run(sys.executable, "-c", "import silotune.client.relay.client_app", user=RELAY)
        except AssertionError as error:
            pytest.skip(f"no other user can be let in to the packages: {error}")
        if superlink:
            federation.start_superlink()
        else:
            federation.make_certificate()
        found.make()
        if superlink:
            federation.register(found.site / "relay" / "node.pub", "north")
        return found

    try:
        yield make
    finally:
        for found in made:
            found.federation.end()
            found.sweep()
            shutil.rmtree(found.folder)


def hostile_app(site: Deployment, out: Path) -> Path:
    """The folder that `flwr run` makes the FAB of; it shadows silotune, too."""
    app = site.folder / "hostile-app"
    (app / "hostile").mkdir(parents=True)
    (app / "silotune").mkdir()
    (app / "LICENSE").write_text("none\n")
    (app / "README.md").write_text("An attack.\n")
    (app / "silotune" / "__init__.py").write_text("")
    (app / "hostile" / "__init__.py").write_text("")
    shutil.copy(Path(__file__).with_name("hostile.py"), app / "hostile" / "apps.py")
    (app / "hostile" / "requests.json").write_text(json.dumps(requests(site.contract)))
    (app / "pyproject.toml").write_text(PYPROJECT.format(records=site.records, out=out))
    return app


def requests(contract: Contract) -> dict[str, str]:
    """What the app says to the worker, hexadecimal."""
    arrays = build(contract, None).initial_arrays()
    train = Train(contract=contract.hash, run="hostile", round=1)

    def pack(header: Train | Describe, **changed: Any) -> bytes:
        return messages.pack(Message(header, changed))

    def field(wire: bytes) -> bytes:
        """The same message with one more field in its header."""
        size = int.from_bytes(wire[:8], "little")
        outer = json.loads(wire[8 : 8 + size])
        inner = json.loads(outer["__metadata__"]["silotune"]) | {"records": True}
        outer["__metadata__"]["silotune"] = json.dumps(inner, sort_keys=True)
        head = json.dumps(outer).encode()
        head += b" " * (-len(head) % 8)
        return len(head).to_bytes(8, "little") + head + wire[8 + size :]

    wires = {
        "other contract": pack(train.model_copy(update={"contract": "0" * 64}), **arrays),
        "wrong shapes": pack(train, **{n: a[:1] for n, a in arrays.items()}),
        "one more array": pack(train, **arrays, records=arrays["head.bias"]),
        "no arrays": pack(train),
        "round outside": pack(train.model_copy(update={"round": ROUNDS + 1}), **arrays),
        "unknown field": field(pack(train, **arrays)),
        "cut": pack(train, **arrays)[:-1],
        "describe": pack(Describe(contract=contract.hash, challenge="0" * 64)),
        "train": pack(train, **arrays),
        "train again": pack(train, **arrays),
        "other bytes": pack(train, **{n: a + 1 for n, a in arrays.items()}),
    }
    return {name: wire.hex() for name, wire in wires.items()}


ANSWERS = {  # in the order in which they are asked
    "other contract": "200 refusal E201",
    "wrong shapes": "200 refusal E502",
    "one more array": "200 refusal E502",
    "no arrays": "200 refusal E502",
    "round outside": "200 refusal E202",
    "unknown field": "200 refusal E501",
    "cut": "200 refusal E501",
    "describe": "200 description",
    "train": "200 update head.bias head.weight",
    "train again": "200 update head.bias head.weight",
    "other bytes": "200 refusal E202",
}
ENVIRONMENT = {
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "FLWR_HOME",
    "FLWR_TELEMETRY_ENABLED",
    "FLWR_DISABLE_UPDATE_CHECK",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL",
}
FLWR_SETS = "BROWSER_USE_SETUP_LOGGING"  # in its own processes


def check_attack(facts: dict[str, Any], site: Deployment) -> None:
    assert (facts["uid"], facts["gid"], facts["groups"]) == (RELAY, RELAY, [])
    assert re.search(r"^CapEff:\t0+$", facts["status"], re.M)
    found: dict[str, str] = facts["found"]
    answers = {
        name.removeprefix("request "): found.pop(name)
        for name in list(found)
        if name.startswith("request ")
    }
    assert answers == {name: f"DONE {answer!r}" for name, answer in ANSWERS.items()}
    spoken = {
        name: found.pop(name)
        for name in list(found)
        if name in ("pickle", "garbage", "nothing", "cut short", "too long", "no HTTP")
        or name.startswith(("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE", "PATCH"))
    }
    for name in ("pickle", "garbage", "nothing"):
        assert spoken.pop(name) == "DONE '200 refusal E501'", name
    assert all(
        re.match(r"DONE b?'(HTTP/1.1 )?4\d\d|DONE 'closed'", answer) for answer in spoken.values()
    ), spoken
    assert len(found) > 80
    assert {name: end for name, end in found.items() if end != "PermissionError"} == {}
    # The shadow is all that the app's own silotune reaches.
    assert facts["shadow"].startswith(str(site.home(facts)))
    assert facts["socket"] == [0o600, RELAY]


def check_environment(facts: dict[str, Any], site: Deployment) -> None:
    """Nothing of root's, and no open file of the site's."""
    assert SECRET not in json.dumps(facts)
    [relay] = facts["relay_environment"]
    assert {line.partition("=")[0] for line in relay.split("\0") if line} <= ENVIRONMENT
    assert set(facts["environment"]) <= ENVIRONMENT | {"GRPC_VERBOSITY", FLWR_SETS}
    inside = [name for name in facts["relay_files"] if name.startswith(f"{site.site}/")]
    assert inside == []


def check_modes(site: Deployment) -> None:
    """Whatever the umask of the one who started it was."""
    for path in [site.site, *site.site.rglob("*")]:
        mode, owner = path.lstat().st_mode & 0o777, path.lstat().st_uid
        name = path.relative_to(site.site)
        own = 0o711 if name == Path(".") else 0o700 if path.is_dir() else 0o600
        assert (mode, owner) == (own, WORKER), f"{name}: {mode:o} of {owner}"


def test_a_hostile_app_gets_one_private_update_and_an_honest_run_goes_on(
    deployed: Callable[..., Deployment],
) -> None:
    site = deployed(superlink=True)
    supervisor = site.start("site.log")
    check_modes(site)
    out = site.folder / "outcomes.json"
    site.federation.flwr("run", hostile_app(site, out), "tls")
    site.federation.wait_for(out.exists, 100, "the attack's outcomes", "site.log")
    facts = json.loads(out.read_text())
    assert "error" not in facts, facts
    check_attack(facts, site)
    check_environment(facts, site)
    check_modes(site)
    assert [(c.run, c.round, c.attempt) for c in site.charged()] == [("hostile", 1, 1)]
    assert sum(isinstance(entry, Released) for entry in site.ledger().entries) == 1

    assert site.processes("sleep", "4711")  # left behind by the app; it ends with the site

    # The records are gone and the worker knows them: it loaded them, and the model, once.
    worker = site.worker()
    site.records.unlink()
    app = write_app(
        site.folder / "app",
        contract=site.contract_file,
        model=None,
        run="honest",
        runs=site.folder / "runs",
    )
    site.federation.flwr("run", app, "tls")
    done = site.folder / "runs" / "honest" / "adapter.safetensors"
    site.federation.wait_for(done.exists, 60, "the honest run's adapter", "superlink.log")
    assert site.worker() == worker
    # The server keeps the ledger's last receipt; the second round went out with the first's.
    kept = json.loads((site.folder / "runs" / ".receipts" / f"{site.public}.json").read_text())
    assert kept["sequence"] == site.charged()[-1].sequence
    assert [(c.run, c.round) for c in site.charged()][1:] == [
        ("honest", n + 1) for n in range(ROUNDS)
    ]

    os.kill(supervisor.pid, signal.SIGTERM)
    assert supervisor.wait(30) == 0
    assert site.processes() == []
    text = (site.folder / "site.log").read_text()
    assert SECRET not in text
    assert "stopped" in text


def test_a_relay_that_dies_is_started_again_and_a_worker_that_dies_ends_all(
    deployed: Callable[..., Deployment],
) -> None:
    """Without a SuperLink: the relay goes on trying."""
    site = deployed(superlink=False)
    supervisor = site.start("site.log")
    [relay] = site.relays()
    worker = site.worker()
    os.kill(relay, signal.SIGKILL)
    site.federation.wait_for(
        lambda: set(site.relays()) - {relay}, 20, "the relay's restart", "site.log"
    )
    assert site.worker() == worker
    os.kill(worker, signal.SIGKILL)
    assert supervisor.wait(40) == 1
    assert site.processes() == []


def test_one_user_for_both_is_refused_unless_asked_for(deployed: Callable[..., Deployment]) -> None:
    site = deployed(superlink=False)
    tool = site.federation.bin / "silotune"
    command = [
        *site.way,
        *as_user(WORKER),
        tool,
        "site",
        "start",
        site.contract_file,
        "--config",
        site.config,
    ]
    for options in ([], ["--worker-user", str(WORKER)], ["--one-user", "--relay-user", "0"]):
        done = subprocess.run(
            [str(word) for word in (*command, *options)],
            check=False,
            env=site.federation.env,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert "E207" in done.stdout + done.stderr
    supervisor = site.federation.start(*command, "--one-user", log="one.log")
    text = site.folder / "one.log"
    site.federation.wait_for(
        lambda: "relay is connecting" in text.read_text() or supervisor.poll() is not None,
        60,
        "the site starting",
        "one.log",
    )
    assert supervisor.poll() is None, text.read_text()
    os.kill(supervisor.pid, signal.SIGTERM)
    assert supervisor.wait(30) == 0
    assert site.processes() == []
