"""`silotune contract validate`, behind reading the file: would a site refuse this contract?"""

from __future__ import annotations

import importlib
from pathlib import Path

from silotune.common.cli.main import CONTRACT_CHECK
from silotune.common.contract.contract import Contract
from silotune.common.contract.model import OneHotModel
from silotune.common.errors import SilotuneError
from silotune.common.model_files.model_source import folder_of


def validate(contract: Contract, folder: Path | None) -> list[str]:
    """What could not be checked, in sentences; nothing else that any site would refuse.

    Args:
        contract: as it was read.
        folder: of its base model; None for the cache's, if the model is a packaged one.

    Raises:
        SilotuneError: the first problem; its `problems` are all of them.
    """
    left_out = []
    if not isinstance(contract.model, OneHotModel):
        folder = folder_of(contract, folder)
        if folder is None:
            left_out = [
                f"not checked: [model] and [adapter], for '{contract.model.name}' is not "
                "here; name its folder with --model"
            ]
    problems: list[SilotuneError] = importlib.import_module(CONTRACT_CHECK).problems(
        contract, folder
    )
    if problems:
        first = problems[0]
        first.problems = [str(problem) for problem in problems]
        raise first
    return left_out
