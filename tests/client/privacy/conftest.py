"""A ledger with a few entries, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from silotune.client.privacy.keys import Keys
from tests.client.privacy.ledger_home import (
    Home,
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.begin(tmp_path / "site")


@pytest.fixture
def exported(home: Home) -> tuple[list[str], str]:
    return list(home.open().export()), Keys.load(home.keys).public
