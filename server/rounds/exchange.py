"""What comes back from sites, and how a round's stages are driven."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import TypeVar

from silotune.common.contract.contract import Contract
from silotune.common.errors import ProtocolError
from silotune.common.protocol import messages
from silotune.common.protocol.messages import (
    Blobs,
    Endorsement,
    Keys,
    Message,
    Refusal,
    Revealed,
    Shares,
)

# A site's reply: its bytes, or the code that says why there is none.
Reply = bytes | str
SILENT = "E402"
BROKEN = "E500"
ABSENT = "E403"  # not connected, or without an answer, when the run began
OFFLINE = "E404"  # Flower lost the connection to the site's relay
NO_WORKER = "E401"  # the relay's answer when it could not reach its worker
NO_REPLY = (SILENT, BROKEN, OFFLINE)

Result = TypeVar("Result")
# Yields what to ask which site, is sent what came back, returns a result.
RoundProtocol = Generator[Mapping[str, bytes], Mapping[str, Reply], Result]
Said = type[Keys] | type[Shares] | type[Endorsement] | type[Revealed]


def read(contract: Contract, reply: Reply) -> Message:
    """A reply's message. ProtocolError for none, another contract's, or a refusal."""
    if isinstance(reply, str):
        raise ProtocolError("There is no reply.", code=reply)
    if not reply:
        raise ProtocolError("The relay got no answer from its worker.", code=NO_WORKER)
    message = messages.unpack(reply)
    header = message.header
    if header.contract != contract.hash:
        raise ProtocolError("The message is for another contract.", code="E503")
    if isinstance(header, Refusal):
        raise ProtocolError(
            f"{header.site} refuses ({header.code}, incident {header.incident}).", code=header.code
        )
    return message


class RoundTraffic:
    """A round's traffic and failures. on_failure: is told of each site that falls out, and why.

    absent: sites that take no part in any round, with the code of the reason.
    """

    def __init__(self, contract: Contract, on_failure: Callable[[str, str], None]) -> None:
        self.contract, self._on_failure = contract, on_failure
        self.absent: Mapping[str, str] = {}
        self.begin()

    def begin(self) -> None:
        """A round begins: nothing was sent, nobody has failed but those who are absent."""
        self.bytes_up = self.bytes_down = 0
        self.failed: dict[str, str] = dict(self.absent)

    def fail(self, site: str, code: str) -> None:
        """Note that a site does not count, with the code of the reason."""
        self.failed[site] = code
        self._on_failure(site, code)

    def reasons(self) -> str:
        return ", ".join(f"{s}: {c}" for s, c in sorted(self.failed.items())) or "no reply"

    def count(self, sent: int, reply: Reply) -> None:
        self.bytes_down += sent
        self.bytes_up += len(reply) if isinstance(reply, bytes) else 0

    def ask(
        self, requests: Mapping[str, bytes], kind: Said, *, enough: int = 0
    ) -> RoundProtocol[dict[str, Blobs]]:
        """One stage: the blobs of each site that answered as it should; the others fail.

        If fewer than `enough` did, those that said nothing are asked once more: a site answers a
        request that it has answered with the same bytes.
        """
        found: dict[str, Blobs] = {}
        for _ in range(2):
            came = yield requests
            for site, wire in requests.items():
                self._read(site, len(wire), came.get(site, SILENT), kind, found)
            requests = {s: wire for s, wire in requests.items() if self.failed.get(s) in NO_REPLY}
            if len(found) >= enough or not requests:
                break
        return found

    def _read(
        self, site: str, sent: int, reply: Reply, kind: Said, found: dict[str, Blobs]
    ) -> None:
        self.count(sent, reply)
        try:
            message = read(self.contract, reply)
            if not isinstance(message.header, kind) or message.header.site != site:
                raise ProtocolError("The reply is not this site's to this stage.", code="E503")
        except ProtocolError as error:
            self.fail(site, error.code)
        else:
            self.failed.pop(site, None)
            found[site] = message.blobs


Ask = Callable[[Mapping[str, bytes]], Mapping[str, Reply]]


def drive_round(
    stages: RoundProtocol[Result],
    sites: Mapping[str, Callable[[bytes], bytes]],
    ask: Ask | None = None,
) -> Result:
    """Drive stages with sites of this process, in the order in which they are asked, or by `ask`
    all at once."""
    answers: Mapping[str, Reply] | None = None
    while True:
        try:
            asked = next(stages) if answers is None else stages.send(answers)
        except StopIteration as end:
            result: Result = end.value
            return result
        if ask is not None:
            answers = ask(asked)
        else:
            answers = {site: sites[site](wire) for site, wire in asked.items()}
