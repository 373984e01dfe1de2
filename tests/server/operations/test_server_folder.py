"""What an operator's folder holds, whom it admits, and what the files say that others read."""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.verification import PolicyBuilder, Store

from silotune.client.site.policy import permissive_policy
from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract
from silotune.common.errors import ContractError, UsageError
from silotune.common.protocol import join_request
from silotune.common.protocol.join_request import JoinRequest
from silotune.server.operations import certificate_authority
from silotune.server.operations.server_folder import ServerFolder, ServerSettings


def node_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def request(site: str = "hospital-a", **changes: Any) -> JoinRequest:
    fields = {"site": site, "public_key": f"{hash(site) % 10**12:064d}", "node_key": node_key()}
    return JoinRequest(**(fields | changes))


@pytest.fixture
def place(tmp_path: Path) -> ServerFolder:
    return ServerFolder.create(tmp_path / "server", ServerSettings(host="fl.example.org"))


def test_the_folder_is_closed_and_made_once(place: ServerFolder) -> None:
    for path in (place.folder, *place.folder.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
    with pytest.raises(UsageError, match="holds a server already"):
        ServerFolder.create(place.folder, ServerSettings(host="other.example.org"))
    assert place.settings == ServerSettings(host="fl.example.org")


def test_the_certificate_is_for_the_host_and_the_loopback_and_signed_by_the_ca(
    place: ServerFolder,
) -> None:
    ca, server = (
        x509.load_pem_x509_certificate((place.folder / f"{name}.crt").read_bytes())
        for name in ("ca", "server")
    )
    for name in (x509.DNSName("fl.example.org"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))):
        verifier = PolicyBuilder().store(Store([ca])).build_server_verifier(name)
        assert verifier.verify(server, [])
    wrong = PolicyBuilder().store(Store([ca])).build_server_verifier(x509.DNSName("example.org"))
    with pytest.raises(x509.verification.VerificationError):
        wrong.verify(server, [])
    _, other_key, other = certificate_authority.make_ca("another")
    foreign = (
        PolicyBuilder().store(Store([other])).build_server_verifier(x509.DNSName("fl.example.org"))
    )
    with pytest.raises(x509.verification.VerificationError):
        foreign.verify(server, [])
    context = ssl.create_default_context(cafile=str(place.folder / "ca.crt"))
    context.load_cert_chain(place.folder / "server.crt", place.folder / "server.key")
    assert other_key.key_size == 384


