"""The question about a node key, to a real SuperLink: it is answered, and connects nobody."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from silotune.client.operations import node_admission
from silotune.client.site.policy import Server
from silotune.common.errors import PeerError


def make_key(path: Path) -> Path:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", path], check=True
    )
    return path


@pytest.mark.system
def test_a_server_says_whether_it_knows_a_node_key_and_the_relay_still_gets_in(
    federation: Any, tmp_path: Path
) -> None:
    ours, other = (make_key(tmp_path / name) for name in ("north.key", "other.key"))
    server = Server(address=federation.address, ca=federation.ca)
    federation.register(ours.with_suffix(".key.pub"), "north")
    for _ in range(2):
        assert node_admission.check(server, ours) == f"admitted by {federation.address}"
        with pytest.raises(PeerError) as error:
            node_admission.check(server, other)
        assert error.value.code == "E405"
    federation.start(
        federation.bin / "flower-supernode",
        "--root-certificates",
        federation.ca,
        "--superlink",
        federation.address,
        "--auth-supernode-private-key",
        ours,
        "--port",
        str(federation.free_port()),
        log="north.log",
    )

    def connected() -> bool:
        return "SuperNode ID" in (federation.folder / "north.log").read_text()

    federation.wait_for(connected, 120, "that the relay gets in", "north.log")
    assert node_admission.check(server, ours)  # and while it is connected
