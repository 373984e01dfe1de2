"""Federated LoRA fine-tuning with differential privacy at each site.

    import silotune as st

    contract = st.Contract.load("heart.toml")
    plan = st.privacy.plan(contract)
    run = st.simulate(contract, data=table, site="hospital", epsilon=8, baselines=["head"])
    run.table()

Importing this package loads none of what it computes with: each name loads its module when it is
first used.
"""

from typing import TYPE_CHECKING, Any

from silotune.common.runtime.lazy_names import lazy_names

__all__ = [
    "Contract",
    "Recipe",
    "RunResult",
    "SilotuneError",
    "__version__",
    "client",
    "common",
    "privacy",
    "server",
    "simulate",
    "simulations",
]

if TYPE_CHECKING:
    from silotune import client, common, privacy, server, simulations
    from silotune.common.contract.contract import Contract
    from silotune.common.errors import SilotuneError
    from silotune.simulations.comparison.recipe import Recipe
    from silotune.simulations.comparison.run_result import RunResult
    from silotune.simulations.comparison.simulate import simulate

    __version__: str
else:
    _lazy, _names = lazy_names(
        __name__,
        {
            "Contract": "silotune.common.contract.contract:Contract",
            "Recipe": "silotune.simulations.comparison.recipe:Recipe",
            "RunResult": "silotune.simulations.comparison.run_result:RunResult",
            "SilotuneError": "silotune.common.errors:SilotuneError",
            "client": "silotune.client",
            "common": "silotune.common",
            "privacy": "silotune.privacy",
            "server": "silotune.server",
            "simulate": "silotune.simulations.comparison.simulate:simulate",
            "simulations": "silotune.simulations",
        },
    )

    def __getattr__(name: str) -> Any:
        if name != "__version__":
            return _lazy(name)
        from importlib.metadata import version

        return globals().setdefault(name, version("silotune"))

    def __dir__() -> list[str]:
        return sorted({*_names(), "__version__"})
