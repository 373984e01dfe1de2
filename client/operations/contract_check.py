"""What any site would refuse of a contract, whatever its policy: found before anything is spent."""

from __future__ import annotations

from pathlib import Path

from silotune.client.privacy import accountant
from silotune.client.worker.secagg import check_bound
from silotune.common.contract.compute import Performance
from silotune.common.contract.contract import Contract
from silotune.common.contract.model import OneHotModel
from silotune.common.errors import SilotuneError


def problems(
    contract: Contract, folder: Path | None, performance: Performance | None = None
) -> list[SilotuneError]:
    """Each once.

    Args:
        contract: a valid one.
        folder: of its base model; None if it is not here, and then nothing is said about it.
        performance: how it is to be computed; None if that is not known.
    """
    found: dict[str, SilotuneError] = {}

    def note(error: SilotuneError) -> None:
        found.setdefault(str(error), error)

    if contract.privacy.mode == "dp":
        for target in {contract.target_of(site.name) for site in contract.sites}:
            try:
                check_bound(contract, accountant.plan(contract, target))
            except SilotuneError as error:
                note(error)
    if performance is not None:
        from silotune.common.models.base import device_of

        try:
            device_of(performance)
        except SilotuneError as error:
            note(error)
    if folder is not None and not isinstance(contract.model, OneHotModel):
        # PEFT and transformers load longer than all else, and a one-hot model needs neither.
        from silotune.common.models import compatibility

        try:
            compatibility.check(contract, folder, performance)
        except SilotuneError as error:
            note(error)
    return list(found.values())
