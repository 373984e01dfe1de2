"""What comes back from sites, and how a round's stages are driven."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import TypeVar

from silotune.common import messages
from silotune.common.contract import Contract
from silotune.common.errors import ProtocolError
from silotune.common.messages import Message, Refusal

# A site's reply: its bytes, or the code that says why there is none.
Reply = bytes | str
SILENT = "E402"
BROKEN = "E500"

Result = TypeVar("Result")
# Yields what to ask which site, is sent what came back, returns a result.
Stages = Generator[Mapping[str, bytes], Mapping[str, Reply], Result]


def read(contract: Contract, reply: Reply) -> Message:
    """A reply's message; ProtocolError for none, another contract's, or a refusal, with its code.
    """
    if isinstance(reply, str):
        raise ProtocolError("There is no reply.", code=reply)
    message = messages.unpack(reply)
    header = message.header
    if header.contract != contract.hash:
        raise ProtocolError("The message is for another contract.", code="E503")
    if isinstance(header, Refusal):
        raise ProtocolError(
            f"{header.site} refuses ({header.code}, incident {header.incident}).", code=header.code
        )
    return message


def carry_out(stages: Stages[Result], sites: Mapping[str, Callable[[bytes], bytes]]) -> Result:
    """Drive stages with sites of this process, in the order in which they are asked."""
    answers: Mapping[str, Reply] | None = None
    while True:
        try:
            asked = next(stages) if answers is None else stages.send(answers)
        except StopIteration as end:
            result: Result = end.value
            return result
        answers = {site: sites[site](wire) for site, wire in asked.items()}
