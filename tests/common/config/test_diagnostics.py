"""Each pattern of a setting has words of its own, and a sentence names what a person gave."""

from __future__ import annotations

import ast

import pytest

from silotune.client.site.policy import Server
from silotune.common.config import types
from silotune.common.config.diagnostics import PATTERNS
from silotune.common.errors import ContractError
from silotune.server.operations.server_folder import ServerSettings
from tests.test_layout import PACKAGES, ROOT


def test_every_pattern_has_words() -> None:
    found = [
        word.value.value
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Field"
        for word in node.keywords
        if word.arg == "pattern" and isinstance(word.value, ast.Constant)
    ]
    assert len(found) > 8
    assert [p for p in found if not any(part in p for part in PATTERNS)] == []


@pytest.mark.parametrize(
    ("model", "text", "says"),
    [
        (Server, 'ca = "c"\naddress = "x"', "'address' must be HOST:PORT"),
        (ServerSettings, 'host = "bad host"', "'host' must be a host name or an IP address"),
        (ServerSettings, 'host = "h"\nlisten = "everywhere"', "'listen' must be an IP address"),
    ],
)
def test_an_address_is_described(model: type[types.Frozen], text: str, says: str) -> None:
    with pytest.raises(ContractError) as caught:
        types.parse(text, "some.toml", model)
    assert str(caught.value).startswith(says)
    assert "(some.toml:" in str(caught.value)
