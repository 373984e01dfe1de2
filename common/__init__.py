"""What both sides of the boundary must agree on. Imports no other part of Silotune."""

from typing import TYPE_CHECKING

from silotune.common.runtime.lazy_names import lazy_names

__all__ = ["Contract", "SilotuneError"]

if TYPE_CHECKING:
    from silotune.common.contract.contract import Contract
    from silotune.common.errors import SilotuneError
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Contract": "silotune.common.contract.contract:Contract",
            "SilotuneError": "silotune.common.errors:SilotuneError",
        },
    )
