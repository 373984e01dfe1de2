"""A site: records in, one private adapter update out. Imports only itself and common.

The names below load torch, or the record code, only when they are used: the relay imports this
package and must load neither.
"""

from typing import TYPE_CHECKING

from silotune.common.runtime.lazy_names import lazy_names

__all__ = [
    "DPOptimizer",
    "Mechanism",
    "Policy",
    "PrivacyLedger",
    "RDPAccountant",
    "Worker",
    "accountant",
]

if TYPE_CHECKING:
    from silotune.client.privacy import accountant
    from silotune.client.privacy.accountant import Mechanism
    from silotune.client.privacy.ledger import PrivacyLedger
    from silotune.client.privacy.rdp_accountant import RDPAccountant
    from silotune.client.site.policy import Policy
    from silotune.client.training.dp_optimizer import DPOptimizer
    from silotune.client.worker.worker import Worker
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "DPOptimizer": "silotune.client.training.dp_optimizer:DPOptimizer",
            "Mechanism": "silotune.client.privacy.accountant:Mechanism",
            "Policy": "silotune.client.site.policy:Policy",
            "PrivacyLedger": "silotune.client.privacy.ledger:PrivacyLedger",
            "RDPAccountant": "silotune.client.privacy.rdp_accountant:RDPAccountant",
            "Worker": "silotune.client.worker.worker:Worker",
            "accountant": "silotune.client.privacy.accountant",
        },
    )
