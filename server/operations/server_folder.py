"""A server's folder: keys, the roster of admitted sites, and the files of Flower and nginx.

server.toml  ca.{key,crt,crl}  server.{key,crt}  roster/<site>.json  contracts/
nginx.conf  nginx/  flwr/  state.db  runs/
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Self

from jinja2 import Environment, StrictUndefined
from pydantic import Field, model_validator

from silotune.common.cli.main import command
from silotune.common.config import types
from silotune.common.config.types import Frozen
from silotune.common.contract import contract as contracts
from silotune.common.contract.contract import Contract
from silotune.common.errors import ErrorCode, UsageError
from silotune.common.protocol import join_request
from silotune.common.protocol.join_request import JoinRequest
from silotune.common.protocol.messages import MAX_WIRE
from silotune.common.runtime.atomic_files import write_durably
from silotune.server.operations import certificate_authority

LINK_NAME, CRL = "localhost", "ca.crl"
PLAIN = re.compile(r"[\w/.+@-]+")
Port = Annotated[int, Field(ge=1, le=65535, strict=True)]


class ServerSettings(Frozen):
    """server.toml: the addresses and ports of a server."""

    host: str = Field(
        pattern=r"^[A-Za-z0-9.:-]{1,253}$",
        description="Name or IP address at which the sites reach the server.",
    )
    port: Port = Field(
        default=8443, description="Port at which the sites connect, through nginx and TLS."
    )
    listen: str = Field(
        default="0.0.0.0",  # noqa: S104
        pattern=r"^[0-9A-Fa-f.:]{2,45}$",
        description="IP address of this machine on which nginx listens; 0.0.0.0 for every one.",
    )
    link_port: Port = Field(
        default=8000,
        description="Port of Flower's SuperLink, on the loopback interface alone.",
    )
    metrics_port: Port | None = Field(
        default=None,
        description="Port of the Prometheus metrics, on the loopback interface alone; none if "
        "absent.",
    )

    @model_validator(mode="after")
    def _three_ports(self) -> Self:
        if len({self.port, self.link_port, self.metrics_port}) < 3:
            raise ValueError("port, link_port and metrics_port must differ")
        return self

    @property
    def reachable(self) -> str:
        """Where this machine itself reaches what listens on `listen`."""
        return "127.0.0.1" if self.listen == "0.0.0.0" else self.listen  # noqa: S104


@dataclass(frozen=True)
class ServerFolder:
    folder: Path

    @classmethod
    def open(cls, folder: Path) -> ServerFolder:
        """The server that a folder holds; UsageError E102 if this user can read none there."""
        file = folder / "server.toml"
        try:
            file.open("rb").close()
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(
                f"{folder} holds no server: there is no server.toml. Name the server's folder with "
                "--folder, or make a server in a new one: "
                f"{command('server', 'init', '--host', 'HOST', '--folder', 'FOLDER')}",
                code=ErrorCode.CONFIG_UNREADABLE,
            ) from None
        except OSError as error:
            raise UsageError(
                f"{file} cannot be read: {error.strerror}. Run this as the server's user.",
                code=ErrorCode.CONFIG_UNREADABLE,
            ) from None
        return cls(folder)

    @property
    def settings(self) -> ServerSettings:
        path = self.folder / "server.toml"
        return types.parse(types.read_text(path, "Server"), path.name, ServerSettings)

    @property
    def link(self) -> str:
        """Where the operator's own commands reach the SuperLink."""
        return f"127.0.0.1:{self.settings.link_port}"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def roster(self) -> list[JoinRequest]:
        """The sites that were admitted, by name."""
        return [join_request.load(path) for path in sorted((self.folder / "roster").glob("*.json"))]

    @classmethod
    def create(cls, folder: Path, settings: ServerSettings) -> ServerFolder:
        """A new folder (0700): the CA, the server's certificate, an empty roster."""
        if (folder / "server.toml").exists():
            raise UsageError(f"{folder} holds a server already. Choose another folder.")
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty. Choose a folder for the server alone.")
        if not PLAIN.fullmatch(str(folder.resolve())):
            raise UsageError(
                f"{folder.resolve()} cannot stand in nginx's and Flower's files: use "
                "letters, digits, '/', '.', '_' and '-'."
            )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        place = cls(folder)
        ca, ca_key, ca_certificate = certificate_authority.make_ca("Silotune federation CA")
        hosts = [settings.host, "127.0.0.1", LINK_NAME]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        crl = f"https://{host}:{settings.port}/{CRL}"
        server = certificate_authority.make_server(hosts, ca_key, ca_certificate, crl)
        for name, data in (
            ("ca.key", ca.key),
            ("ca.crt", ca.certificate),
            ("server.key", server.key),
            ("server.crt", server.certificate),
            (CRL, certificate_authority.make_crl(ca_key, ca_certificate)),
        ):
            write_durably(folder / name, data)
        for name in ("roster", "flwr", "runs", "nginx"):
            (folder / name).mkdir(mode=0o700)
        write_durably(
            folder / "server.toml",
            "".join(
                f'{key} = "{value}"\n' if isinstance(value, str) else f"{key} = {value}\n"
                for key, value in settings.model_dump(exclude_none=True).items()
            ).encode(),
        )
        place.write_files()
        return place

    @property
    def _link_name(self) -> str:
        """By which nginx knows the SuperLink's certificate: it matches names, never addresses.
        Certificates of earlier versions have the host alone."""
        names = certificate_authority.dns_names((self.folder / "server.crt").read_bytes())
        return LINK_NAME if LINK_NAME in names else self.settings.host

    def write_files(self, temporary: Path | None = None) -> None:
        """nginx.conf and Flower's own configuration, from server.toml. temporary: where nginx keeps
        what is too large for its memory, by default in the folder."""
        mode = 0o600 if temporary is None else 0o644  # there nginx is another user
        temporary = temporary or self.folder.resolve() / "nginx"
        if (self.folder / CRL).exists():
            write_durably(temporary / CRL, (self.folder / CRL).read_bytes())
            (temporary / CRL).chmod(mode)
        template = (resources.files("silotune.server.operations") / "nginx.conf.j2").read_text()
        text = (
            Environment(
                undefined=StrictUndefined,
                keep_trailing_newline=True,
                autoescape=False,  # noqa: S701
            )
            .from_string(template)
            .render(
                folder=self.folder.resolve(),
                largest=MAX_WIRE + (1 << 20),
                link=self.link,
                link_name=self._link_name,
                temporary=temporary,
                **self.settings.model_dump(),
            )
        )
        write_durably(self.folder / "nginx.conf", text.encode())
        write_durably(
            self.folder / "flwr" / "config.toml",
            (
                f'[superlink.silotune]\naddress = "{self.link}"\n'
                f'root-certificates = "{(self.folder / "ca.crt").resolve()}"\n'
            ).encode(),
        )

    def admit(self, request: JoinRequest, fingerprint: str) -> Path:
        """Add a site to the roster. UsageError unless this is the request that was read out, and
        its name and keys are nobody else's."""
        if not request.says(fingerprint):
            raise UsageError(
                f"The fingerprint of this request is {request.fingerprint}, not {fingerprint}. It "
                "is not what the site sent: do not add it; phone the site."
            )
        path = self.folder / "roster" / f"{request.site}.json"
        for other in self.roster():
            same = {other.public_key, other.node_key} & {request.public_key, request.node_key}
            if same and other != request:
                raise UsageError(f"The site '{other.site}' has a key of this request already.")
            if other.site == request.site and other != request:
                raise UsageError(
                    f"The roster has other keys of '{request.site}'. If the site made new ones, "
                    f"remove {path} first."
                )
        write_durably(path, request.model_dump_json(indent=1).encode())
        return path

    def check_sites(self, contract: Contract) -> None:
        """UsageError that names each site of a contract whose updates could not count: it is not in
        the roster, or the contract does not have its key."""
        keys = {request.site: request.public_key for request in self.roster()}
        problems = []
        for site in contract.sites:
            if site.name not in keys:
                problems.append(
                    f"'{site.name}' is not in the roster: add its request with "
                    "`silotune server add`."
                )
            elif site.public_key != keys[site.name]:
                other = "no key" if site.public_key is None else "another key"
                problems.append(
                    f"The contract has {other} of '{site.name}': make the sites' "
                    "contract with `silotune server contract`."
                )
        if problems:
            raise UsageError(" ".join(problems))

    def with_roster(self, draft: Contract, *, masked: bool) -> Contract:
        """The contract with the keys of the admitted sites that it names, and without the others.

        masked: with secure aggregation, where it can be had and the draft does not have it yet.
        UsageError if no site of the draft is admitted, ContractError if no contract is left.
        """
        admitted = {request.site: request.public_key for request in self.roster()}
        sites = [
            site.model_dump(mode="json") | {"public_key": admitted[site.name]}
            for site in draft.sites
            if site.name in admitted
        ]
        if not sites:
            named = ", ".join(site.name for site in draft.sites)
            raise UsageError(
                f"No site of the contract is in the roster. The contract names {named}; the roster "
                f"has {', '.join(admitted) or 'nobody'}."
            )
        found: Contract = draft.changed(sites=sites, quorum=min(draft.quorum, len(sites)))
        if not masked or found.secure_aggregation is not None or not found.can_be_masked:
            return found
        return found.with_masks()

    def write_contract(self, contract: Contract, draft: Path, *, replace: bool = False) -> Path:
        """contracts/<name>.json, which every site gets. draft: the file that it was made of.

        replace: if another contract has the name. UsageError without it, or if a run has used that
        other one.
        """
        path = self.folder / "contracts" / f"{contract.name.replace(' ', '-')}.json"
        if path.exists() and (old := contracts.load(path).hash) != contract.hash:
            used = [
                file.parent.name
                for file in sorted(self.runs.glob("*/contract.json"))
                if contracts.load(file).hash == old
            ]
            other = f"Give this one another name: the key `name` in {draft}."
            if used:
                raise UsageError(f"{path} is the contract of the run {', '.join(used)}. {other}")
            if not replace:
                raise UsageError(
                    f"{path} is another contract, which sites may have permitted. {other} If no "
                    "site has that contract yet, replace it with --replace."
                )
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_durably(path, contract.model_dump_json(indent=1, exclude_none=True).encode())
        return path
