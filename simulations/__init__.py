"""Both sides on one machine, with data, recipes and comparisons. May import everything."""

from typing import TYPE_CHECKING

from silotune.common.runtime.lazy_names import lazy_names

__all__ = ["Recipe", "RunResult", "simulate"]

if TYPE_CHECKING:
    from silotune.simulations.comparison.recipe import Recipe
    from silotune.simulations.comparison.run_result import RunResult
    from silotune.simulations.comparison.simulate import simulate
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Recipe": "silotune.simulations.comparison.recipe:Recipe",
            "RunResult": "silotune.simulations.comparison.run_result:RunResult",
            "simulate": "silotune.simulations.comparison.simulate:simulate",
        },
    )
