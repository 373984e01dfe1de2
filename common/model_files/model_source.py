"""Where the base model of a contract is: the folder that was named, or a packaged model's in the
cache. Nothing is downloaded here, and nothing is hashed: who loads the model does that."""

from __future__ import annotations

import importlib
from pathlib import Path

from silotune.common.contract.contract import Contract
from silotune.common.contract.model import OneHotModel
from silotune.common.errors import DataError, ErrorCode

# Named, not imported: it is loaded where it is asked alone.
SOURCES = "silotune.simulations.datasets.catalog"


def folder_of(contract: Contract, named: Path | None) -> Path | None:
    """The folder that was named, or the cache's if the model is a packaged one and is there."""
    if named is not None or isinstance(contract.model, OneHotModel):
        return named
    found: Path | None = importlib.import_module(SOURCES).present(contract.model.name)
    return found


def required(contract: Contract, named: Path | None, option: str) -> Path | None:
    """The same; None for a one-hot model alone, which has no folder.

    Args:
        contract: whose model.
        named: the folder, if one was named.
        option: by which one is named, in the words of the command at hand.

    Raises:
        DataError: E314 if no folder is known.
    """
    found = folder_of(contract, named)
    if found is None and not isinstance(contract.model, OneHotModel):
        raise DataError(
            f"The folder of model '{contract.model.name}' is not known: it is not in the cache. "
            f"Name it with {option}.",
            code=ErrorCode.MODEL_FOLDER_UNKNOWN,
        )
    return found
