"""Whether a server knows a node key: what Flower answers, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.error import FlowerError
from flwr.superlink.servicer.fleet import fleet_handlers

from silotune.client.operations import node_admission, preflight
from silotune.client.site.folder import SiteFolder
from silotune.client.site.policy import Server
from silotune.common.errors import DataError, PeerError
from silotune.server.operations import certificate_authority


class LinkState:
    """Flower's, with one registered key. Nothing may be activated."""

    def get_node_id_by_public_key(self, public_key: bytes) -> int | None:
        return 7 if public_key == b"registered" else None

    def activate_node(self, *_: Any) -> bool:
        raise AssertionError("asking has connected a node")


@pytest.mark.parametrize(
    ("key", "code"),
    [
        (b"registered", node_admission.KNOWN),
        (b"another", node_admission.UNKNOWN),
    ],
)
def test_flower_tells_a_registered_key_from_another_before_it_connects_a_node(
    key: bytes, code: int
) -> None:
    """What admission.py relies on: the order of Flower's checks."""
    request = ActivateNodeRequest(public_key=key, heartbeat_interval=0.0)
    with pytest.raises(FlowerError) as error:
        fleet_handlers.activate_node(request, cast(Any, LinkState()))
    assert error.value.code == code


@pytest.fixture
def files(tmp_path: Path) -> tuple[Server, Path]:
    (tmp_path / "ca.crt").write_bytes(certificate_authority.make_ca("operator")[0].certificate)
    write_key(tmp_path / "node.key", ec.generate_private_key(ec.SECP384R1()))
    return Server(address="fl.example.org:8443", ca=tmp_path / "ca.crt"), tmp_path / "node.key"


def write_key(path: Path, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> None:
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (
            node_admission.UNKNOWN,
            "E405",
            "does not know this site's node key: the site is not admitted",
        ),
        ("ConnectError", "E401", "could not be asked about this site's node key (ConnectError)"),
        ("status 502", "E401", "(status 502)"),
        ("it was accepted", "E401", "(it was accepted)"),
    ],
)
def test_each_answer_has_its_sentence(
    files: tuple[Server, Path],
    monkeypatch: pytest.MonkeyPatch,
    answer: int | str,
    code: str,
    words: str,
) -> None:
    monkeypatch.setattr(node_admission, "_asked", lambda *_: answer)
    with pytest.raises(PeerError) as error:
        node_admission.check(*files)
    assert error.value.code == code
    assert words in str(error.value)


def test_a_key_that_flower_does_not_take_is_told(files: tuple[Server, Path]) -> None:
    server, key = files
    write_key(key, ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(DataError, match="no key of the kind"):
        node_admission.check(server, key)
    key.write_text("no key")
    with pytest.raises(DataError, match="cannot be read"):
        node_admission.check(server, key)


def test_site_check_has_a_row_for_the_node_key_where_the_server_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site.toml").write_text(
        'name = "north"\n[data]\nfile = "rows.csv"\n[budgets.record]\nepsilon = 8.0\n'
        'delta = 1e-4\n[permits]\n[server]\naddress = "fl.example.org:8443"\nca = "ca.crt"\n'
    )
    asked: list[Path] = []

    def refused(_: Server, key: Path) -> str:
        asked.append(key)
        raise PeerError("not admitted", code="E405")

    def unreachable(_: Server) -> str:
        raise PeerError("nothing listens there")

    def rows() -> dict[str, preflight.Check]:
        site, contract = SiteFolder(tmp_path / "site.toml"), tmp_path / "contract.toml"
        return {row.name: row for row in preflight.check(site, contract, network=True)}

    monkeypatch.setattr(node_admission, "check", refused)
    monkeypatch.setattr(preflight, "shake", lambda _: "TLS 1.3")
    found = rows()["node key"]
    assert (found.state, found.code) == ("problem", "E405")
    assert "north.request.json" in found.fix
    assert asked == [tmp_path / "relay" / "node.key"]
    monkeypatch.setattr(preflight, "shake", unreachable)
    assert "node key" not in rows()