def test_openssl_agrees(place: ServerFolder) -> None:
    done = subprocess.run(
        [
            "openssl",
            "verify",
            "-x509_strict",
            "-purpose",
            "sslserver",
            "-verify_hostname",
            "fl.example.org",
            "-CAfile",
            "ca.crt",
            "server.crt",
        ],
        cwd=place.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "server.crt: OK\n", done.stderr
    said = subprocess.run(
        ["openssl", "x509", "-in", "ca.crt", "-noout", "-fingerprint", "-sha256"],
        cwd=place.folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.strip().endswith(
        certificate_authority.fingerprint((place.folder / "ca.crt").read_bytes())
    )


def test_a_request_is_admitted_by_the_fingerprint_that_was_read_out(place: ServerFolder) -> None:
    found = request()
    assert re.fullmatch(r"([0-9A-F]{2}:){15}[0-9A-F]{2}", found.fingerprint)
    for wrong in (request().fingerprint, "00:" * 15 + "00"):
        with pytest.raises(UsageError, match="do not add it; phone the site"):
            place.admit(found, wrong)
    for wrong in ("", "00", "AA:BB", "x" * 32, found.fingerprint[:-1], found.fingerprint + "0"):
        with pytest.raises(UsageError, match="is no fingerprint: this one has 16 pairs of"):
            place.admit(found, wrong)
    assert place.roster() == []
    place.admit(found, found.fingerprint.replace(":", " ").lower())
    assert place.roster() == [found]
    place.admit(found, found.fingerprint)  # again is nothing new
    assert place.roster() == [found]


@pytest.mark.parametrize("field", ["site", "public_key", "node_key"])
def test_every_field_is_in_the_fingerprint(field: str) -> None:
    first, other = request(), request("hospital-b")
    changed = first.model_copy(update={field: getattr(other, field)})
    assert changed.fingerprint != first.fingerprint


def test_a_name_and_a_key_are_one_sites(place: ServerFolder) -> None:
    first = request()
    place.admit(first, first.fingerprint)
    for other, says in (
        (request(node_key=first.node_key, site="x"), "has a key of this request already"),
        (request("y", public_key=first.public_key), "has a key of this request already"),
        (request(public_key="1" * 64), "has other keys of 'hospital-a'"),
    ):
        with pytest.raises(UsageError, match=says):
            place.admit(other, other.fingerprint)
    assert place.roster() == [first]


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "../../etc/x"},
        {"site": "a/b"},
        {"site": ""},
        {"node_key": "ssh-rsa AAAA"},
        {"node_key": "ecdsa-sha2-nistp384 AAAA\nevil"},
        {"public_key": "xyz"},
        {"more": 1},
    ],
)
def test_a_request_holds_these_fields_and_no_other(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "a.request.json"
    good = request().model_dump(mode="json")
    path.write_text(json.dumps(good | changes))
    with pytest.raises(ContractError):
        join_request.load(path)


@pytest.mark.parametrize("host", ["a b", "a;b", "x\n", "", "-", 'a"', "a{b}"])
def test_a_host_cannot_write_into_nginx_own_file(host: str) -> None:
    if host == "-":
        assert ServerSettings(host=host)
        return
    with pytest.raises(ValueError, match="host"):
        ServerSettings(host=host)


@pytest.mark.skipif(
    not (shutil.which("nginx") or Path("/usr/sbin/nginx").exists()), reason="no nginx here"
)
def test_nginx_takes_its_configuration(place: ServerFolder) -> None:
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    done = subprocess.run(
        [nginx, "-t", "-c", place.folder / "nginx.conf", "-p", place.folder / "nginx"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "test is successful" in done.stderr, done.stderr


# The contract that sites get


def draft(contract: Contract, *names: str, **changes: Any) -> Contract:
    return contract.changed(sites=[{"name": n, "weight": 2.0} for n in names], **changes)


def test_a_contract_gets_the_keys_of_the_roster(
    place: ServerFolder, table_contract: Contract
) -> None:
    for name in ("north", "south", "east"):
        found = request(name)
        place.admit(found, found.fingerprint)
    wanted = draft(table_contract, "north", "west", "south", "east", quorum=4)
    made = place.with_roster(wanted, masked=True)
    keys = {found.site: found.public_key for found in place.roster()}
    assert {s.name: s.public_key for s in made.sites} == keys
    assert {s.weight for s in made.sites} == {2.0}
    assert made.quorum == 3
    assert made.secure_aggregation is not None
    assert place.with_roster(wanted, masked=False).secure_aggregation is None
    path = place.write_contract(made, Path("a.toml"))
    assert contracts.load(path).hash == made.hash
    assert place.write_contract(made, Path("a.toml")) == path


def test_a_contract_is_replaced_only_when_it_is_asked_for_and_no_run_has_used_it(
    place: ServerFolder, table_contract: Contract
) -> None:
    draft_, other = Path("a.toml"), table_contract.changed(deadline_seconds=1.0)
    path = place.write_contract(table_contract, draft_)
    with pytest.raises(UsageError, match=r"the key `name` in a\.toml.*with --replace"):
        place.write_contract(other, draft_)
    assert place.write_contract(other, draft_, replace=True) == path
    assert contracts.load(path).hash == other.hash
    (place.runs / "r1").mkdir()
    (place.runs / "r1" / "contract.json").write_text(other.model_dump_json())
    with pytest.raises(UsageError, match=r"the contract of the run r1\. Give this"):
        place.write_contract(table_contract, draft_, replace=True)
    assert contracts.load(path).hash == other.hash


def test_sites_whose_updates_could_not_count_are_named(
    place: ServerFolder, table_contract: Contract
) -> None:
    admitted(place, "north", "south")
    made = place.with_roster(draft(table_contract, "north", "south"), masked=False)
    place.check_sites(made)
    keyed = made.model_dump(mode="json")["sites"]
    changed = made.changed(
        sites=[
            keyed[0] | {"public_key": None},
            keyed[1] | {"public_key": "1" * 64},
            {"name": "east"},
        ]
    )
    with pytest.raises(UsageError) as caught:
        place.check_sites(changed)
    assert "\n" not in str(caught.value)
    for problem in (
        "The contract has no key of 'north': ",
        "The contract has another key of 'south': ",
        "'east' is not in the roster: ",
    ):
        assert problem in str(caught.value)


def test_a_contract_for_nobody_in_the_roster(place: ServerFolder, table_contract: Contract) -> None:
    found = request("north")
    place.admit(found, found.fingerprint)
    with pytest.raises(UsageError, match="names west, east; the roster has north"):
        place.with_roster(draft(table_contract, "west", "east"), masked=False)


def test_nginx_knows_the_superlink_by_a_name_of_its_certificate(tmp_path: Path) -> None:
    """It matches names, never addresses; certificates of earlier versions have the host alone."""
    for host in ("127.0.0.1", "fl.example.org", "192.0.2.7"):
        made = ServerFolder.create(tmp_path / host, ServerSettings(host=host))
        assert "localhost" in certificate_authority.dns_names(
            (made.folder / "server.crt").read_bytes()
        )
        assert "proxy_ssl_name localhost;" in (made.folder / "nginx.conf").read_text()
    _, key, ca = certificate_authority.make_ca("before")
    old = certificate_authority.make_server(["fl.example.org", "127.0.0.1"], key, ca)
    (made.folder / "server.crt").write_bytes(old.certificate)
    made.write_files()
    assert "proxy_ssl_name 192.0.2.7;" in (made.folder / "nginx.conf").read_text()


def admitted(place: ServerFolder, *names: str) -> ServerFolder:
    for name in names:
        found = request(name)
        place.admit(found, found.fingerprint)
    return place


def test_masks_are_added_where_they_can_be_had(
    place: ServerFolder, table_contract: Contract
) -> None:
    """By the sites that the contract names, not by those in the roster."""
    admitted(place, "north", "south", "east", "west")
    two = place.with_roster(draft(table_contract, "north", "south"), masked=True)
    assert two.secure_aggregation is None
    robust = draft(
        table_contract,
        "north",
        "south",
        "east",
        quorum=3,
        aggregation={"robust": {"rule": "median"}},
    )
    assert place.with_roster(robust, masked=True).secure_aggregation is None
    four = place.with_roster(
        draft(table_contract, "north", "south", "east", "west", quorum=2), masked=True
    )
    assert four.secure_aggregation is not None
    assert (four.secure_aggregation.threshold, four.quorum) == (3, 3)
    own = draft(table_contract, "north", "south", "east", quorum=3).model_dump(mode="json")
    for site in own["sites"]:
        site["public_key"] = "0" * 63 + str(len(site["name"]))
    own["sites"][0]["public_key"] = "1" * 64
    own["secure_aggregation"] = {"threshold": 2, "bound": 2.0}
    kept = place.with_roster(Contract.model_validate(own), masked=True)
    assert kept.secure_aggregation is not None
    assert (kept.secure_aggregation.threshold, kept.secure_aggregation.bound) == (2, 2.0)


def test_a_contract_that_the_server_made_is_permitted_by_a_site_that_asks_for_masks(
    place: ServerFolder, table_contract: Contract, tmp_path: Path
) -> None:
    admitted(place, "north", "south", "east")
    wanted = draft(table_contract, "north", "south", "east", quorum=3)
    made = place.with_roster(wanted, masked=True)
    for contract, codes in ((made, []), (wanted, ["E205"])):
        policy = permissive_policy(contract, "north", tmp_path / "rows.csv", None)
        permits = policy.permits.model_copy(update={"masked_only": "auto"})
        found = policy.model_copy(update={"permits": permits}).refusals(contract)
        assert [refusal.code for refusal in found] == codes
