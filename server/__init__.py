"""The operator: rounds, adapters and reports. Imports only itself and common."""

from typing import TYPE_CHECKING

from silotune.common.runtime.lazy_names import lazy_names

__all__ = ["FederatedRun"]

if TYPE_CHECKING:
    from silotune.server.rounds.run import FederatedRun
else:
    __getattr__, __dir__ = lazy_names(
        __name__, {"FederatedRun": "silotune.server.rounds.run:FederatedRun"}
    )
