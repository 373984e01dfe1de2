"""The device that simulations are to compute on."""

from __future__ import annotations

from silotune.common.contract.compute import Performance
from silotune.common.errors import DataError


def check_device(performance: Performance) -> None:
    """Before any data is prepared; torch is loaded only if a device is asked for by name.

    Raises:
        DataError: E309, if this machine does not have the device.
    """
    if performance.device in ("auto", "cpu"):
        return
    from silotune.common.models.base import device_of

    try:
        device_of(performance)
    except DataError as error:  # there the setting has the name that it has in a site's policy
        raise DataError(str(error).removeprefix("performance."), code=error.code) from None
