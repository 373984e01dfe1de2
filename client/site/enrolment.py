"""A site joins a federation: the operator's CA, the server's address and a contract, in site.toml.

The file keeps its comments and order. What is written is only what its owner was shown and signs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from tomlkit.exceptions import ParseError, TOMLKitError

from silotune.client.site import policy as policies
from silotune.client.site.folder import SiteFolder
from silotune.client.site.policy import Policy, Server
from silotune.client.site.safe_read import read_plain
from silotune.common.config import types
from silotune.common.contract.contract import Contract
from silotune.common.errors import UsageError
from silotune.common.protocol import join_request
from silotune.common.runtime.atomic_files import write_durably

CA_FILE = "server-ca.crt"


def enrol(
    site: SiteFolder,
    contract: Contract,
    *,
    address: str,
    ca: Path,
    fingerprint: str,
    settings: Mapping[str, str],
) -> Policy:
    """Write all that into site.toml; the owner has to sign it then. UsageError, and nothing is
    written, unless the CA has the fingerprint that the operator read out and the policy is valid.

    settings: further values, by dotted key, as TOML ('data.duplicate_records' -> '"keep"'), or as
    text.
    """
    given = {"address": address, "ca": ca}
    types.of_options(Server, {"address": "--server", "ca": "--ca"}, given)
    try:
        authority = x509.load_pem_x509_certificate(read_plain(ca).data)
    except ValueError:
        raise UsageError(f"{ca} holds no PEM certificate.") from None
    found = join_request.pairs(authority.fingerprint(SHA256()))
    if not join_request.same(found, fingerprint):
        raise UsageError(
            f"The CA in {ca} has the fingerprint {found}, not {fingerprint}. It is not the "
            "operator's: do not continue; phone the operator."
        )
    text = types.read_text(site.config, "Policy")
    try:
        document = tomlkit.parse(text)
        _set(document, "server.address", address)
        _set(document, "server.ca", CA_FILE)
        for key, value in settings.items():
            _set(document, key, _value(value))
        permitted = document["permits"]["contracts"]
        if contract.hash not in permitted:
            permitted.append(contract.hash)
    except ParseError as error:
        raise UsageError(f"{site.config} is not TOML: {error}.") from None
    except (TOMLKitError, KeyError, AttributeError, TypeError):
        raise UsageError(f"{site.config} has no [permits] contracts = […] to add to.") from None
    new = tomlkit.dumps(document)
    policy = policies.parse(new, site.config)
    # The file may hold more than the certificate that was compared.
    write_durably(site.folder / CA_FILE, authority.public_bytes(Encoding.PEM))
    write_durably(site.config.resolve(), new.encode())
    return policy


def _set(document: Any, key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for name in tables:
        if name not in document:
            document[name] = tomlkit.table()
        document = document[name]
    document[last] = value


def _value(text: str) -> Any:
    """What `text` is in TOML, or itself."""
    try:
        return tomlkit.value(text)
    except TOMLKitError:
        return text
