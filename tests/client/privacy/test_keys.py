"""A site's keys: made once, and refused when they are missing, damaged or open to others."""

from __future__ import annotations

import pytest

from silotune.client.privacy.keys import Keys
from silotune.common.errors import UsageError
from tests.client.privacy.ledger_home import (
    Home,
)


@pytest.mark.parametrize("name", ["secret.key", "site.key", "owner.pub"])
@pytest.mark.parametrize("how", ["missing", "short", "open", "folder"])
def test_a_key_that_is_missing_damaged_or_open_to_others_is_refused(
    home: Home, name: str, how: str
) -> None:
    path = home.keys / name
    if how == "short":
        path.write_bytes(bytes(31))
    elif how == "open":
        path.chmod(0o640)
    else:
        path.unlink()
        if how == "folder":
            path.mkdir(mode=0o700)
    with pytest.raises(UsageError) as error:
        home.open()
    assert error.value.code == "E214"
    assert len(str(error.value).splitlines()) == 1


def test_keys_are_made_once(home: Home) -> None:
    before = {path.name: path.read_bytes() for path in home.keys.iterdir()}
    with pytest.raises(UsageError, match="already holds keys"):
        Keys.create(home.keys)
    assert {path.name: path.read_bytes() for path in home.keys.iterdir()} == before
